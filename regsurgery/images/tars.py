"""Images in WebDataset tars, by number."""

from __future__ import annotations

import itertools
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from regsurgery.images.sources import SUFFIXES, Item, Stretch, blamed, fingerprint_of


class Members:
    """Images in tars: the name and place of each in 40 bytes, as there may be millions."""

    def __init__(self, paths: tuple[Path, ...], most: int | None = None) -> None:
        """Look them up in `paths`; in each tar only the first `most`."""
        self.paths = paths
        self.starts = array("q", [0])  # the number of each tar's first image, then the total
        self._offsets, self._sizes = array("q"), array("q")
        self._names, self._name_ends = bytearray(), array("q", [0])
        for path in paths:
            for name, stretch in itertools.islice(_images_of_tar(path), most):
                self._offsets.append(stretch.offset)
                self._sizes.append(stretch.size)
                self._names += name.encode("utf-8", "surrogateescape")
                self._name_ends.append(len(self._names))
            self.starts.append(len(self._offsets))

    def __len__(self) -> int:
        return len(self._offsets)

    def name(self, number: int) -> str:
        start, end = self._name_ends[number : number + 2]
        return self._names[start:end].decode("utf-8", "surrogateescape")

    def stretch(self, number: int, path: Path) -> Stretch:
        return Stretch(path, self._offsets[number], self._sizes[number])


@dataclass(frozen=True)
class Tars:
    """The first image of every sample of WebDataset tars; a sample is a run of members named alike up to the first dot.

    Not read through the library datasets: it would decode the other members too, and refuse a tar because of them.
    """

    paths: tuple[Path, ...]
    members: Members
    random_access = True

    @classmethod
    def open(cls, paths: tuple[Path, ...]) -> Tars:
        return cls(paths, Members(paths))

    @classmethod
    def firsts(cls, paths: tuple[Path, ...]) -> Tars:
        """The first image of each tar that has one; no tar is read further."""
        return cls(paths, Members(paths, 1))

    def __len__(self) -> int:
        return len(self.members)

    def counts(self) -> list[int]:
        """How many images each tar has."""
        return [end - start for start, end in itertools.pairwise(self.members.starts)]

    def items(self, chosen: range | tuple[int, ...]) -> Iterator[Item]:
        tar = 0
        for number in chosen:  # they ascend
            while number >= self.members.starts[tar + 1]:
                tar += 1
            path = self.paths[tar]
            yield f"{path}: {self.members.name(number)}", self.members.stretch(number, path)

    def fingerprint(self) -> str:
        return fingerprint_of(self.paths)

    def identity(self) -> str:
        return fingerprint_of(self.paths, dated=False)


def _images_of_tar(path: Path) -> Iterator[tuple[str, Stretch]]:
    current, has_image = None, False
    with blamed(path, "tar", tarfile.TarError), tarfile.open(path, "r:") as tar:
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps them for a second look
            name = PurePosixPath(member.name)
            sample = name.parent / name.name.partition(".")[0]
            if sample != current:
                current, has_image = sample, False
            is_image = member.isreg() and name.suffix.lower() in SUFFIXES and not name.name.startswith(".")
            if is_image and not has_image:
                has_image = True
                yield member.name, Stretch(path, member.offset_data, member.size)
        # A header that makes no sense ends a tar for tarfile, as an empty block does.
        with path.open("rb") as file:
            file.seek(tar.offset)
            if any(file.read(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError(f"damaged or cut off at byte {tar.offset}")
