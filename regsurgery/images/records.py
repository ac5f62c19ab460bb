"""The image column of parquet and arrow files, through the library datasets."""

from __future__ import annotations

import bisect
import glob
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regsurgery.checkpoints.whole import temporary_folder
from regsurgery.errors import UserError
from regsurgery.images.decoding import decode
from regsurgery.images.sources import UNREADABLE, Item, blamed, fingerprint_of
from regsurgery.settings import quiet_datasets

BINARY = ("binary", "large_binary", "binary_view")


@dataclass(frozen=True)
class Records:
    """The image column of parquet or arrow files, streamed by the library datasets.

    It is the first column that holds images by the library's metadata, or whose first record is an image.

    Attributes:
        stream: a `datasets.IterableDataset` whose only column `column` holds undecoded images.
        counts: how many records each file has.
    """

    paths: tuple[Path, ...]
    kind: str
    stream: Any
    column: str
    counts: tuple[int, ...]
    random_access = False

    @classmethod
    def open(cls, paths: tuple[Path, ...], kind: str) -> Records:
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f"{paths[0]}: reading {kind} files needs the library datasets: pip install 'regsurgery[data]'"
            ) from error
        columns, counts = [], []
        for path in paths:
            with blamed(path, kind, *_library_errors()):
                schema, count = _schema_and_count(path, kind)
                found = _image_columns(schema)
            # Only the columns that all files have: a file without images is a mistake.
            columns = [name for name in columns if name in found] if counts else found
            if not columns:
                raise UserError(f"{path}: has no column of images; its columns are {', '.join(schema.names) or 'none'}")
            counts.append(count)
        if not sum(counts):
            raise UserError(f"{paths[0]}: no images in it")
        only: dict[str, Any] = {"columns": columns} if kind == "parquet" else {}
        # The library treats the names as patterns, and even a stream locks a file in its cache.
        with blamed(paths[0], kind, *_library_errors()), temporary_folder() as cache, quiet_datasets():
            stream = datasets.load_dataset(  # nosec B615 # files
                kind,
                data_files=[glob.escape(str(path.absolute())) for path in paths],
                split="train",
                streaming=True,
                cache_dir=str(cache),
                **only,
            )
            assert isinstance(stream, datasets.IterableDataset)
            stream = stream.select_columns(columns)
            for name, feature in (stream.features or {}).items():
                if isinstance(feature, datasets.Image):
                    stream = stream.cast_column(name, datasets.Image(decode=False))
            first = next(iter(stream)) if len(columns) > 1 else {}
        column = next((name for name in columns if name in first and _is_picture(first[name], paths[0])), columns[0])
        return cls(paths, kind, stream.select_columns([column]), column, tuple(counts))

    def __len__(self) -> int:
        return sum(self.counts)

    def items(self, chosen: range | tuple[int, ...]) -> Iterator[Item]:
        starts = [0, *itertools.accumulate(self.counts)]
        rows = enumerate(self.stream)
        for number in chosen:
            file = bisect.bisect_right(starts, number) - 1
            path = self.paths[file]
            with blamed(path, self.kind, *_library_errors()):
                value = next((row[self.column] for index, row in rows if index == number), None)
            yield f"{path}: record {number - starts[file]}", _content(value, path)

    def fingerprint(self) -> str:
        return fingerprint_of(self.paths)

    def identity(self) -> str:
        return fingerprint_of(self.paths, dated=False)


def _library_errors() -> tuple[type[Exception], ...]:
    import datasets.exceptions
    import pyarrow

    return pyarrow.ArrowException, datasets.exceptions.DatasetsError


def _schema_and_count(path: Path, kind: str) -> tuple[Any, int]:
    """Arrow schema of a dataset file and how many records it has, without reading their images."""
    import pyarrow
    import pyarrow.parquet

    if kind == "parquet":
        with path.open("rb") as file, pyarrow.parquet.ParquetFile(file) as table:
            return table.schema_arrow, table.metadata.num_rows
    with pyarrow.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":  # the file format; `Dataset.save_to_disk` writes the stream format
            reader = pyarrow.ipc.open_file(file)
            return reader.schema, sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
        file.seek(0)
        with pyarrow.ipc.open_stream(file) as stream:
            return stream.schema, sum(batch.num_rows for batch in stream)


def _image_columns(schema: Any) -> list[str]:
    """Columns that are images by the metadata of the library datasets; without metadata, all that hold bytes."""
    import datasets

    features = datasets.Features.from_arrow_schema(schema)
    named = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    structs = {
        name: feature.get("bytes") if isinstance(feature, dict) else feature for name, feature in features.items()
    }
    return named or [name for name, feature in structs.items() if getattr(feature, "dtype", None) in BINARY]


def _content(value: Any, path: Path) -> Path | bytes:
    """What a record of the file `path` holds; empty bytes if it holds nothing."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return path.parent / value["path"]
        value = value.get("bytes")
    return value or b""


def _is_picture(value: Any, path: Path) -> bool:
    try:
        decode(_content(value, path))
    except UNREADABLE:
        return False
    return True
