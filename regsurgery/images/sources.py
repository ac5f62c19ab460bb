"""Where images come from: undecoded items of a folder of pictures, of dataset files, or of a random generator.

An **item** is small, picklable and not yet decoded, so it can be handed to a worker process: `(name, content)`. The
content is a path, a stretch of a tar, the bytes of an image file, or the seed of a generated picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from regsurgery.errors import UserError, in_short

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tga", ".tif", ".tiff", ".webp"),
)
MAX_PICTURE_BYTES = 256 << 20
UNREADABLE = (OSError, SyntaxError, ValueError)  # what `decode` raises on broken files


@dataclass(frozen=True)
class Stretch:
    """`size` bytes of a file, from `offset` on."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes.

        Raises:
            OSError: the file cannot be read.
            ValueError: there are more than any picture has; a tar may claim what it likes.
        """
        if self.size > MAX_PICTURE_BYTES:
            raise ValueError(f"has {self.size} bytes, more than a picture takes")
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


Content = Path | Stretch | bytes | str
Item = tuple[str, Content]


class ImageSource(Protocol):
    """Images by number, in a fixed order.

    Attributes:
        random_access: whether any image is as cheap as the first.
    """

    random_access: bool

    def __len__(self) -> int: ...

    def items(self, chosen: range | tuple[int, ...]) -> Iterator[Item]:
        """The items with the numbers `chosen`, which ascend.

        Raises:
            UserError: a dataset file turns out to be broken.
        """
        ...

    def fingerprint(self) -> str:
        """Identifies the images by names, sizes and dates."""
        ...

    def identity(self) -> str:
        """Like `fingerprint`, without dates: the same on every machine that has a copy."""
        ...


@dataclass(frozen=True)
class Pictures:
    """Image files."""

    paths: tuple[Path, ...]
    random_access = True

    def __len__(self) -> int:
        return len(self.paths)

    def items(self, chosen: range | tuple[int, ...]) -> Iterator[Item]:
        for index in chosen:
            yield str(self.paths[index]), self.paths[index]

    def fingerprint(self) -> str:
        return fingerprint_of(self.paths)

    def identity(self) -> str:
        return fingerprint_of(self.paths, dated=False)


@contextmanager
def blamed(path: Path, kind: str, *errors: type[Exception]) -> Iterator[None]:
    """`errors`, and general reading errors, become a `UserError` that names the file."""
    try:
        yield
    except (OSError, ValueError, *errors) as error:
        raise UserError(f"{path}: cannot be read as {kind}: {in_short(error, 200)}") from error


def changed(name: str, error: OSError) -> UserError:
    """The error for an image that was there, and cannot be read any more."""
    return UserError(f"{name}: the images changed while they were used ({error.strerror or error})")


def fingerprint_of(paths: tuple[Path, ...], *, dated: bool = True) -> str:
    """Identifies files by names, sizes and, if `dated`, dates.

    Raises:
        UserError: one is not there any more.
    """
    try:
        stats = [path.stat() for path in paths]
    except OSError as error:
        raise changed(error.filename, error) from error
    facts = [
        (path.name, stat.st_size, stat.st_mtime_ns) if dated else (path.name, stat.st_size)
        for path, stat in zip(paths, stats, strict=True)
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()
