"""Images with masks, both resized to the model's own size without keeping the aspect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from regsurgery.errors import UserError, in_short
from regsurgery.evaluation.squeezed import squeezed, stacked
from regsurgery.images.decoding import opened, orientation
from regsurgery.images.image_set import ImageSet
from regsurgery.images.sources import UNREADABLE
from regsurgery.verification.pair import Pair

FOLDERS = ("SegmentationClass", "masks")
IGNORED = 255
# EXIF orientations that swap width and height, as in `PIL.ImageOps.exif_transpose`.
TURNS = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class MaskedBatch:
    """Images and masks.

    Attributes:
        numbers: their indices among all images with masks.
        pixels: preprocessed, `[B, 3, H, W]`; `masks`: class indices, uint8 `[B, H, W]`.
    """

    numbers: list[int]
    pixels: Tensor
    masks: np.ndarray


def with_masks(images: ImageSet, folder: Path | None) -> tuple[ImageSet, dict[str, Path]]:
    """The images that have masks, and their masks by name."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"{folder}: no such folder of masks; correct --masks")
    chosen, paths = [], {}
    for number, (name, _) in zip(images.chosen, images.source.items(images.chosen), strict=True):
        path = Path(name)
        folders = [path.parent.parent / each for each in FOLDERS] if folder is None else [folder]
        found = next((each / f"{path.stem}.png" for each in folders if (each / f"{path.stem}.png").is_file()), None)
        if found is not None and path.parent != found.parent:
            chosen.append(number)
            paths[name] = found
    if not paths:
        where = f"in {folder}" if folder else f"in {' or '.join(FOLDERS)} next to their folder (or give --masks DIR)"
        raise UserError(f"{images.note}: none has a mask; put PNG files of the same names {where}")
    note = f"{len(paths)} of the {images.note}, with masks" if len(paths) < images.num_images else images.note
    return replace(images, chosen=tuple(chosen), note=note), paths


def batches(pair: Pair, images: ImageSet, paths: Mapping[str, Path]) -> Iterator[MaskedBatch]:
    height, width = pair.original.image_size
    for batch in squeezed(pair, images):
        masks = [upright_mask(paths[one.name], one.image, orientation(one.content)) for one in batch]
        resized = [np.asarray(mask.resize((width, height), Image.Resampling.NEAREST)) for mask in masks]
        yield MaskedBatch([one.number for one in batch], stacked(batch), np.stack(resized))


def upright_mask(path: Path, image: Image.Image, turned: int) -> Image.Image:
    """The mask of an upright `image`, whose EXIF orientation was `turned` (1: none); turned alike where it must be.

    Raises:
        UserError: it is no mask, has another size, or its size does not tell which of the two it was drawn on.
    """
    mask = read_mask(path)
    own = mask.getexif().get(ExifTags.Base.Orientation, 1)
    if turned == 1 or own != 1:
        mask = ImageOps.exif_transpose(mask)
    elif turned <= 4 or image.width == image.height:
        raise UserError(
            f"{path}: its image is turned by EXIF (orientation {turned}), and nothing tells whether the mask was drawn "
            "before or after that; save the image upright, without an orientation"
        )
    elif mask.size == (image.height, image.width):
        mask = mask.transpose(TURNS[turned])
    if mask.size != image.size:
        raise UserError(
            f"{path}: has {mask.width}x{mask.height} pixels, but its image has {image.width}x{image.height}; give a "
            "mask of the same size"
        )
    return mask


def read_mask(path: Path) -> Image.Image:
    """A mask of class indices.

    Raises:
        UserError: it cannot be read, or is a picture.
    """
    mask = opened_mask(path)
    if mask.mode not in ("P", "L"):
        raise UserError(f"{path}: has mode {mask.mode}; a mask must be a palette or 8-bit grey PNG of class indices")
    return mask


def opened_mask(path: Path) -> Image.Image:
    """A mask as it is in its file, of any mode.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with opened(path) as mask:
            mask.load()
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable mask ({in_short(error)})") from error
    return mask
