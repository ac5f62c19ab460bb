"""What a mode is given."""

from __future__ import annotations

from dataclasses import dataclass, field

from regsurgery.compiler.located import Located
from regsurgery.images.image_set import ImageSet
from regsurgery.progress import Progress
from regsurgery.recipe import Recipe

FIT_IMAGES = 128  # at most that many images, of more evenly spread ones
BATCH = 8


@dataclass(frozen=True)
class Operation:
    """One surgery to be done.

    Attributes:
        fit: images that fitted modes fit on.
        calibrate: native mode: train what the closed form gives.
        check: keep what calibration gained only where it gains on these images, of another kind than `fit`, too.
        stop_after: end calibration after that many steps, as an interrupt does.
        seed: of what is drawn while fitting.
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
