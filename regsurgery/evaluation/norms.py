"""Task `norms`: L2 norms of the patches after every block. All figures are per-image figures, averaged over images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from regsurgery.compiler.outliers import outliers, token_norms
from regsurgery.evaluation.result import Result
from regsurgery.interval import Figures, Values
from regsurgery.verification.observing import check_block
from regsurgery.verification.pair import Pair

if TYPE_CHECKING:
    from regsurgery.images.image_set import ImageSet
    from regsurgery.progress import Progress


def evaluate(pair: Pair, images: ImageSet, *, progress: Progress, seed: int, block: int | None = None) -> Result:
    """Median, 99th percentile and maximum of the patch norms, and outliers per image (above 5 times the median).

    Args:
        block: only this block; by default all.
    """
    blocks = range(pair.original.num_blocks) if block is None else [check_block(pair.original, block)]
    observe = pair.observer(blocks=blocks, what=("blocks",))
    figures = Figures(seed)
    progress.stage("norms", images.num_images)
    for batch in pair.batches(images):
        seen = observe(batch.pixels)
        values = []
        for index in blocks:
            original, patched = (_of_images(token_norms(side.patches(index))) for side in seen)
            values += [(name, Values(original[name], patched[name], (("block", index),))) for name in original]
        figures.add(len(batch.pixels), values)
        progress.advance(len(batch.pixels))
    return Result(figures.rows())


def _of_images(norms_BN: Tensor) -> dict[str, Tensor]:
    return {
        "median": norms_BN.median(dim=1).values,
        "p99": norms_BN.quantile(0.99, dim=1),
        "max": norms_BN.amax(dim=1),
        "outliers per image": outliers(norms_BN).sum(dim=1),
    }
