"""`regsurgery_run.json`: how a patched folder came about, and what its verification said; SHA256SUMS covers it.

{"schema": 1, "regsurgery": VERSION, "run": {what `patch` was asked for}, "verify": null or the verdict}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery import __version__
from regsurgery.errors import CheckpointError
from regsurgery.limits import read_json

if TYPE_CHECKING:
    from regsurgery.verification import Verdict

RUN_RECORD_NAME = "regsurgery_run.json"
SCHEMA = 1
DIGITS = 6  # significant ones: the last bits of a mean are not the same on every machine


def write_run_record(folder: Path, run: dict[str, Any], verdict: Verdict | None) -> None:
    """Write the record of `folder`; the same arguments give the same bytes."""
    record = {
        "schema": SCHEMA,
        "regsurgery": __version__,
        "run": run,
        "verify": None if verdict is None else verdict.as_dict(),
    }
    text = json.dumps(_rounded(record), indent=2, sort_keys=True, ensure_ascii=False)
    (folder / RUN_RECORD_NAME).write_text(text + "\n", "utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {str(key): _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return value


def read_run_record(folder: Path) -> dict[str, Any]:
    """The record of a patched folder.

    Raises:
        CheckpointError: there is none, or it is not one that this regsurgery can read.
    """
    path = folder / RUN_RECORD_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{path}: missing; an earlier regsurgery wrote this folder, or a library saved it anew: patch the model "
            "again"
        )
    record = read_json(path, "patch the model again")
    if record.get("schema") != SCHEMA:
        raise CheckpointError(f"{path}: schema {record.get('schema')!r}; this regsurgery reads schema {SCHEMA}")
    verdict = record.get("verify")
    if not isinstance(record.get("run"), dict) or not (
        verdict is None or (isinstance(verdict, dict) and isinstance(verdict.get("passed"), bool))
    ):
        raise CheckpointError(f"{path}: not a record that regsurgery wrote; patch the model again")
    return record
