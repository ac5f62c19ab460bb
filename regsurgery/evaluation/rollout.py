"""Task `rollout`: does attention rollout look at the objects?

Rollout follows attention through all blocks (Abnar and Zuidema, arXiv 2005.00928): of every block the mean over the
heads, half of it replaced by the identity for the residual stream, multiplied from the last block to the first. The
**map** is the class token's row over the patches; in a model without one, the mean of the patches' rows. Beside it
stand the same row of the last block's attention alone, and a uniform map, which is chance.

Registers are tokens like others in the product. In mode `bias` what goes to the constant key stays there.

Shape suffixes: B images, T tokens, S tokens of the stream, N patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from regsurgery.evaluation.boxed import boxed
from regsurgery.evaluation.result import Result
from regsurgery.interval import Figures, Values
from regsurgery.verification.observing import Observation
from regsurgery.verification.pair import Pair

if TYPE_CHECKING:
    from regsurgery.images.image_set import ImageSet
    from regsurgery.progress import Progress

ROLLOUT, LAST, UNIFORM = "rollout", "last block", "uniform"


def evaluate(pair: Pair, images: ImageSet, *, progress: Progress, seed: int) -> Result:
    """For each map:

    - `in the boxes`: the share of what the patches get that is within the boxes of the image's objects (the
      energy-based pointing game of Wang et al., arXiv 1910.01279, with all boxes together);
    - `pointing game`: the share of images whose largest patch has its middle in a box (Zhang et al., arXiv 1608.00507,
      without a margin); for the uniform map, of all patches;
    - `to registers`: what the registers, or the constant key, get of the row.

    Images are squeezed to the model's own size.

    Args:
        images: `DIR/JPEGImages/NAME.jpg` with objects in `DIR/Annotations/NAME.xml`; images without are left out.

    Raises:
        UserError: the images have no annotations.
        UnsupportedModelError: the graph computes attention in an unknown way.
    """
    observe = pair.observer(blocks=range(pair.original.num_blocks), what=("attention",))
    rows, columns = pair.original.grid
    figures = Figures(seed)
    progress.stage("rollout", images.num_images)
    for batch in boxed(pair, images):
        seen = observe(batch.pixels)
        inside_BN = torch.from_numpy(batch.inside)
        middles_BN = torch.from_numpy(np.stack([_middles(each, rows, columns) for each in batch.objects]))
        known_B = inside_BN.sum(dim=1) > 0
        values: list[tuple[str, Values]] = []
        for name, first in ((ROLLOUT, 0), (LAST, pair.original.num_blocks - 1)):
            both = [_of_map(*split(side, rolled_out(side, first)), inside_BN, middles_BN) for side in seen]
            values += _values(name, both, known_B)
        uniform = {"in the boxes": inside_BN.mean(dim=1), "pointing game": middles_BN.mean(dim=1)}
        figures.add(len(batch.objects), values + _values(UNIFORM, [uniform, uniform], known_B))
        progress.advance(len(batch.objects))
    details = {"query": "class token" if pair.original.has_class_token else "patches"}
    return Result(figures.rows(), details=details, num_images=figures.num_images)


def _values(name: str, both: list[dict[str, Tensor]], known_B: Tensor) -> list[tuple[str, Values]]:
    where = (("map", name),)
    original, patched = ({key: value_B.where(known_B, torch.nan) for key, value_B in side.items()} for side in both)
    return [(figure, Values(original[figure], patched[figure], where)) for figure in original]


def _of_map(map_BN: Tensor, registers_B: Tensor, inside_BN: Tensor, middles_BN: Tensor) -> dict[str, Tensor]:
    share_BN = map_BN / map_BN.sum(dim=1, keepdim=True)
    return {
        "in the boxes": (share_BN * inside_BN).sum(dim=1),
        "pointing game": middles_BN.take_along_dim(map_BN.argmax(dim=1, keepdim=True), dim=1)[:, 0],
        "to registers": registers_B,
    }


def _middles(boxes_G4: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """1 for each patch whose middle is in a box, `[N]`; boxes in patches."""
    y, x = (each_N + 0.5 for each_N in np.divmod(np.arange(rows * columns), columns))
    left, top, right, bottom = boxes_G4.T[..., None]
    return ((left <= x) & (x < right) & (top <= y) & (y < bottom)).any(axis=0).astype(float)


def rolled_out(seen: Observation, first_block: int) -> Tensor:
    """The rollout's row over the tokens of the stream, from the last block down to `first_block`, float64 `[B, S]`.

    From the last block alone it is that block's attention without the residual stream.
    """
    subject = seen.subject
    last = subject.num_blocks - 1
    num_tokens = max(subject.side.patches.stop, subject.side.registers.stop)
    row_BS = None
    for block in range(last, first_block - 1, -1):
        flow_BSS = of_stream(seen.attention(block).mean(dim=1).double(), num_tokens, subject.attended_registers)
        if row_BS is None:
            row_BS = torch.zeros_like(flow_BSS[:, 0])
            row_BS[:, slice(0, 1) if subject.has_class_token else subject.side.patches] = 1
            row_BS = row_BS / row_BS.sum(dim=1, keepdim=True)
        passed_BS = (row_BS[:, None] @ flow_BSS)[:, 0]
        row_BS = passed_BS if first_block == last else (passed_BS + row_BS) / 2
    assert row_BS is not None
    return row_BS.cpu()


def of_stream(flow_BTT: Tensor, num_tokens: int, constant: slice) -> Tensor:
    """Attention among the tokens of the stream, `[B, S, S]`: without the constant key of mode `bias`, if this block has
    one, so that rows sum to 1 less what it gets.
    """
    if flow_BTT.shape[-1] == num_tokens:
        return flow_BTT
    kept = torch.ones(flow_BTT.shape[-1], dtype=torch.bool, device=flow_BTT.device)
    kept[constant] = False
    return flow_BTT[:, kept][:, :, kept]


def split(seen: Observation, row_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The map over the patches, `[B, N]`, and what the registers or the constant key get, `[B]`."""
    side = seen.subject.side
    in_stream = seen.subject.attended_registers == side.registers
    registers_B = row_BS[:, side.registers].sum(dim=1) if in_stream else 1 - row_BS.sum(dim=1)
    return row_BS[:, side.patches], registers_B
