"""Files and folders that are written completely or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from regsurgery.checkpoints.copying import CopiesAhead, sync
from regsurgery.checkpoints.limits import check_name
from regsurgery.errors import OutputError


def check_output(target: Path) -> None:
    """Raise `OutputError` if `target` cannot become a new folder."""
    if target.exists() or target.is_symlink():
        raise OutputError(f"{target}: already exists; choose another folder with -o, or remove it first")
    check_parent(target)


def check_parent(target: Path) -> None:
    """Raise `OutputError` if nothing can be written next to `target`, or `UserError` for a name that is not UTF-8."""
    check_name(target)
    parent = target.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"{parent}: no such folder to write {target.name} into; create it first")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{parent}: not writable; choose another folder with -o")


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` completely or not at all; an existing file is replaced.

    Raises:
        OutputError: the disk is full or not writable.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        sync(partial)
        partial.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); choose another file with -o, or make room there"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def scratch_folder() -> Iterator[tempfile.TemporaryDirectory[str]]:
    """A folder for temporary files, which stays after the block for as long as it is referenced.

    Raises:
        OutputError: there is no room for it, or for what the block writes there.
    """
    from safetensors import SafetensorError

    try:
        yield tempfile.TemporaryDirectory(prefix="regsurgery-")
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"temporary files cannot be written ({getattr(error, 'strerror', None) or error}); free some space, or set "
            "TMPDIR to a folder that has it"
        ) from error


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder next to `target` that becomes `target` if the block succeeds, and is removed if it does not.

    Every file is on disk (fsync) before the single rename, so `target` is either complete or absent.

    Raises:
        OutputError: `target` exists, or the disk is full or not writable.
    """
    check_output(target)
    _remove_abandoned(target)
    partial = _partial(target)
    try:
        partial.mkdir()
        yield partial
        for path in sorted(partial.rglob("*")):
            sync(path)
        sync(partial)
        partial.rename(target.absolute())
    except OSError as error:
        raise OutputError(
            f"{target}: cannot be written ({error.strerror or error}), and nothing is left behind; choose another "
            "folder with -o, or make room there"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        sync(target.absolute().parent)
    except OSError as error:
        raise OutputError(
            f"{target}: written completely, but the disk did not confirm it ({error.strerror or error}); "
            "check it with sha256sum -c SHA256SUMS"
        ) from error


@contextmanager
def copies_ahead(target: Path) -> Iterator[CopiesAhead]:
    """Copies for the folder `target`, made during the block; those that are not placed are removed at its end."""
    _remove_abandoned(target)
    copies = CopiesAhead(_partial(target, "-copies"))
    try:
        yield copies
    finally:
        copies.close()


def _partial(target: Path, what: str = "") -> Path:
    """Where this process writes the future `target`."""
    return target.absolute().parent / f".{target.name}.partial{what}-{os.getpid()}"


def _remove_abandoned(target: Path) -> None:
    """Remove what killed processes left next to `target`; files of a running process are kept."""
    import psutil

    for partial in target.absolute().parent.glob(f".{glob.escape(target.name)}.partial-*"):
        process = partial.name.rpartition("-")[2]
        if not process.isdecimal() or not psutil.pid_exists(int(process)):
            shutil.rmtree(partial, ignore_errors=True)
