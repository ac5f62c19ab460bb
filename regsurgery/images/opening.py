"""A path -> the source of the images in it: pictures, tars, or records of a dataset."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from regsurgery.errors import UserError
from regsurgery.images.sources import SUFFIXES, UNREADABLE, ImageSource, Pictures

KINDS = dict.fromkeys(SUFFIXES, "pictures") | {".parquet": "parquet", ".arrow": "arrow", ".tar": "tar"}


def dataset_files(where: Path) -> tuple[str, tuple[Path, ...]]:
    """The kind of a file, or of the files in a folder (see `_shown_files`), and the files, by name.

    If there are several kinds, the one with the most bytes counts: folders of pictures may hold a table of labels, and
    datasets a thumbnail. Files without a suffix are pictures if they begin as one; those with an unknown suffix if
    nothing else is there.

    Raises:
        UserError: nothing there holds images; the message says what was looked for.
    """
    if not where.exists():
        raise UserError(
            f"{where}: no such folder of images; check the spelling, or leave out --images to use generated ones"
        )
    kinds: dict[str, list[Path]] = {}
    others: list[Path] = []
    for path in sorted(_shown_files(where)) if where.is_dir() else [where]:
        if kind := KINDS.get(path.suffix.lower()):
            kinds.setdefault(kind, []).append(path)
        else:
            others.append(path)
    by_content = [path for path in others if not (path.suffix and kinds) and _begins_as_picture(path)]
    if by_content:
        kinds["pictures"] = sorted(kinds.get("pictures", []) + by_content)
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


def _shown_files(folder: Path) -> Iterator[Path]:
    """The files below `folder`, without hidden files and folders; links are followed, into each folder once."""
    entered = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        stat = os.stat(place)
        if (stat.st_dev, stat.st_ino) in entered:
            folders.clear()
            continue
        entered.add((stat.st_dev, stat.st_ino))
        for name in files:
            # What the library datasets leaves next to data.
            cached = name.startswith("cache-") and name.endswith(".arrow")
            path = Path(place, name)
            if not name.startswith(".") and not cached and path.is_file():
                yield path


def _begins_as_picture(path: Path) -> bool:
    from regsurgery.images.decoding import opened

    try:
        with opened(path):
            return True
    except UNREADABLE:
        return False
