"""Task `segment`: the class of each patch, predicted from the patch alone: mean IoU of a linear or a k-means probe.

Shape suffixes: B images, N patches, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F

from regsurgery.errors import UserError
from regsurgery.evaluation.masks import IGNORED, MaskedBatch, batches, with_masks
from regsurgery.evaluation.patch_probe import Confusion, Samples
from regsurgery.evaluation.result import Result
from regsurgery.verification.observing import check_block
from regsurgery.verification.pair import Pair

if TYPE_CHECKING:
    from regsurgery.images.image_set import ImageSet
    from regsurgery.progress import Progress

METHODS = ("linear", "kmeans")
FOLDS = 3
MAX_SAMPLES = 20_000  # most patches that a probe is fitted on


def evaluate(
    pair: Pair,
    images: ImageSet,
    *,
    progress: Progress,
    seed: int,
    masks: str | Path | None = None,
    method: str = "linear",
    block: int = -1,
) -> Result:
    """Mean IoU over the classes, and the share of correct pixels.

    Every patch gets one class, from its own token after `block` (at mean 0 and variance 1): by a logistic regression
    fitted on patches of other images (`FOLDS` folds), or by k-means with as many clusters as classes, which are matched
    to the classes once. Images and masks are resized to the model's own size without keeping the aspect.

    Args:
        images: only those that have a mask count.
        masks: a folder of PNG files of the same names, palette or grey, whose values are class indices, 255 ignored; by
            default the folder `SegmentationClass` or `masks` next to the images' folder.
        method: one of `METHODS`.

    Raises:
        UserError: there are no masks, all have one class, or a setting is not valid.
    """
    block = check_block(pair.original, block)
    images, paths = _checked(images, masks, method)
    observe = pair.observer(blocks=[block], what=["blocks"])
    folds, rng = min(FOLDS, len(paths)), np.random.default_rng(seed)
    samples = Samples(max(1, MAX_SAMPLES // len(paths)), rng)

    def features(batch: MaskedBatch) -> list[np.ndarray]:
        """Of both models, `[B, N, D]`."""
        both = (seen.patches(block).float() for seen in observe(batch.pixels))
        return [F.layer_norm(patches_BND, patches_BND.shape[-1:]).cpu().numpy() for patches_BND in both]

    progress.stage("sample patches", len(paths))
    for batch in batches(pair, images, paths):
        samples.add(features(batch), batch, pair.original.patch_size)
        progress.advance(len(batch.numbers))
    classes = samples.classes()
    if len(classes) < 2:
        raise UserError(f"{images.note}: their masks have {len(classes)} class without {IGNORED}; give at least two")
    progress.stage(f"fit {method}")
    probes = [samples.fit(side, method, folds, seed) for side in (0, 1)]

    sums = Confusion(len(classes), rng)
    progress.stage("segment", len(paths))
    for batch in batches(pair, images, paths):
        places = samples.places(batch.masks)
        predicted = [
            np.stack([probe(number % folds)(each_ND) for number, each_ND in zip(batch.numbers, of_side, strict=True)])
            for probe, of_side in zip(probes, features(batch), strict=True)
        ]
        sums.add(predicted, places, pair.original.grid, pair.original.patch_size)
        progress.advance(len(batch.numbers))
    details = {"iou": {str(name): values for name, values in zip(classes.tolist(), sums.ious(), strict=True)}}
    where = f" in {folds} folds" if method == "linear" else ""
    note = f"{method} probe, {len(classes)} classes, fitted on {samples.count} patches{where}"
    return Result(sums.rows(), (f"{images.note}; {note}",), details, sums.num_images)


def _checked(images: ImageSet, masks: str | Path | None, method: str) -> tuple[ImageSet, Any]:
    """The images that have a mask, and the masks' paths."""
    if method not in METHODS:
        raise UserError(f"eval segment: there is no method '{method}'; choose from {', '.join(METHODS)}")
    images, paths = with_masks(images, None if masks is None else Path(masks))
    if method == "linear" and len(paths) < 2:
        raise UserError(f"{images.note}: only one image has a mask; a linear probe needs at least two")
    return images, paths
