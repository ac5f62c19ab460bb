"""What is to be done for a model, in which order, and what comes next: decided by the records that lie there alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from regsurgery.options import SurveyOptions
from regsurgery.surveying.records import FAILURES, Record, path_of, read_record

DOCTOR, FIND = "doctor", "find"
OURS, PAPER = "ours", "paper"  # settings; the paper's is the smallest set of neurons with one register
RECIPES = {OURS: "recipe.yaml", PAPER: "recipe-paper.yaml"}  # files of a model's folder that `find` writes
HAS_NEURONS = "register_neurons"  # the verdict of `doctor` after which there is something to find


@dataclass(frozen=True)
class Variant:
    """A way to patch a model."""

    setting: str
    mode: str

    @property
    def name(self) -> str:
        """Of its patched folder, and what its records begin with."""
        return f"{self.setting}-{self.mode}"

    @property
    def patch(self) -> str:
        """The record of its surgery."""
        return f"{self.name}.patch"

    def scored(self, task: str) -> str:
        """The record of a task of `eval`."""
        return f"{self.name}.{task}"


@dataclass(frozen=True)
class Stage:
    """What one process does.

    Attributes:
        kind: `doctor`, `find`, `patch` or `eval`.
        records: what it writes, in this order.
        variant: of `patch` and `eval`.
        tasks: of `eval`, one for each record.
    """

    kind: str
    records: tuple[str, ...]
    variant: Variant | None = None
    tasks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.kind if self.variant is None else f"{self.kind} {self.variant.name}"


def tasks_of(options: SurveyOptions) -> tuple[str, ...]:
    """The tasks of `eval` for which there are images."""
    more = {"lost": options.voc, "classify": options.labelled}
    return ("norms", "fidelity", *(task for task, images in more.items() if images is not None))


def variants(folder: Path, options: SurveyOptions) -> tuple[Variant, ...]:
    """The ways in which a model is patched, once `find` has written into its `folder`: the paper's setting first.

    If `find` chose the paper's setting it is ours, and no other is written.
    """
    settings = [setting for setting in (PAPER, OURS) if (folder / RECIPES[setting]).is_file()]
    return tuple(Variant(setting, mode) for setting in settings for mode in options.modes)


def next_stage(folder: Path, options: SurveyOptions) -> Stage | None:
    """The first stage of a model that has no record; None if its turn is over.

    Raises:
        CheckpointError: a record is broken.
    """
    doctor = read_record(folder, DOCTOR)
    if doctor is None:
        return Stage(DOCTOR, (DOCTOR,))
    if not doctor.done or (doctor.result or {}).get("verdict") != HAS_NEURONS:
        return None
    found = read_record(folder, FIND)
    if found is None:
        return Stage(FIND, (FIND,))
    if not found.done:
        return None
    for variant in variants(folder, options):
        patched = read_record(folder, variant.patch)
        missing = tuple(task for task in tasks_of(options) if read_record(folder, variant.scored(task)) is None)
        if patched is None or (patched.done and missing and not (folder / variant.name).is_dir()):
            return Stage("patch", (variant.patch,), variant)
        if patched.done and missing:
            return Stage("eval", tuple(map(variant.scored, missing)), variant, missing)
    return None


def done_with(folder: Path, options: SurveyOptions) -> Iterator[Path]:
    """The patched folders of a model that no stage needs any more.

    Raises:
        CheckpointError: a record is broken.
    """
    for variant in variants(folder, options):
        records = [read_record(folder, variant.scored(task)) for task in tasks_of(options)]
        if (folder / variant.name).is_dir() and None not in records:
            yield folder / variant.name


def records_of(folder: Path, options: SurveyOptions) -> Iterator[Record]:
    """The records of a model that are there, in the order of the stages.

    Raises:
        CheckpointError: a record is broken.
    """
    names = [DOCTOR, FIND]
    for variant in variants(folder, options):
        names += [variant.patch, *map(variant.scored, tasks_of(options))]
    for name in names:
        record = read_record(folder, name)
        if record is not None:
            yield record


def forget_failures(folder: Path, options: SurveyOptions) -> None:
    """Remove the records of stages that failed, so that they run again.

    Raises:
        CheckpointError: a record is broken.
    """
    for record in list(records_of(folder, options)):
        if record.outcome in FAILURES:
            path_of(folder, record.stage).unlink()
