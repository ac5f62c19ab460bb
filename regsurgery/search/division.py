"""Images to search or fit on, and others to verify on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from regsurgery.errors import UserError
from regsurgery.images.image_set import MIN_IMAGES, ImageSet, image_set
from regsurgery.search.shares import MIN_DIVIDED

HELD_OUT = 30  # of three times as many user images, at least this many are for verification alone
GENERATED_TO_FIT = 128  # pictures to fit on if the user gives none
FIT, UNSEEN = "fit", "unseen"  # purposes of generated pictures


@dataclass(frozen=True)
class Division:
    """The images of a run.

    Attributes:
        every: all of them.
        searched, unseen: the ones that the search sees, and others. If there are few photos, both are all of them;
            without a search, none are seen.
    """

    every: ImageSet
    searched: ImageSet | None
    unseen: ImageSet

    @classmethod
    def without_search(cls, images: ImageSet) -> Division:
        return cls(images, None, images)

    @classmethod
    def for_search(cls, images: ImageSet, seed: int) -> Division:
        if images.evidence == "generated":
            return cls(images, images, image_set(None, images.num_images, seed=seed, purpose=UNSEEN))
        if images.num_images < MIN_DIVIDED:
            return cls(images, images, images)
        return cls(images, *_held_out(images))

    def for_fit(self, seed: int) -> tuple[ImageSet, ImageSet]:
        """Images to fit weights on, and others to verify them on: the same as for the search, if it held photos out.

        Raises:
            UserError: there are too few for both.
        """
        if self.every.evidence == "generated":
            return image_set(None, GENERATED_TO_FIT, seed=seed, purpose=FIT), self.every
        if self.searched is not None and self.searched is not self.unseen:
            return self.searched, self.unseen
        if self.every.num_images < 2 * MIN_IMAGES:
            raise UserError(
                f"{self.every.note}: too few to fit on some and verify on others; give at least {2 * MIN_IMAGES}"
            )
        return _held_out(self.every)


def _held_out(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Hold out a fifth of the user's images for verification, but at least `HELD_OUT`, and at most a third."""
    total = images.num_images
    kept, unseen = images.hold_out(max(MIN_IMAGES, min(total // 3, max(HELD_OUT, total // 5))))
    return kept, replace(unseen, note=f"{unseen.num_images} of the {images.note}, held out")
