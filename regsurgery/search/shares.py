"""Which images a process handles if several share a search: whole tars, or every n-th batch; and the pilot.

A search is divided among the parts of an array job, and each part among the processes of a launcher. The batches, and
therefore their sums, are the same however many share them: no batch spans two tars.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from regsurgery.errors import UserError
from regsurgery.images.generated import Generated
from regsurgery.images.image_set import DEFAULT_GENERATED, ImageSet, image_set
from regsurgery.images.opening import dataset_files
from regsurgery.images.sources import fingerprint_of
from regsurgery.images.tars import Tars
from regsurgery.search.processes import Processes

BATCH = 8
PILOT_IMAGES = 32  # for decisions that need few images
JUDGING_IMAGES = 32  # to compare settings on; they take no part in the search
MIN_DIVIDED = 24  # with fewer images, none is held out
JUDGE = "judge"  # purpose of generated pictures


class Part(NamedTuple):
    """Part `number` of `total`, from 1."""

    number: int = 1
    total: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """`I/N` from the command line.

        Raises:
            UserError: `text` does not have that form.
        """
        number, _, total = text.partition("/")
        if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
            raise UserError(f"--part {text}: not I/N with I from 1 to N; give 3/8, for example, for the third of eight")
        return cls(int(number), int(total))


@dataclass(frozen=True)
class FoundPart:
    """Result of one part: the statistics file `stats`, with the sums over `num_images` images.

    Attributes:
        num_broken: images of the part that could not be read.
    """

    stats: str
    part: Part
    num_images: int
    num_broken: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "stats": self.stats,
            "part": self.part.number,
            "parts": self.part.total,
            "num_images": self.num_images,
            "num_broken": self.num_broken,
        }


@dataclass(frozen=True)
class Share:
    """The images of one process.

    Attributes:
        pilot: at most `PILOT_IMAGES`, the same in every process and part.
        judging: images that take no part in the search, and decide between the settings that it found; None if none
            are held out, because there are too few images, or tars, which are read whole.
        own, first, step: the share is the batches `first`, `first + step`, ... of `own`.
        by_file: no batch has images of two tars.
        identity: of the images of all shares; the same on every machine that has a copy of them.
        name: the name of the images of all shares, if the pilot's note does not give their number.
    """

    pilot: ImageSet
    own: ImageSet
    first: int
    step: int
    by_file: bool
    identity: str
    name: str | None = None
    judging: ImageSet | None = None

    @classmethod
    def of(cls, images: ImageSet) -> Share:
        """All of `images`, for one process."""
        source, whole = images.source, len(images.chosen) == len(images.source)
        if whole and isinstance(source, Tars):
            pilot = _first_images(images, source.paths)
            return cls(pilot or images.some(PILOT_IMAGES), images, 0, 1, True, source.identity())
        own, judging = _held_out(images)
        return cls(own.some(PILOT_IMAGES), own, 0, 1, whole, source.identity(), judging=judging)

    @property
    def num_chosen(self) -> int:
        """How many images were chosen for the search of all shares, those held out included."""
        held_out = self.judging.chosen if self.judging and self.judging.source is self.own.source else ()
        return len(self.own.chosen) + len(held_out)

    def num_images(self) -> int:
        """How many images the share has, broken ones included."""
        source = self.own.source
        runs = source.counts() if self.by_file and isinstance(source, Tars) else [len(self.own.chosen)]
        sizes = [min(BATCH, run - start) for run in runs for start in range(0, run, BATCH)]
        return sum(sizes[self.first :: self.step])

    def note(self, num_images: int) -> str:
        """Description of the images of all shares, `num_images` together; as `ImageSet.note` in a single process."""
        return self.own.note if self.name is None else f"{num_images} images of {self.name}"


def share_out(
    where: str | os.PathLike[str] | ImageSet | None,
    num_images: int | None = None,
    *,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    part: Part | None = None,
    processes: Processes | None = None,
) -> Share:
    """The share of one of `processes` in one `part` of the images that `image_set.image_set` would give.

    If there is a tar for every part, each part gets every `part.total`-th tar, and opens others only for the pilot. The
    processes of a part share its tars in the same way. Everything else is divided by batches; tars too, if `num_images`
    images are to be spread over all of them.

    Raises:
        UserError: as for `image_set`.
    """
    part, processes = part or Part(), processes or Processes()
    if where is not None and num_images is None and not isinstance(where, ImageSet):
        kind, paths = dataset_files(Path(where))
        if kind == "tar" and len(paths) >= (part.total if part.total > 1 else processes.count) > 1:
            return _tars(Path(where), paths, say, part, processes)
    images = where if isinstance(where, ImageSet) else image_set(where, num_images, seed=seed, say=say)
    share = Share.of(images)
    first = part.number - 1 + processes.rank * part.total
    return replace(share, first=first, step=part.total * processes.count)


def _held_out(images: ImageSet) -> tuple[ImageSet, ImageSet | None]:
    """Images to search on and others to judge on, if there are enough; for generated pictures there always are."""
    source, total = images.source, images.num_images
    if isinstance(source, Generated):
        count = JUDGING_IMAGES if total >= DEFAULT_GENERATED else total
        others = replace(source, count=count, purpose=JUDGE)
        note = f"{count} other generated pictures"
        return images, replace(images, source=others, chosen=range(count), note=note)
    if total < MIN_DIVIDED or not source.random_access:
        return images, None
    own, judging = images.hold_out(min(JUDGING_IMAGES, total // 3))
    return own, replace(judging, note=f"{judging.num_images} of the {images.note}, held out")


def _tars(where: Path, paths: tuple[Path, ...], say: Callable[[str], None], part: Part, processes: Processes) -> Share:
    name = Path(os.path.abspath(where)).name
    own, first, step = paths[part.number - 1 :: part.total], processes.rank, processes.count
    if len(own) >= step:
        own, first, step = own[first::step], 0, 1
    source = Tars.open(own)
    images = ImageSet(f"{len(own)} of {len(paths)} tars of {name}", source, range(len(source)), say)
    pilot = _first_images(images, paths)
    if pilot is None:
        some = image_set(where).some(PILOT_IMAGES)
        pilot = replace(images, source=some.source, chosen=some.chosen)
    return Share(pilot, images, first, step, True, fingerprint_of(paths, dated=False), name)


def _first_images(images: ImageSet, paths: tuple[Path, ...]) -> ImageSet | None:
    """The first image of each of `PILOT_IMAGES` evenly spread tars, without opening the others; None for fewer tars."""
    if len(paths) < PILOT_IMAGES:
        return None
    source = Tars.firsts(tuple(paths[i * len(paths) // PILOT_IMAGES] for i in range(PILOT_IMAGES)))
    return replace(images, source=source, chosen=range(len(source))) if len(source) == PILOT_IMAGES else None
