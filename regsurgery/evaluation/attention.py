"""Task `attention`: properties of attention maps, head by head.

A **map** is the attention that the class token pays to the patches; in a model without one, the mean attention that
the patches pay. Shape suffixes: B images, A heads, T tokens, N patches, R registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regsurgery.evaluation.result import Result
from regsurgery.interval import Figures, Values
from regsurgery.verification.observing import Observation, check_block
from regsurgery.verification.pair import Pair

if TYPE_CHECKING:
    from regsurgery.images.image_set import ImageSet
    from regsurgery.progress import Progress

ALL = "all"


def evaluate(pair: Pair, images: ImageSet, *, progress: Progress, seed: int, block: int | None = None) -> Result:
    """For every block and head, means over the images:

    - `to registers`: attention of the class token (or the patches) to register tokens; in mode `bias`, to the
      constant key;
    - `maximum`: the largest share that one patch gets;
    - `entropy`: of the map over the patches, normalised to sum to 1, in nats; at most the log of their number;
    - `coherence`: Moran's I of the map on the patch grid, four neighbours: 1 for equal neighbours, about 0 for chance.

    Args:
        block: only this block, every head; by default all blocks, with tables showing each block's mean over its heads.
    """
    blocks = list(range(pair.original.num_blocks)) if block is None else [check_block(pair.original, block)]
    observe = pair.observer(blocks=blocks, what=("attention",))
    figures = Figures(seed)
    progress.stage("attention", images.num_images)
    for batch in pair.batches(images):
        seen = observe(batch.pixels)
        per_block = [[_of_maps(side, index) for side in seen] for index in blocks]
        values: list[tuple[str, Values]] = []
        if block is None:
            whole = [{name: torch.stack([sides[i][name] for sides in per_block]).mean(dim=0).mean(dim=-1)
                      for name in per_block[0][i]} for i in (0, 1)]  # fmt: skip
            values += _paired(whole, (("block", ALL), ("head", ALL)), is_detail=False)
        for index, both in zip(blocks, per_block, strict=True):
            means = [{name: value_BA.mean(dim=-1) for name, value_BA in side.items()} for side in both]
            values += _paired(means, (("block", index), ("head", ALL)), is_detail=False)
            for head in range(next(iter(both[0].values())).shape[-1]):
                one = [{name: value_BA[:, head] for name, value_BA in side.items()} for side in both]
                values += _paired(one, (("block", index), ("head", head)), is_detail=block is None)
        figures.add(len(batch.pixels), values)
        progress.advance(len(batch.pixels))
    return Result(figures.rows(), details={"query": "class token" if pair.original.has_class_token else "patches"})


def _paired(
    both: list[dict[str, Tensor]], where: tuple[tuple[str, int | str], ...], is_detail: bool
) -> list[tuple[str, Values]]:
    original, patched = both
    return [(name, Values(original[name], patched[name], where, is_detail=is_detail)) for name in original]


def _of_maps(seen: Observation, block: int) -> dict[str, Tensor]:
    """The figures of each image and head, `[B, A]`."""
    map_BAN, registers_BA = attention_map(seen, block)
    share_BAN = map_BAN / map_BAN.sum(dim=-1, keepdim=True)
    return {
        "to registers": registers_BA,
        "maximum": map_BAN.amax(dim=-1),
        "entropy": torch.special.entr(share_BAN).sum(dim=-1),
        "coherence": morans_i(map_BAN.unflatten(-1, seen.subject.grid)),
    }


def attention_map(seen: Observation, block: int) -> tuple[Tensor, Tensor]:
    """The map of every image and head, `[B, A, N]`, and the registers' share, `[B, A]`; neither is normalised."""
    subject = seen.subject
    queries = slice(0, 1) if subject.has_class_token else subject.attended_patches
    rows_BAT = seen.attention(block)[:, :, queries].mean(dim=2)
    return rows_BAT[..., subject.attended_patches], rows_BAT[..., subject.attended_registers].sum(dim=-1)


def morans_i(maps: Tensor) -> Tensor:
    """Moran's I of maps `[..., rows, columns]`: spatial autocorrelation with the four neighbours, weight 1 each.

    NaN for a constant map. Moran, Notes on Continuous Stochastic Phenomena (Biometrika 1950).
    """
    rows, columns = maps.shape[-2:]
    centred = maps.double() - maps.double().mean(dim=(-2, -1), keepdim=True)
    across = (centred[..., 1:] * centred[..., :-1]).sum(dim=(-2, -1))
    down = (centred[..., 1:, :] * centred[..., :-1, :]).sum(dim=(-2, -1))
    pairs = rows * (columns - 1) + columns * (rows - 1)
    return (rows * columns / pairs) * (across + down) / centred.square().sum(dim=(-2, -1))
