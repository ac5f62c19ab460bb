"""The input of a mode."""

from __future__ import annotations

from dataclasses import dataclass, field

from regsurgery.compiler.located import Located
from regsurgery.images.image_set import ImageSet
from regsurgery.progress import Progress
from regsurgery.recipe import Recipe

FIT_IMAGES = 128  # at most this many images, evenly spread
BATCH = 8


@dataclass(frozen=True)
class Operation:
    """One surgery to perform.

    Attributes:
        fit: images that fitted modes fit on.
        calibrate: native mode: train the weights of the closed form.
        check: keep the calibrated weights only if they also help on these images, which are of another kind than `fit`.
        stop_after: end calibration after that many steps, as an interrupt does.
        seed: for random numbers while fitting.
    """

    located: Located
    recipe: Recipe
    fit: ImageSet | None = None
    calibrate: bool = False
    check: ImageSet | None = None
    stop_after: int | None = None
    seed: int = 0
    progress: Progress = field(default_factory=Progress)

    @property
    def fit_images(self) -> ImageSet:
        """At most `FIT_IMAGES` of the images to fit on."""
        assert self.fit is not None, "a fitted mode needs images"
        return self.fit.some(FIT_IMAGES)
