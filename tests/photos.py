"""Image files, which count as photos."""

from __future__ import annotations

from pathlib import Path

from regsurgery.images.decoding import decode
from regsurgery.images.image_set import image_set


def write_photos(folder: Path, count: int, seed: int = 0) -> Path:
    """`folder` with `count` files that the product takes for photos."""
    folder.mkdir(exist_ok=True)
    pictures = image_set(None, count, seed=seed)
    for number, (_, content) in enumerate(pictures.source.items(pictures.chosen)):
        decode(content).save(folder / f"{number:02}.png")
    return folder
