"""Images at their own size, cropped to whole patches, for dense tasks.

A graph is valid for one image size, so images are grouped: one pair per size, with batches of images of that size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from PIL import Image

from regsurgery.errors import UserError, in_short
from regsurgery.images.decoding import decode
from regsurgery.images.image_set import ImageSet
from regsurgery.images.sources import UNREADABLE, Content, Item
from regsurgery.verification.pair import Batch, Pair, normalisation, pixels_of

BATCH_PATCHES = 6144  # patches per batch; more are not faster on a CPU
Size = tuple[int, int]


def by_size(pair: Pair, images: ImageSet) -> Iterator[tuple[Pair, Iterator[Batch]]]:
    """For every image size, cropped at the right and bottom to whole patches: the pair at that size and its batches,
    with pixels normalised as in the model's preprocessing, and names. Traces once per size: 2 s for a ViT-Ti.

    Images that cannot be read, or are smaller than a patch, are reported and left out.

    Raises:
        UnsupportedModelError: the model takes only one size.
        UserError: no image can be read.
    """
    patch = pair.original.patch_size
    groups: dict[Size, list[Item]] = {}
    for name, content in images.source.items(images.chosen):
        try:
            width, height = _size(content)
        except UNREADABLE as error:
            _skip(images, name, in_short(error))
            continue
        if min(width, height) < patch:
            _skip(images, name, f"{width}x{height} pixels, smaller than a patch of {patch}")
            continue
        groups.setdefault((height // patch * patch, width // patch * patch), []).append((name, content))
    if not groups:
        raise UserError(f"{images.note}: none of them can be read; give other images")
    for size, items in sorted(groups.items()):
        num_patches = size[0] * size[1] // patch**2
        yield pair.at_size(size), _batches(pair, images, items, size, max(1, BATCH_PATCHES // num_patches))


def _size(content: Content) -> Size:
    """(width, height), read from the header of a file."""
    if isinstance(content, str | bytes) or not hasattr(content, "open"):
        return decode(content).size
    with Image.open(content) as image:  # type: ignore[arg-type]
        return image.size


def _skip(images: ImageSet, name: str, reason: str) -> None:
    images.broken[name] = reason
    images.say(f"skipped {name}: {reason}")


def _batches(pair: Pair, images: ImageSet, items: Sequence[Item], size: Size, count: int) -> Iterator[Batch]:
    mean_311, scale_311 = normalisation(pair.loaded)
    for start in range(0, len(items), count):
        read = []
        for name, content in items[start : start + count]:
            try:
                image = decode(content).crop((0, 0, size[1], size[0]))
            except UNREADABLE as error:
                _skip(images, name, in_short(error))
                continue
            read.append((name, (pixels_of(image) - mean_311) * scale_311))
        if read:
            names, pixels = zip(*read, strict=True)
            yield Batch(torch.stack(pixels).to(pair.traced.example[0].dtype), names)
