"""Images resized to the model's own size without keeping the aspect, so that nothing is cropped away."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from regsurgery.errors import in_short
from regsurgery.images.decoding import decode
from regsurgery.images.image_set import ImageSet
from regsurgery.images.sources import UNREADABLE, Content
from regsurgery.verification.pair import Pair, normalisation, pixels_of

BATCH = 8


@dataclass(frozen=True)
class Squeezed:
    """One image.

    Attributes:
        number: its index among all images.
        image: upright, at its own size; `content` is what it was read from.
        pixels: preprocessed, `[3, H, W]`.
    """

    number: int
    name: str
    content: Content
    image: Image.Image
    pixels: Tensor


def squeezed(pair: Pair, images: ImageSet) -> Iterator[list[Squeezed]]:
    """Batches of all images; those that cannot be read are reported and left out."""
    mean_311, scale_311 = normalisation(pair.loaded)
    height, width = pair.original.image_size
    dtype = pair.traced.example[0].dtype
    items = list(images.source.items(images.chosen))
    for start in range(0, len(items), BATCH):
        batch = []
        for number, (name, content) in enumerate(items[start : start + BATCH], start):
            try:
                image = decode(content)
            except UNREADABLE as error:
                images.broken[name] = in_short(error)
                images.say(f"skipped {name}: {images.broken[name]}")
                continue
            resized = image.resize((width, height), Image.Resampling.BICUBIC)
            pixels = ((pixels_of(resized) - mean_311) * scale_311).to(dtype)
            batch.append(Squeezed(number, name, content, image, pixels))
        if batch:
            yield batch


def stacked(batch: list[Squeezed]) -> Tensor:
    """`[B, 3, H, W]`."""
    return torch.stack([one.pixels for one in batch])
