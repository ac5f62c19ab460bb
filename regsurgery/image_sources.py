"""Where images come from: undecoded items of a folder of pictures, of dataset files, or of a random generator.

An **item** is small, picklable and not yet decoded, so that it can be handed to a worker process: `(name, content)`,
where the content is a path, a stretch of a tar, the bytes of an image file, or the seed of a generated picture.
"""

from __future__ import annotations

import hashlib
import io
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from regsurgery.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
KINDS = dict.fromkeys(SUFFIXES, "pictures") | {".parquet": "parquet", ".arrow": "arrow", ".tar": "tar"}
GENERATED_SIZE = 256
UNREADABLE = (OSError, SyntaxError, ValueError)  # what `decode` raises on broken files


@dataclass(frozen=True)
class Stretch:
    """`size` bytes of a file, from `offset` on."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


Content = Path | Stretch | bytes | str
Item = tuple[str, Content]


class Source(Protocol):
    """Images by number, in an order that stays the same.

    Attributes:
        random_access: whether any image is as cheap as the first.
    """

    random_access: bool

    def __len__(self) -> int: ...

    def items(self, chosen: range | tuple[int, ...]) -> Iterator[Item]:
        """The items of those numbers, which ascend.

        Raises:
            UserError: a dataset file turns out to be broken.
        """
        ...

    def fingerprint(self) -> str:
        """What the images are, as far as names, sizes and dates tell."""
        ...

    def identity(self) -> str:
        """As `fingerprint`, without dates: the same on every machine that has a copy."""
        ...


def dataset_files(where: Path) -> tuple[str, tuple[Path, ...]]:
    """The kind of the files in a file or in a folder (recursively, without hidden files), and the files, by name.

    Of several kinds of files the one with the most bytes counts: pictures have their table of labels beside them, and
    datasets have a thumbnail.

    Raises:
        UserError: nothing there that holds images, and what was looked for.
    """
    if not where.exists():
        raise UserError(
            f"{where}: no such folder of images; check the spelling, or leave --images out for generated ones"
        )
    kinds: dict[str, list[Path]] = {}
    for path in sorted(filter(_is_shown_file, where.rglob("*"))) if where.is_dir() else [where]:
        if kind := KINDS.get(path.suffix.lower()):
            kinds.setdefault(kind, []).append(path)
    if not kinds:
        raise UserError(f"{where}: no images in it (looked for {', '.join(KINDS)})")
    kind = max(kinds, key=lambda kind: sum(path.stat().st_size for path in kinds[kind]))
    return kind, tuple(kinds[kind])


def open_source(where: Path) -> Source:
    """The source in the `dataset_files` of `where`.

    Raises:
        UserError: nothing there that holds images, and what was looked for; or a broken dataset file.
    """
    kind, paths = dataset_files(where)
    if kind == "pictures":
        return Pictures(paths)
    if kind == "tar":
        from regsurgery.image_tars import Tars

        return Tars.open(paths)
    from regsurgery.image_records import Records

    return Records.open(paths, kind)


def _is_shown_file(path: Path) -> bool:
    cached = path.suffix == ".arrow" and path.name.startswith("cache-")  # what the library datasets leaves beside data
    return path.is_file() and not path.name.startswith(".") and not cached


def decode(content: Content) -> Image:
    """The picture of an item, RGB.

    Raises:
        OSError, SyntaxError, ValueError: not a readable image.
    """
    import PIL.Image

    if isinstance(content, str):
        return (noise_texture if content.startswith(NOISE) else dead_leaves)(random.Random(content))
    if isinstance(content, Stretch):
        content = content.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged metadata, in files that can be read
        try:
            with PIL.Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
                if image.mode.startswith("I;16"):  # `convert` would clip to 255, which leaves them white
                    return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
                return image.convert("RGB")
        except PIL.UnidentifiedImageError as error:
            raise ValueError("in no image format that Pillow knows" if content != b"" else "empty") from error
        except PIL.Image.DecompressionBombError as error:
            raise ValueError(str(error)) from error


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


NOISE = "noise "  # the seeds of noise pictures begin so


@dataclass(frozen=True)
class Generated:
    """`count` dead-leaves pictures, or noise pictures; those of another `purpose` are others."""

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


@contextmanager
def blamed(path: Path, kind: str, *errors: type[Exception]) -> Iterator[None]:
    """`errors`, and those of reading at large, become a `UserError` that names the file."""
    try:
        yield
    except (OSError, ValueError, *errors) as error:
        raise UserError(f"{path}: cannot be read as {kind}: {' '.join(str(error).split())[:200]}") from error


def fingerprint_of(paths: tuple[Path, ...], *, dated: bool = True) -> str:
    stats = [path.stat() for path in paths]
    facts = [
        (path.name, stat.st_size, stat.st_mtime_ns) if dated else (path.name, stat.st_size)
        for path, stat in zip(paths, stats, strict=True)
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


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

    It has no edges and no objects, and so shares little with `dead_leaves` but that. Deterministic in `rng`.
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
