"""A model's preprocessing as data that a page can follow: a resize, a centre crop, and a mean and scale.

It is measured, not read: libraries write it down in many ways, and what counts is what becomes of a picture. Ramps tell
the size that a picture is resized to; the filter and the rounding are those that come closest on pictures with detail.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from regsurgery.errors import UnsupportedModelError
from regsurgery.images.generated import dead_leaves
from regsurgery.verification.pair import normalisation

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from regsurgery.frontends.loaded import Loaded

RAMPS = ((480, 320), (320, 480))  # (width, height)
PROBES = ((211, 163), (97, 140), (700, 522))
FILTERS = {
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "lanczos": PIL.Image.Resampling.LANCZOS,
}
MAX_RESIZED = 4  # times the crop
TOLERANCE = 0.5  # of 255, mean over pixels: libraries round differently, a wrong filter or crop differs by 1 and more


@dataclass(frozen=True)
class Preprocessing:
    """Picture -> pixels `[3, height, width]` of a model.

    Attributes:
        resized: (height, width) that every picture gets before the crop, or the length that its shorter side gets.
        rounds: the longer side, then a multiple with a fraction, is rounded; otherwise the fraction is dropped.
        crop_rounds: so is the half of what a crop leaves (half to even); otherwise its fraction is dropped.
        crop: (height, width) of the centre crop.
        filter: one of `FILTERS`, with antialiasing.
        mean, scale: a pixel in [0, 1] becomes (pixel - mean) * scale, for red, green and blue.
    """

    resized: tuple[int, int] | int
    rounds: bool
    crop_rounds: bool
    crop: tuple[int, int]
    filter: str
    mean: tuple[float, ...]
    scale: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the page."""
        return asdict(self)

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that a picture is resized to."""
        if not isinstance(self.resized, int):
            return self.resized[1], self.resized[0]
        long = self.resized * max(width, height) / min(width, height)
        longer = round(long) if self.rounds else int(long)
        return (longer, self.resized) if width >= height else (self.resized, longer)

    def __call__(self, picture: Image) -> NDArray[np.uint8]:
        """The crop of an RGB picture, `[height, width, 3]`, before mean and scale."""
        width, height = self.size_of(*picture.size)
        resized = picture.resize((width, height), FILTERS[self.filter])
        top, left = (self._start(over) for over in (height - self.crop[0], width - self.crop[1]))
        return np.asarray(resized.crop((left, top, left + self.crop[1], top + self.crop[0])))

    def _start(self, over: int) -> int:
        return round(over / 2) if self.crop_rounds else over // 2


def measured(loaded: Loaded) -> Preprocessing:
    """The preprocessing of a model of RGB images.

    Raises:
        UnsupportedModelError: it is more than a resize, a centre crop, a mean and a scale.
    """
    means_311, scales_311 = normalisation(loaded)
    mean, scale = (tuple(float(value) for value in values.flatten()) for values in (means_311, scales_311))

    def levels(picture: Image) -> NDArray[np.float64]:
        """What the model's own preprocessing makes of a picture, `[height, width, 3]`, before mean and scale."""
        pixels = loaded.preprocess([picture])[0].float()
        return (255 * (pixels / scales_311 + means_311)).permute(1, 2, 0).double().numpy(force=True)

    near = _near([_resized(levels(_ramp(*size)), size) for size in RAMPS])
    sizes = [*PROBES, *_odd_crops(near, loaded.image_size[1])]
    probes = [dead_leaves(random.Random(size[0]), max(size)).crop((0, 0, *size)) for size in sizes]
    wanted = [levels(picture) for picture in probes]

    def difference(tried: Preprocessing) -> float:
        return max(float(np.abs(tried(picture) - found).mean()) for picture, found in zip(probes, wanted, strict=True))

    crop, both = loaded.image_size, (False, True)
    tried = [
        Preprocessing(resized, rounds, crop_rounds, crop, name, mean, scale)
        for resized, rounds, crop_rounds, name in itertools.product(near, both, both, FILTERS)
        if _holds(resized, crop)
    ]
    differences = [difference(one) for one in tried]
    if min(differences, default=255) > TOLERANCE:
        raise UnsupportedModelError(
            f"--live: the preprocessing of {loaded.source.name} ({loaded.preprocess_note}) is not a resize and a "
            "centre crop, which are all that the page does; leave out --live"
        )
    return tried[differences.index(min(differences))]


def _ramp(width: int, height: int) -> Image:
    """Red grows to the right, green downwards."""
    red, green = (np.linspace(0, 255, side).round().astype(np.uint8) for side in (width, height))
    blue = np.zeros((height, width), np.uint8)
    return PIL.Image.fromarray(np.stack(np.broadcast_arrays(red[None], green[:, None], blue), axis=-1))


def _resized(levels_HWC: NDArray[np.float64], size: tuple[int, int]) -> tuple[float, float]:
    """(height, width) that a ramp of `size` (width, height) was resized to: by its slopes, away from its ends."""
    found = []
    for side, channel, axis in ((size[1], 1, 0), (size[0], 0, 1)):
        profile = levels_HWC[..., channel].mean(axis=1 - axis)
        margin = len(profile) // 8
        places = np.arange(len(profile))[margin : len(profile) - margin]
        slope = float(np.polyfit(places, profile[margin : len(profile) - margin], 1)[0])
        found.append(255 / max(slope, 1e-6) * side / (side - 1))
    return found[0], found[1]


def _holds(resized: tuple[int, int] | int, crop: tuple[int, int]) -> bool:
    """Whether a crop fits, and is no small part: of a preprocessing that mirrors, say, the sizes are absurd."""
    sides = resized if isinstance(resized, tuple) else (resized, resized)
    return all(whole <= side <= MAX_RESIZED * whole for side, whole in zip(sides, crop, strict=True))


def _near(sizes: list[tuple[float, float]]) -> list[tuple[int, int] | int]:
    """What the sizes that the two ramps got may come from: one size for all, or lengths of the shorter side."""
    (height, width), (height_of_tall, width_of_tall) = sizes
    if abs(height - height_of_tall) < height / 8:
        return [(round((height + height_of_tall) / 2), round((width + width_of_tall) / 2))]
    shorter = round((height + width_of_tall) / 2)
    return [shorter - 1, shorter, shorter + 1]


def _odd_crops(near: list[tuple[int, int] | int], crop: int) -> list[tuple[int, int]]:
    """A picture for each length of the shorter side, of which half of what the crop leaves has a fraction that rounding
    and dropping treat differently.
    """
    height = 97
    widths = [
        next((width for width in range(height, 3 * height) if (shorter * width // height - crop) % 4 == 3), height)
        for shorter in near
        if isinstance(shorter, int)
    ]
    return [(width, height) for width in widths]
