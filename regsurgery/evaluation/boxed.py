"""Images in VOC layout, squeezed to the model's own size, with the part of each patch that is in an object's box.

Shape suffixes: B images, G objects of one image, N patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from regsurgery.evaluation.squeezed import squeezed, stacked
from regsurgery.evaluation.voc import objects_of
from regsurgery.images.image_set import ImageSet
from regsurgery.verification.pair import Pair


@dataclass(frozen=True)
class BoxedBatch:
    """Images and their objects.

    Attributes:
        pixels: preprocessed, `[B, 3, H, W]`.
        objects: of each image the boxes in patches, `[G, 4]`; none for an image without objects.
        inside: the part of each patch that is in a box, 0 to 1, `[B, N]`.
    """

    pixels: Tensor
    objects: list[np.ndarray]
    inside: np.ndarray


def boxed(pair: Pair, images: ImageSet) -> Iterator[BoxedBatch]:
    """Batches of all images.

    Raises:
        UserError: an annotation is missing or broken, or no image has objects.
    """
    objects, (rows, columns) = objects_of(images), pair.original.grid
    for batch in squeezed(pair, images):
        scaled = [
            objects[one.name] * (np.array([columns, rows] * 2) / np.array([*one.image.size] * 2)) for one in batch
        ]
        inside = [covered(each, (rows, columns), pair.original.patch_size) for each in scaled]
        yield BoxedBatch(stacked(batch), scaled, np.stack(inside))


def covered(boxes_G4: np.ndarray, grid: tuple[int, int], patch: int) -> np.ndarray:
    """The part of each patch that is in a box, to the nearest pixel, `[N]`.

    Args:
        boxes_G4: in patches; `patch`: its side in pixels.
    """
    rows, columns = grid
    inside_HW = np.zeros((rows * patch, columns * patch))
    for left, top, right, bottom in (boxes_G4 * patch).round().astype(int):
        inside_HW[top:bottom, left:right] = 1
    return inside_HW.reshape(rows, patch, columns, patch).mean(axis=(1, 3)).ravel()
