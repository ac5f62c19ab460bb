"""Files copied inside the kernel, and copies made in the background."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from regsurgery.checkpoints.owned import OwnedFolder
from regsurgery.errors import CheckpointError

CHUNK_BYTES = 1 << 22
COPY_BYTES = 1 << 28  # at a time inside the kernel
FICLONE = 0x40049409  # ioctl of Linux: share the blocks of another file
CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP}
CANNOT_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EBADF}


def copy_file(source: Path, target: Path, *, link: bool = False, wanted: Callable[[], bool] = lambda: True) -> None:
    """Copy a file's bytes inside the kernel, by sharing blocks if the file system can.

    Args:
        link: make a hard link instead, if source and target are on one file system; writing into one of the two files
            then also changes the other.
        wanted: see `copy_bytes`.
    """
    source = source.resolve()  # the files of a Hub snapshot are symbolic links
    if link:
        try:
            os.link(source, target)
            return
        except OSError as error:
            if error.errno not in CANNOT_LINK:
                raise
    with source.open("rb", buffering=0) as reader, target.open("wb") as writer:
        try:
            fcntl.ioctl(writer, FICLONE, reader.fileno())
        except OSError:  # most file systems cannot do it
            copy_bytes(reader, writer, source.stat().st_size, wanted)


def copy_bytes(reader: FileIO, writer: BinaryIO, num_bytes: int, wanted: Callable[[], bool] = lambda: True) -> None:
    """Copy the next `num_bytes` of `reader`, which is unbuffered, to `writer`, inside the kernel if possible.

    Args:
        wanted: whether the copy is still wanted; asked before every part of it, and it ends where it is not.

    Raises:
        CheckpointError: `reader` ends early.
    """
    writer.flush()
    left = num_bytes
    while left and wanted() and hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(reader.fileno(), writer.fileno(), min(left, COPY_BYTES))
        except OSError as error:
            if error.errno not in CANNOT_COPY or left < num_bytes:
                raise
            break
        if not copied:
            raise CheckpointError(f"{reader.name}: became shorter while it was copied; patch it again")
        left -= copied
    while left and wanted():
        chunk = reader.read(min(left, CHUNK_BYTES))
        if not chunk:
            raise CheckpointError(f"{reader.name}: became shorter while it was copied; patch it again")
        writer.write(chunk)
        left -= len(chunk)


class CopiesAhead:
    """Copies made in the background, in a folder next to the one they are for.

    Args:
        make_folder: is called for that folder when the first copy starts.
    """

    def __init__(self, make_folder: Callable[[], OwnedFolder]) -> None:
        self._make_folder = make_folder
        self._folder: OwnedFolder | None = None
        self._pool = ThreadPoolExecutor(2)  # one copies while the other waits for the disk
        self._is_wanted = True
        self._copies: dict[Path, tuple[Path, Future[None]]] = {}

    def start(self, sources: Sequence[Path]) -> None:
        """Start copying `sources`, files with different names; an error of the disk shows up again in `place`."""
        try:
            self._folder = self._folder or self._make_folder()
        except OSError:
            return
        for source in sources:
            copy = self._folder.path / source.name
            self._copies[source] = copy, self._pool.submit(self._copy_to_disk, source, copy)

    def place(self, source: Path, target: Path) -> None:
        """Make `target` a copy of `source`: the one already started, if there is one.

        Raises:
            OSError: it could not be written.
        """
        if source not in self._copies:
            copy_file(source, target)
            return
        copy, copied = self._copies.pop(source)
        copied.result()
        copy.rename(target)

    def close(self) -> None:
        """Stop, and remove what was not placed."""
        self._is_wanted = False
        self._pool.shutdown(cancel_futures=True)
        if self._folder is not None:
            self._folder.remove()

    def _copy_to_disk(self, source: Path, target: Path) -> None:
        copy_file(source, target, wanted=lambda: self._is_wanted)
        if self._is_wanted:
            sync(target)


def sync(path: Path) -> None:
    """Wait until a file or the entries of a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
