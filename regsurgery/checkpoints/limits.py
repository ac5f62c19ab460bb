"""What a checkpoint folder may hold: files are refused before they are read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from regsurgery.errors import CheckpointError, UserError

# What libraries raise on broken configs and weights, in addition to their own exceptions.
BROKEN = (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError,
          AssertionError, MemoryError, NameError, StopIteration, EOFError, struct.error)  # fmt: skip

MAX_NAME_BYTES = 255
MAX_JSON_BYTES = 16 << 20  # the labels of ImageNet-21k with their descriptions are 3 MB


def read_json(path: Path, remedy: str = "correct it, or get the file again") -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is not a JSON object, is nested too deeply, or is larger than `MAX_JSON_BYTES`.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: has {size} bytes, more than the limit of {MAX_JSON_BYTES}; {remedy}")
    try:
        data = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); {remedy}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a JSON object; {remedy}")
    return data


def places_of(folder: Path) -> tuple[Path, ...]:
    """Where files of `folder` may be: below it, or, for a snapshot in the Hub's cache, in `blobs` of its repository."""
    home = folder.resolve()
    snapshot = next((place for place in (home, *home.parents) if place.parent.name == "snapshots"), None)
    return (home,) if snapshot is None else (home, snapshot.parent.parent / "blobs")


def check_name(path: Path) -> None:
    """Raise `UserError` for a path that is not UTF-8: safetensors, SHA256SUMS and JSON cannot hold it."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path}: not UTF-8, which weights and checksums need; give it another name") from error


def name_too_long(path: Path) -> int | None:
    """The bytes of the longest name in `path`, if files and repositories cannot have one that long."""
    longest = max((len(part.encode(errors="replace")) for part in path.parts), default=0)
    return longest if longest > MAX_NAME_BYTES else None


def refuse_links_out(folder: Path) -> None:
    """Raise `CheckpointError` for a symbolic link out of `folder`, whose target would be copied along, and `UserError`
    for a file whose name is not UTF-8, or does not print: a line feed in it would end its line of SHA256SUMS.

    The Hub's cache is the exception, see `places_of`.
    """
    allowed = places_of(folder)
    check_name(folder)
    for path in sorted(folder.iterdir()):
        check_name(path)
        if not path.name.isprintable():
            raise UserError(f"{path}: its name has characters that do not print; give the file another name")
        if not path.is_symlink():
            continue
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: a broken symbolic link; get the file again, or remove the link") from error
        if not any(real.is_relative_to(parent) for parent in allowed):
            raise CheckpointError(
                f"{path}: a symbolic link to {real}, outside the folder; replace it with a copy if it belongs here"
            )
