"""Images in: a folder of pictures, or dead-leaves pictures where none are given."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from regsurgery.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
GENERATED_SIZE = 256
DEFAULT_GENERATED = 32
UNREADABLE = (OSError, SyntaxError, ValueError)  # what Pillow raises on broken files


@dataclass(frozen=True)
class ImageSet:
    """Images by number; decoded when asked for.

    Attributes:
        note: one line that says what they are.
        paths: the files, or () where the images are generated.
    """

    note: str
    num_images: int
    paths: tuple[Path, ...] = ()
    seed: int = 0

    def image(self, index: int) -> Image:
        """The image of that number, RGB."""
        if self.paths:
            import PIL.Image

            try:
                with PIL.Image.open(self.paths[index]) as image:
                    return image.convert("RGB")
            except UNREADABLE as error:
                raise _unreadable(self.paths[index], error) from error
        return dead_leaves(random.Random(f"{self.seed}/{index}"))

    def batches(self, size: int) -> Iterator[list[Image]]:
        for start in range(0, self.num_images, size):
            yield [self.image(index) for index in range(start, min(start + size, self.num_images))]


def image_set(folder: str | os.PathLike[str] | None, num_images: int | None = None) -> ImageSet:
    """The images below `folder` (recursively, in name order), or dead-leaves pictures where it is None.

    Args:
        num_images: at most that many, evenly spread over the folder; by default all, or `DEFAULT_GENERATED`.

    Raises:
        UserError: no such folder, no readable image in it, or a broken image file.
    """
    if num_images is not None and num_images < 1:
        raise UserError(f"{num_images} images were asked for; at least one is needed")
    if folder is None:
        count = num_images or DEFAULT_GENERATED
        return ImageSet(f"{count} generated dead-leaves pictures (no --images given)", count)
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of images")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"{root}: no images in it (looked for {', '.join(sorted(SUFFIXES))})")
    if num_images is not None and num_images < len(paths):
        paths = [paths[index * len(paths) // num_images] for index in range(num_images)]
    _check_readable(paths)
    return ImageSet(f"{len(paths)} images of {root.name}", len(paths), tuple(paths))


def _check_readable(paths: list[Path]) -> None:
    import PIL.Image

    for path in paths:
        try:
            with PIL.Image.open(path) as image:
                image.verify()
        except UNREADABLE as error:
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not a readable image ({error}); remove it or give another folder")


def dead_leaves(rng: random.Random, size: int = GENERATED_SIZE) -> Image:
    """Discs of random colour that occlude each other, their radii by an inverse cubic law: natural-image statistics.

    Lee, Mumford and Huang, Occlusion Models for Natural Images (IJCV 2001). Deterministic in `rng`.
    """
    import PIL.Image
    import PIL.ImageDraw

    def colour() -> tuple[int, int, int]:
        return rng.randrange(256), rng.randrange(256), rng.randrange(256)

    smallest, largest = size / 64, size / 2
    image = PIL.Image.new("RGB", (size, size), colour())
    draw = PIL.ImageDraw.Draw(image)
    for _ in range(600):
        u = rng.random()
        radius = (smallest**-2 - u * (smallest**-2 - largest**-2)) ** -0.5
        x, y = rng.uniform(0, size), rng.uniform(0, size)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour())
    return image
