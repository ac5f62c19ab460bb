"""Generated pictures, by number: dead leaves and noise."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regsurgery.images.sources import Item

if TYPE_CHECKING:
    from PIL.Image import Image

GENERATED_SIZE = 256

NOISE = "noise "  # prefix of the seeds of noise pictures


@dataclass(frozen=True)
class Generated:
    """`count` dead-leaves pictures, or noise pictures; another `purpose` gives other pictures."""

    count: int
    seed: int
    purpose: str = ""
    noise: bool = False
    random_access = True

    def __len__(self) -> int:
        return self.count

    def items(self, chosen: range | tuple[int, ...]) -> Iterator[Item]:
        for index in chosen:
            name, kind = ("noise", NOISE) if self.noise else ("dead-leaves", "")
            yield f"{name} picture {index}", f"{kind}{self.purpose}{self.seed}/{index}"

    def fingerprint(self) -> str:
        return f"{'noise' if self.noise else 'dead leaves'} {self.count} {self.purpose}{self.seed}"

    def identity(self) -> str:
        return self.fingerprint()


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


def noise_texture(rng: random.Random, size: int = GENERATED_SIZE) -> Image:
    """Noise of all octaves at the same strength, so that its amplitude falls with frequency as in natural images.

    It has no edges and no objects, so it shares little else with `dead_leaves`. Deterministic in `rng`.
    """
    import PIL.Image
    import PIL.ImageOps

    picture, side, number = None, 2, 0
    while side <= size:
        octave = PIL.Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))
        octave = octave.resize((size, size), PIL.Image.Resampling.BICUBIC)
        number += 1
        picture = octave if picture is None else PIL.Image.blend(picture, octave, 1 / number)
        side *= 2
    assert picture is not None
    return PIL.ImageOps.autocontrast(picture)
