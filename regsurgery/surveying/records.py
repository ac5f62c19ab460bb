"""What a stage leaves: a JSON file, written whole when it ends, by which a survey continues.

{"schema": 1, "stage": its name, "outcome": one of `OUTCOMES`, "error": one line or null,
 "result": plain data, by stage, null unless done,
 "seconds": all it took, "parts": {what it did: seconds}, "peak_rss_mb", "peak_gpu_mb": of its process, null where
 that ended without a word or has no GPU, "machine": `machine.hardware`}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from regsurgery.checkpoints.limits import read_json
from regsurgery.checkpoints.whole import replace_file
from regsurgery.emit.run_record import rounded
from regsurgery.errors import CheckpointError

SCHEMA = 1
DONE = "done"
NOTHING = "nothing to fix"  # `find`'s word, where `doctor` had hope
REFUSED = "refused"  # an error of the project's own
FAILED = "verification failed"
CRASHED = "crashed"  # any other exception, or the process ended without a record
OUTCOMES = (DONE, NOTHING, REFUSED, FAILED, CRASHED)
FAILURES = (REFUSED, FAILED, CRASHED)
REMEDY = "remove it, and the stage runs again"


@dataclass(frozen=True)
class Record:
    """How a stage ended; see the module's docstring.

    Attributes:
        stage: see `stages.Stage.records`.
    """

    stage: str
    outcome: str
    error: str | None = None
    result: Mapping[str, Any] | None = None
    seconds: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    peak_rss_mb: float | None = None
    peak_gpu_mb: float | None = None
    machine: Mapping[str, Any] | None = None

    @property
    def done(self) -> bool:
        return self.outcome == DONE

    def as_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


def path_of(folder: Path, stage: str) -> Path:
    """Where the record of a stage is in a model's `folder`."""
    return folder / f"{stage}.json"


def write_record(folder: Path, record: Record) -> None:
    """Write the record into a model's `folder`, completely or not at all.

    Raises:
        OutputError: the disk is full or not writable.
    """
    write_whole(path_of(folder, record.stage), record.as_dict())


def write_whole(path: Path, data: Mapping[str, Any]) -> None:
    """Write plain data as JSON, completely or not at all; see `run_record.rounded`.

    Raises:
        OutputError: the disk is full or not writable.
    """
    text = json.dumps(rounded(data), indent=2, ensure_ascii=False)
    replace_file(path, f"{text}\n".encode("utf-8", "backslashreplace"))


def read_record(folder: Path, stage: str) -> Record | None:
    """The record of a stage; None if it has not ended.

    Raises:
        CheckpointError: the file is not such a record.
    """
    path = path_of(folder, stage)
    if not path.is_file():
        return None
    data = read_json(path, REMEDY)
    known = {"schema", *Record.__dataclass_fields__}
    whole = data.get("schema") == SCHEMA and data.get("outcome") in OUTCOMES and data.keys() == known
    if (
        not whole
        or not isinstance(data["result"], (dict, type(None)))
        or (data["outcome"] == DONE) != bool(data["result"])
    ):
        raise CheckpointError(f"{path}: not the record of a stage; {REMEDY}")
    del data["schema"]
    return Record(**data)
