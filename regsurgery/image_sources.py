"""Where images come from: undecoded items of a folder of pictures, of dataset files, or of a random generator.

An **item** is small, picklable and not yet decoded, so that it can be handed to a worker process: `(name, content)`,
where the content is a path, the bytes of an image file, or the seed of a generated picture.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from regsurgery.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}  # of the library datasets
GENERATED_SIZE = 256
UNREADABLE = (OSError, SyntaxError, ValueError)  # what Pillow raises on broken files

Item = tuple[str, Path | bytes | str]


class Source(Protocol):
    """Images by number, in an order that stays the same.

    Attributes:
        random_access: whether any image is as cheap as the first.
    """

    random_access: bool

    def __len__(self) -> int: ...

    def items(self, chosen: range | tuple[int, ...]) -> Iterator[Item]:
        """The items of those numbers, which ascend."""
        ...

    def fingerprint(self) -> str:
        """Hex digest of what the images are, as far as names, sizes and dates tell."""
        ...


def open_source(where: Path) -> Source:
    """The source in a folder (recursively) or file.

    Raises:
        UserError: nothing there that holds images; the message says what was looked for.
    """
    if not where.exists():
        raise UserError(f"{where}: no such folder of images")
    files = sorted(path for path in where.rglob("*") if path.is_file()) if where.is_dir() else [where]
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    if pictures:
        return Pictures(tuple(pictures))
    for suffix, builder in BUILDERS.items():
        found = [path for path in files if path.suffix.lower() == suffix]
        if found:
            return Records.open(tuple(found), builder)
    looked_for = ", ".join(sorted(SUFFIXES) + list(BUILDERS))
    raise UserError(f"{where}: no images in it (looked for {looked_for})")


def decode(content: Path | bytes | str) -> Image:
    """The picture of an item, RGB.

    Raises:
        OSError, SyntaxError, ValueError: not a readable image.
    """
    import PIL.Image

    if isinstance(content, str):
        return dead_leaves(random.Random(content))
    with PIL.Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
        return image.convert("RGB")


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
        return _fingerprint(self.paths)


@dataclass(frozen=True)
class Generated:
    """`count` dead-leaves pictures."""

    count: int
    seed: int
    random_access = True

    def __len__(self) -> int:
        return self.count

    def items(self, chosen: range | tuple[int, ...]) -> Iterator[Item]:
        for index in chosen:
            yield f"dead-leaves picture {index}", f"{self.seed}/{index}"

    def fingerprint(self) -> str:
        return f"dead leaves {self.count} {self.seed}"


@dataclass(frozen=True)
class Records:
    """The image column of parquet, arrow or WebDataset tar files, streamed by the library datasets.

    Attributes:
        stream: a `datasets.IterableDataset` whose only column `column` holds undecoded images.
    """

    paths: tuple[Path, ...]
    stream: Any
    column: str
    count: int
    random_access = False

    @classmethod
    def open(cls, paths: tuple[Path, ...], builder: str) -> Records:
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f"{paths[0]}: reading {builder} files needs the library datasets: pip install 'regsurgery[data]'"
            ) from error
        datasets.disable_progress_bars()
        try:
            stream = datasets.load_dataset(builder, data_files=[str(p) for p in paths], split="train", streaming=True)
            assert isinstance(stream, datasets.IterableDataset)
            first = next(iter(stream.decode(False) if stream.features else stream))
            column = _image_column(stream.features or datasets.Features(), first)
            if column is None:
                raise UserError(f"{paths[0]}: no column of images in it; it has {', '.join(sorted(first))}")
            stream = stream.select_columns([column])
            if isinstance((stream.features or {}).get(column), datasets.Image):
                stream = stream.cast_column(column, datasets.Image(decode=False))
            return cls(paths, stream, column, sum(_count(path) for path in paths))
        except StopIteration as error:
            raise UserError(f"{paths[0]}: no images in it") from error
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(
                f"{paths[0]}: cannot be read as {builder}: {' '.join(str(error).split())[:200]}"
            ) from error

    def __len__(self) -> int:
        return self.count

    def items(self, chosen: range | tuple[int, ...]) -> Iterator[Item]:
        wanted, last = set(chosen), max(chosen, default=-1)
        for index, row in enumerate(self.stream):
            if index in wanted:
                yield f"image {index} of {self.paths[0].parent.name}", _content(row[self.column])
            if index >= last:
                return

    def fingerprint(self) -> str:
        return _fingerprint(self.paths)


def _image_column(features: Any, row: dict[str, Any]) -> str | None:
    import datasets

    named = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    plain = [name for name, value in row.items() if isinstance(value, bytes) or _is_image_struct(value)]
    return next(iter(named or plain), None)


def _is_image_struct(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("bytes"), bytes)


def _content(value: Any) -> Path | bytes:
    if isinstance(value, dict):
        return value["bytes"] if value.get("bytes") is not None else Path(value["path"])
    return value if isinstance(value, bytes) else b""


def _count(path: Path) -> int:
    """How many records a dataset file has, without reading their images."""
    import tarfile

    if path.suffix.lower() == ".tar":
        with tarfile.open(path) as tar:
            return sum(Path(name).suffix.lower() in SUFFIXES for name in tar.getnames())
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(path).metadata.num_rows
    import datasets

    return datasets.Dataset.from_file(str(path)).num_rows


def _fingerprint(paths: tuple[Path, ...]) -> str:
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
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
