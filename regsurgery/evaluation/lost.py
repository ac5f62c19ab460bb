"""Task `lost`: unsupervised object discovery with LOST on data in Pascal VOC's layout; the figure is CorLoc.

The protocol of Jiang et al., arXiv 2506.08010: queries, keys or values of a block as features, a bias on their
similarities, and the best setting of each model over blocks, kinds and biases. Images keep their own size, cropped to
whole patches, and features have length 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from regsurgery.evaluation.discovery import boxes, found
from regsurgery.evaluation.own_size import by_size
from regsurgery.evaluation.patch_features import OF_ATTENTION, checked_kinds, chosen_blocks, patch_features
from regsurgery.evaluation.result import Result
from regsurgery.evaluation.voc import objects_of
from regsurgery.interval import Figures, Row, Values
from regsurgery.verification.observing import Observation
from regsurgery.verification.pair import Pair
from regsurgery.verification.verdict_text import share_text

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from regsurgery.images.image_set import ImageSet
    from regsurgery.progress import Progress

BIASES = (0.0, -0.2, -0.4)
SHOWN = 16  # images whose boxes are kept, for pictures
Setting = tuple[tuple[str, int | str], ...]


def evaluate(
    pair: Pair,
    images: ImageSet,
    *,
    progress: Progress,
    seed: int,
    block: int | None = None,
    kind: Sequence[str] = OF_ATTENTION,
    bias: Sequence[float] = BIASES,
) -> Result:
    """CorLoc: the share of images whose box has an IoU of 0.5 or more with one of their objects.

    Args:
        images: `DIR/JPEGImages/NAME.jpg` with objects in `DIR/Annotations/NAME.xml`; images without are left out.
        block: by default each of the last four.
        kind: some of `OF_ATTENTION`, as attention reads them, all heads together.
        bias: numbers added to the similarity (cosine) of any two patches; each is tried.

    Raises:
        UserError: the images have no annotations, or a setting is not valid.
        UnsupportedModelError: the model takes only one image size.
    """
    checked_kinds("lost", kind, OF_ATTENTION)
    blocks = chosen_blocks(pair, None if block is None else [block])
    objects = objects_of(images)
    shown = dict.fromkeys(list(objects)[:SHOWN])
    figures = Figures(seed)
    progress.stage("lost", images.num_images)
    for sized, batches in by_size(pair, images):
        observe = sized.observer(blocks=blocks, what=kind)
        for batch in batches:
            seen = observe(batch.pixels)
            drawn = [_drawn(side, blocks, kind, bias) for side in seen]
            values = []
            for setting in drawn[0]:
                original, patched = (_hits(side[setting], batch.names, objects) for side in drawn)
                values.append(("CorLoc", Values(original, patched, setting, is_share=True)))
            figures.add(len(batch.names), values)
            for place, name in enumerate(batch.names):
                if name in shown:
                    shown[name] = {setting: [side[setting][place].tolist() for side in drawn] for setting in drawn[0]}
            progress.advance(len(batch.names))
    rows = figures.rows()
    best = max(rows, key=lambda row: _value(row, "patched"))
    return Result(rows, (_best(rows),), {"boxes": _pictured(shown, tuple(best.where.items()), objects)})


def _drawn(side: Observation, blocks: Sequence[int], kinds: Sequence[str], biases: Sequence[float]) -> Any:
    """Setting -> the box of each image in pixels, `[B, 4]`."""
    rows, columns = side.subject.grid
    drawn: dict[Setting, np.ndarray] = {}
    for block, kind in itertools.product(blocks, kinds):
        given = boxes(patch_features(side, block, kind), rows, columns, biases) * side.subject.patch_size
        for bias, boxes_B4 in zip(biases, given, strict=True):
            drawn[("block", block), ("features", kind), ("bias", f"{bias:g}")] = boxes_B4
    return drawn


def _hits(boxes_B4: np.ndarray, names: Sequence[str], objects: dict[str, np.ndarray]) -> Tensor:
    """1 if a box is on an object, 0 if not; NaN for an image without objects."""
    return torch.tensor(
        [
            float(found(box_4, objects[name])) if len(objects[name]) else float("nan")
            for box_4, name in zip(boxes_B4, names, strict=True)
        ]
    )


def _value(row: Row, side: str) -> float:
    estimate = getattr(row, side)
    return 0.0 if estimate is None else estimate.value


def _best(rows: Sequence[Row]) -> str:
    texts = []
    for side in ("original", "patched"):
        row = max(rows, key=lambda row: _value(row, side))
        estimate = getattr(row, side)
        where = f"block {row.where['block']} {row.where['features']}, bias {row.where['bias']}"
        hits = "nothing" if estimate is None else share_text(round(estimate.value * estimate.n), estimate.n)
        texts.append(f"{side} {hits} ({where})")
    return f"best of {len(rows)} settings, chosen on the same images: {'; '.join(texts)}"


def _pictured(shown: dict[str, Any], setting: Setting, objects: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The boxes of the first images in one setting, in pixels: from both models, and of the objects."""
    return [
        {
            "image": Path(name).name,
            "setting": dict(setting),
            "original": of_setting[setting][0],
            "patched": of_setting[setting][1],
            "objects": objects[name].tolist(),
        }
        for name, of_setting in shown.items()
        if of_setting is not None
    ]
