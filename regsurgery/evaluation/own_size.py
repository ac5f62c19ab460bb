"""Images at their own size, cut to whole patches: what dense tasks are measured on.

A graph holds for one image size. So images come grouped: one pair a size, and batches of images of that size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from PIL import Image

from regsurgery.errors import UserError
from regsurgery.images.decoding import decode
from regsurgery.images.image_set import ImageSet
from regsurgery.images.sources import UNREADABLE, Content, Item
from regsurgery.verification.pair import Batch, Pair, normalisation, pixels_of

BATCH_PATCHES = 6144  # of one batch; more are no faster on a CPU
Size = tuple[int, int]


def by_size(pair: Pair, images: ImageSet) -> Iterator[tuple[Pair, Iterator[Batch]]]:
    """For every size of the images, cut at the right and at the bottom to whole patches, the pair at that size and its
    batches: pixels normalised as by the model's preprocessing, and names. Traces once a size: 2 s for a ViT-Ti.

    Images that cannot be read, or are smaller than a patch, are told of and left out.

    Raises:
        UnsupportedModelError: the model takes one size only.
        UserError: no image can be read.
    """
    patch = pair.original.patch_size
    groups: dict[Size, list[Item]] = {}
    for name, content in images.source.items(images.chosen):
        try:
            width, height = _size(content)
        except UNREADABLE as error:
            _skip(images, name, " ".join(str(error).split()))
            continue
        if min(width, height) < patch:
            _skip(images, name, f"{width}x{height} pixels, less than a patch of {patch}")
            continue
        groups.setdefault((height // patch * patch, width // patch * patch), []).append((name, content))
    if not groups:
        raise UserError(f"{images.note}: none of them can be read")
    for size, items in sorted(groups.items()):
        num_patches = size[0] * size[1] // patch**2
        yield pair.at_size(size), _batches(pair, images, items, size, max(1, BATCH_PATCHES // num_patches))


def _size(content: Content) -> Size:
    """(width, height), from the header where there is a file."""
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
                _skip(images, name, " ".join(str(error).split()))
                continue
            read.append((name, (pixels_of(image) - mean_311) * scale_311))
        if read:
            names, pixels = zip(*read, strict=True)
            yield Batch(torch.stack(pixels).to(pair.traced.example[0].dtype), names)
