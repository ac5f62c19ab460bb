"""Statistics files: the sums of one part of an array job, and their addition.

One safetensors file per part: the tensors of `scores.Sums`, and under `regsurgery` in its metadata what they describe:

    {"schema": 1, "settings": {name: value} that all parts must have in common, "part": I, "parts": N,
     "tried": images of the part, "broken": {name: reason} of those that could not be read}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regsurgery.checkpoints.safetensors_file import read_header
from regsurgery.checkpoints.whole import check_parent, replace_file
from regsurgery.errors import CheckpointError, OutputError, UserError, in_short
from regsurgery.search.scores import Sums
from regsurgery.search.shares import Part

SCHEMA = 1
SHOWN = 12  # numbers of missing parts that an error lists


@dataclass(frozen=True)
class Statistics:
    """The metadata of a statistics file.

    Attributes:
        settings: what all parts must have in common, by names that can appear in errors.
        tried: images of the part, broken ones included.
    """

    settings: dict[str, Any]
    part: Part
    tried: int
    broken: dict[str, str]


def write_statistics(path: Path, statistics: Statistics, sums: Sums) -> None:
    """Write `path`, whole or not at all.

    Raises:
        OutputError: the disk is full or not writable.
    """
    from safetensors.torch import save

    facts = {
        "schema": SCHEMA,
        "settings": statistics.settings,
        "part": statistics.part.number,
        "parts": statistics.part.total,
        "tried": statistics.tried,
        "broken": statistics.broken,
    }
    replace_file(path, save(sums.tensors(), metadata={"regsurgery": json.dumps(facts)}))


def read_statistics(path: Path) -> Statistics:
    """The metadata of the statistics file `path`; its sums are read by `add_statistics`.

    Raises:
        UserError: the file is missing, damaged or something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such statistics file; regsurgery find --part I/N --stats FILE writes them")
    try:
        facts = json.loads(read_header(path).metadata["regsurgery"])
        settings, broken = dict(facts["settings"]), dict(facts["broken"])
        part = Part(int(facts["part"]), int(facts["parts"]))
        statistics = Statistics(settings, part, int(facts["tried"]), broken)
        schema = facts["schema"]
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not a statistics file, or a damaged one ({in_short(error, 200)}); write it again "
            "with regsurgery find --part I/N --stats FILE"
        ) from error
    if schema != SCHEMA:
        raise UserError(
            f"{path}: has schema {str(schema)[:60]}, this regsurgery reads schema {SCHEMA}; make all parts with one "
            "version"
        )
    if not 1 <= part.number <= part.total:
        raise UserError(f"{path}: claims to be part {part.number} of {part.total}; write it again")
    return statistics


def check_statistics_output(path: Path) -> None:
    """Raise `OutputError` if `path` cannot become a statistics file; an earlier one is replaced."""
    check_parent(path)
    if path.exists():
        try:
            read_statistics(path)
        except UserError as error:
            raise OutputError(f"{path}: exists and is not a statistics file; choose another with --stats") from error


def read_parts(paths: Sequence[Path]) -> dict[Path, Statistics]:
    """All parts of one search, in the order of their numbers.

    Raises:
        UserError: a part is missing, given twice, damaged, or belongs to another search than the first.
    """
    found = {path: read_statistics(path) for path in paths}
    if not found:
        raise UserError("--merge: no statistics files; give those of all parts after MODEL")
    first_path, first = next(iter(found.items()))
    holders: dict[int, Path] = {}
    for path in paths:
        other = found[path]
        _check_same(other.settings, first.settings, path, str(first_path))
        if other.part.total != first.part.total:
            raise UserError(
                f"{path}: one of {other.part.total} parts, {first_path} one of {first.part.total}; merge parts of one "
                "division"
            )
        if other.part.number in holders:
            raise UserError(
                f"{path}: is part {other.part.number} of {other.part.total}, like {holders[other.part.number]}; give "
                "every part once"
            )
        holders[other.part.number] = path
    missing = [number for number in range(1, first.part.total + 1) if number not in holders]
    if missing:
        listed = ", ".join(map(str, missing[:SHOWN])) + (", ..." if len(missing) > SHOWN else "")
        raise UserError(
            f"--merge: {len(missing)} of {first.part.total} parts missing: {listed}; make each with regsurgery find "
            f"--part {missing[0]}/{first.part.total} --stats FILE"
        )
    return {holders[number]: found[holders[number]] for number in sorted(holders)}


def add_statistics(parts: dict[Path, Statistics], settings: dict[str, Any], sums: Sums) -> None:
    """Add the sums of all `parts`, which must be of these `settings`, to `sums`.

    Raises:
        UserError: their settings differ, or they are not finite sums of that model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for path, statistics in parts.items():
        _check_same(statistics.settings, settings, path, "this search")
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read ({error}); write it again") from error
        for name, total in sums.tensors().items():
            given = tensors.get(name)
            if given is None or given.shape != total.shape or given.dtype != total.dtype or not given.isfinite().all():
                raise UserError(f"{path}: its sums '{name}' do not fit the model; write it again")
            total += given


def _check_same(settings: dict[str, Any], expected: dict[str, Any], path: Path, other: str) -> None:
    for name in expected:
        if settings.get(name) != expected[name]:
            raise UserError(
                f"{path}: has {name} {str(settings.get(name))[:80]}, but {other} has {str(expected[name])[:80]}; merge "
                "parts of one search, with the same MODEL, images and options"
            )
