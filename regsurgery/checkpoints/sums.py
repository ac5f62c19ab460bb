"""SHA256SUMS: written, read, checked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from regsurgery.checkpoints.limits import MAX_JSON_BYTES, places_of
from regsurgery.errors import CheckpointError


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_each(paths: Sequence[Path]) -> tuple[str, ...]:
    """The sha256 of each file, hashing as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return tuple(pool.map(sha256, paths))


def combined_digest(digests: Sequence[str]) -> str:
    """The sha256 that stands for several files, made of theirs in order; of one file its own."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


SUMS_NAME = "SHA256SUMS"


def write_sums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write SHA256SUMS over every other file of `folder`, in the form that `sha256sum -c` reads.

    Args:
        known: name -> sha256 of files that were copied whole, which need not be read again.
    """
    known = known or {}
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != SUMS_NAME)
    new = [name for name in names if name not in known]
    digests = {**known, **dict(zip(new, sha256_each([folder / name for name in new]), strict=True))}
    (folder / SUMS_NAME).write_text("".join(f"{digests[name]}  {name}\n" for name in names), "utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """Name -> sha256, of every file that SHA256SUMS lists.

    Raises:
        CheckpointError: SHA256SUMS is missing, or it names files outside the folder.
    """
    sums = folder / SUMS_NAME
    if not sums.is_file():
        raise CheckpointError(
            f"{folder}: has no {SUMS_NAME}, so it is not a complete patched folder; give one that regsurgery patch "
            "wrote"
        )
    try:
        with sums.open("rb") as file:
            digests = digests_of(file.read(MAX_JSON_BYTES).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{sums}: not a text file; patch the model again") from error
    for name in digests:
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise CheckpointError(f"{sums}: names {name[:300]!r}, which is not inside the folder")
    return digests


def digests_of(text: str) -> dict[str, str]:
    """Name -> sha256, of every line of a SHA256SUMS."""
    return {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}


def check_sums(folder: Path, remedy: str = "patch the model again") -> dict[Path, str]:
    """File -> sha256, of every file that SHA256SUMS lists.

    Raises:
        CheckpointError: the first of them that is missing or changed.
    """
    allowed, listed = places_of(folder), read_sums(folder)
    paths = [_listed(folder, name, allowed, remedy) for name in listed]
    digests = dict(zip(paths, listed.values(), strict=True))
    for path, found in zip(paths, sha256_each(paths), strict=True):
        if found != digests[path]:
            raise CheckpointError(f"{path}: differs from {SUMS_NAME}; {remedy}")
    return digests


def _listed(folder: Path, name: str, allowed: Sequence[Path], remedy: str) -> Path:
    """The file `name` of `folder`, which SHA256SUMS lists."""
    path = folder / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder / name[:300]}: listed in {SUMS_NAME} but missing; {remedy}") from error
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{folder / SUMS_NAME}: names {name[:300]!r}, which is not inside the folder")
    if not real.is_file():
        raise CheckpointError(f"{path}: listed in {SUMS_NAME} but missing; {remedy}")
    return path
