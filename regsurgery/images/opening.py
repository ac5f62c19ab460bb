"""A path -> the source of the images in it: pictures, tars, or records of a dataset."""

from __future__ import annotations

from pathlib import Path

from regsurgery.errors import UserError
from regsurgery.images.sources import SUFFIXES, ImageSource, Pictures

KINDS = dict.fromkeys(SUFFIXES, "pictures") | {".parquet": "parquet", ".arrow": "arrow", ".tar": "tar"}


def dataset_files(where: Path) -> tuple[str, tuple[Path, ...]]:
    """The kind of a file, or of the files in a folder (recursively, without hidden files), and the files, by name.

    If there are several kinds, the one with the most bytes counts: folders of pictures may hold a table of labels, and
    datasets a thumbnail.

    Raises:
        UserError: nothing there holds images; the message says what was looked for.
    """
    if not where.exists():
        raise UserError(
            f"{where}: no such folder of images; check the spelling, or leave out --images to use generated ones"
        )
    kinds: dict[str, list[Path]] = {}
    for path in sorted(filter(_is_shown_file, where.rglob("*"))) if where.is_dir() else [where]:
        if kind := KINDS.get(path.suffix.lower()):
            kinds.setdefault(kind, []).append(path)
    if not kinds:
        raise UserError(f"{where}: no images in it (looked for {', '.join(KINDS)})")
    kind = max(kinds, key=lambda kind: sum(path.stat().st_size for path in kinds[kind]))
    return kind, tuple(kinds[kind])


def open_source(where: Path) -> ImageSource:
    """The source in the `dataset_files` of `where`.

    Raises:
        UserError: nothing there holds images, or a dataset file is broken; the message says what was looked for.
    """
    kind, paths = dataset_files(where)
    if kind == "pictures":
        return Pictures(paths)
    if kind == "tar":
        from regsurgery.images.tars import Tars

        return Tars.open(paths)
    from regsurgery.images.records import Records

    return Records.open(paths, kind)


def _is_shown_file(path: Path) -> bool:
    cached = path.suffix == ".arrow" and path.name.startswith("cache-")  # what the library datasets leaves next to data
    return path.is_file() and not path.name.startswith(".") and not cached
