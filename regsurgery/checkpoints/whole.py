"""Files and folders that are written completely or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from regsurgery.checkpoints.copying import CopiesAhead, sync
from regsurgery.checkpoints.limits import check_name
from regsurgery.checkpoints.owned import OwnedFolder, remove_abandoned
from regsurgery.errors import OutputError

PARTIAL, SCRATCH = ".partial-", "regsurgery-scratch-"  # in the names of owned folders


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
    try:
        with _partial(path) as own:
            written = own / path.name
            written.write_bytes(content)
            sync(written)
            written.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); choose another file with -o, or make room there"
        ) from error


def remove_left(folder: Path) -> None:
    """Remove what killed runs left half written in `folder`, whatever it was to become, and in TMPDIR.

    Writing a file or folder removes what was left of the same one; this is for those that are not written again.
    """
    remove_abandoned(Path(tempfile.gettempdir()), SCRATCH)
    for name in os.listdir(folder):
        target, mark, _ = name.rpartition(PARTIAL)
        if mark:
            remove_abandoned(folder, f"{target}{mark}")


def temporary_folder() -> OwnedFolder:
    """A folder for temporary files, in TMPDIR; the next run removes what a killed one left there.

    Raises:
        OSError: there is no room for it.
    """
    return OwnedFolder(Path(tempfile.gettempdir()), SCRATCH)


@contextmanager
def scratch_folder() -> Iterator[OwnedFolder]:
    """`temporary_folder`, which stays after the block for as long as it is referenced.

    Raises:
        OutputError: there is no room for it, or for what the block writes there.
    """
    from safetensors import SafetensorError

    try:
        yield temporary_folder()
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"temporary files cannot be written ({getattr(error, 'strerror', None) or error}); free some space, or set "
            "TMPDIR to a folder that has it"
        ) from error


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder next to `target` that becomes `target` if the block succeeds, and is removed if it does not.

    Every file is on disk (fsync) before the single rename, so `target` is either complete or absent. Of two runs that
    write one `target`, the first to end has it.

    Raises:
        OutputError: `target` exists, or the disk is full or not writable.
    """
    check_output(target)
    try:
        with _partial(target) as own:
            folder = own / target.name
            folder.mkdir()
            yield folder
            for path in sorted(folder.rglob("*")):
                sync(path)
            sync(folder)
            folder.rename(target.absolute())
    except OSError as error:
        if target.exists() or target.is_symlink():
            raise OutputError(
                f"{target}: another run has written it meanwhile; choose another folder with -o, or remove it first"
            ) from error
        raise OutputError(
            f"{target}: cannot be written ({error.strerror or error}), and nothing is left behind; choose another "
            "folder with -o, or make room there"
        ) from error
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
    copies = CopiesAhead(partial(_partial, target))
    try:
        yield copies
    finally:
        copies.close()


def _partial(target: Path) -> OwnedFolder:
    """Where this run writes the future `target`: next to it."""
    return OwnedFolder(target.absolute().parent, f".{target.name}{PARTIAL}")
