"""The authors' own search, Algorithm 1 of Jiang et al. (arXiv 2506.08010) as they published it, to stand beside ours.

Outliers are the patches above a norm threshold after a late block; a neuron's score is the mean of its |activation| at
them; of the blocks up to `top_layer` the `top_k` best neurons are taken. One image at a time, as there. What differs
from ours, and what it does, is in docs/differences.md.

Shape suffixes: T tokens, N patches, M the outlier patches of an image, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regsurgery.compiler.located import Located
from regsurgery.compiler.outliers import token_norms
from regsurgery.compiler.taps import tap
from regsurgery.compiler.trace import tensor_inputs
from regsurgery.errors import UserError
from regsurgery.images.image_set import ImageSet
from regsurgery.options import SearchOptions

DEVIATIONS = 3.0  # the paper's threshold: mean + 3 standard deviations of the patch norms
EACH = 10  # the authors' numbers are 10, 50 and 300
MOST = 512  # neurons that are ranked, and tried where no `top_k` is given


@dataclass(frozen=True)
class Ranking:
    """The neurons by the authors' score.

    Attributes:
        threshold: norm above which a patch is an outlier, after block `detect_block`.
        top_layer: the last block whose neurons are ranked.
        num_images: those with outliers, over which scores are averaged; `num_outliers`: how many these have.
        scored: `(block, neuron, score)`, best first.
    """

    threshold: float
    detect_block: int
    top_layer: int
    num_images: int
    num_outliers: int
    scored: tuple[tuple[int, int, float], ...]

    def best(self, count: int) -> tuple[tuple[int, int], ...]:
        """The `count` best neurons, `(block, neuron)` ascending."""
        return tuple(sorted((block, neuron) for block, neuron, _ in self.scored[:count]))


def rank(
    located: Located,
    images: ImageSet,
    emergence_block: int,
    options: SearchOptions,
    advance: Callable[[int], None] = lambda done: None,
) -> Ranking:
    """Rank the neurons on `images`.

    Args:
        emergence_block: the default of `top_layer`: the block where outliers emerge.
        options: the hyperparameters, with the authors' defaults where they have some.

    Raises:
        UserError: a block is not there, or no patch is above the threshold.
    """
    last = len(located.sites.blocks) - 1
    detect = located.sites.probe_block if options.detect_block is None else options.detect_block
    top = emergence_block if options.top_layer is None else options.top_layer
    for flag, block, limit in (("--detect-block", detect, last), ("--top-layer", top, located.sites.probe_block)):
        if not 0 <= block <= limit:
            raise UserError(f"{flag} {block}: must be from 0 to {limit}, of blocks 0 to {last}")
    threshold = options.norm_threshold
    if threshold is None:
        threshold = _usual(located, images, detect)
    return _ranked(located, images, (threshold, detect, top), max(MOST, options.top_k or 0), advance)


def sweep(holds: Callable[[int], bool], most: int) -> int | None:
    """The first number of neurons for which `holds`, of those that are tried: every one up to `EACH`, then every fifth
    larger, up to `most`. None if there is none. More neurons need not suppress more: one extreme stands for all of a
    block.
    """
    count = 1
    while count <= most:
        if holds(count):
            return count
        count = max(count + 1, count * 6 // 5) if count >= EACH else count + 1
    return None


def _usual(located: Located, images: ImageSet, block: int) -> float:
    """Mean + 3 standard deviations of the norms of all patches after a block."""
    total = torch.zeros(3, dtype=torch.float64)
    stream = tap(located.traced.graph_module, {"stream": located.sites.blocks[block].output}, early_exit=True)
    for inputs in _inputs(located, images):
        norms_N = token_norms(stream(*inputs)[1]["stream"])[0, located.sites.patches].double().cpu()
        total += torch.stack((torch.tensor(len(norms_N), dtype=torch.float64), norms_N.sum(), norms_N.square().sum()))
    count, mean = float(total[0]), float(total[1] / total[0])
    variance = (float(total[2]) - count * mean**2) / max(1.0, count - 1)
    return mean + DEVIATIONS * max(0.0, variance) ** 0.5


def _ranked(
    located: Located,
    images: ImageSet,
    setting: tuple[float, int, int],
    most: int,
    advance: Callable[[int], None],
) -> Ranking:
    """The `most` best neurons at a threshold, a block to detect outliers after, and a last block."""
    threshold, detect, top = setting
    sites = located.sites
    blocks = sites.blocks[: top + 1]
    nodes = {"stream": sites.blocks[detect].output, **{f"hidden {block.index}": block.hidden for block in blocks}}
    tapped = tap(located.traced.graph_module, nodes, early_exit=True)
    sums_H: list[Tensor] = [torch.zeros(block.hidden_size, dtype=torch.float64) for block in blocks]
    num_images = num_outliers = 0
    for inputs in _inputs(located, images):
        _, taps = tapped(*inputs)
        outlier_N = token_norms(taps["stream"])[0, sites.patches] > threshold
        advance(1)
        if not outlier_N.any():
            continue
        num_images, num_outliers = num_images + 1, num_outliers + int(outlier_N.sum())
        for sum_H, block in zip(sums_H, blocks, strict=True):
            activation_MH = taps[f"hidden {block.index}"][0, sites.patches][outlier_N]
            sum_H += activation_MH.double().abs().mean(dim=0).cpu()
    if not num_images:
        raise UserError(
            f"--compat reference: no patch has a norm above {threshold:.4g} after block {detect}; give a lower "
            "--norm-threshold"
        )
    scored = [
        (block.index, int(neuron), float(sum_H[neuron]) / num_images)
        for sum_H, block in zip(sums_H, blocks, strict=True)
        for neuron in sum_H.topk(min(most, len(sum_H))).indices
    ]
    scored.sort(key=lambda one: (-one[2], one[0], one[1]))
    return Ranking(threshold, detect, top, num_images, num_outliers, tuple(scored[:most]))


def _inputs(located: Located, images: ImageSet) -> Iterator[Any]:
    """The model's inputs for every image, one at a time."""
    for batch in images.batches(1, located.loaded.preprocess):
        with torch.no_grad():
            yield tensor_inputs(located.loaded, batch)
