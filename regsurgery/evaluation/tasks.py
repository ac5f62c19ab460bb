"""The tasks of `eval`."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regsurgery.errors import UserError, did_you_mean
from regsurgery.options import (
    BlockOptions,
    ClassifyOptions,
    ControlsOptions,
    CorrespondenceOptions,
    EvaluateOptions,
    ForegroundOptions,
    KnnOptions,
    LatencyOptions,
    LostOptions,
    ProbeOptions,
    SegmentOptions,
    ShiftMapOptions,
)

if TYPE_CHECKING:
    from types import ModuleType


@dataclass(frozen=True)
class Task:
    """A task of `eval`: the module of that name, with _ for -.

    Attributes:
        short: what it shows, in the list of tasks; at most 48 characters.
        shows: the same in full.
        options: its options, including those of every task.
        draws: whether it can write a picture.
    """

    name: str
    short: str
    shows: str
    options: type[EvaluateOptions]
    draws: bool = False


TASKS = {
    task.name: task
    for task in (
        Task(
            "norms",
            "patch norms and outlier tokens",
            "patch norms and outlier tokens after every block",
            BlockOptions,
            draws=True,
        ),
        Task(
            "attention",
            "attention maps",
            "entropy, maximum and spatial coherence of attention maps, and attention to the register",
            BlockOptions,
            draws=True,
        ),
        Task(
            "fidelity",
            "how far outputs and tokens moved",
            "how far outputs and tokens moved: KL divergence, first class, cosines",
            EvaluateOptions,
        ),
        Task(
            "classify",
            "accuracy on labelled images",
            "top-1 and top-5 accuracy on labelled images, with the model's own head or zero-shot",
            ClassifyOptions,
        ),
        Task(
            "controls",
            "the shift against control surgeries",
            "the shift against the paper's setting, random neurons, and neurons zeroed without a register",
            ControlsOptions,
        ),
        Task("latency", "time and memory", "time and memory, patched over original", LatencyOptions),
        Task(
            "probe",
            "a linear probe on frozen features",
            "a linear probe on frozen features, with held-out labelled images",
            ProbeOptions,
        ),
        Task(
            "knn",
            "nearest neighbours of frozen features",
            "nearest neighbours of frozen features, on labelled images",
            KnnOptions,
        ),
        Task(
            "lost",
            "object discovery (LOST)",
            "unsupervised object discovery (LOST) on data in VOC layout: CorLoc",
            LostOptions,
        ),
        Task(
            "foreground",
            "foreground by k-means and normalised cut",
            "foreground by k-means and normalised cut (TokenCut), against boxes in VOC layout: CorLoc, IoU",
            ForegroundOptions,
        ),
        Task(
            "rollout",
            "attention rollout on objects",
            "attention rollout against the boxes of objects, in VOC layout",
            EvaluateOptions,
        ),
        Task(
            "correspondence",
            "patches found again in another view",
            "patches found again in another view of the same image, without labels: PCK",
            CorrespondenceOptions,
        ),
        Task(
            "segment",
            "segmentation by a probe on patches",
            "patch classes by a linear or k-means probe, on images with masks: mIoU",
            SegmentOptions,
        ),
        Task(
            "shift-map",
            "outliers moved to chosen places",
            "outliers moved to chosen places instead of the register",
            ShiftMapOptions,
            draws=True,
        ),
    )
}
NEEDS = ("scipy", "sklearn", "matplotlib")  # packages of the extra `eval`


def task_module(task: str) -> ModuleType:
    """The module of a task.

    Raises:
        UserError: there is no such task, or a package of the extra `eval` is not installed.
    """
    if task not in TASKS:
        raise UserError(f"no task '{task}'; there are {', '.join(TASKS)}{did_you_mean(task, list(TASKS))}")
    check_extra()
    return importlib.import_module(f"regsurgery.evaluation.{task.replace('-', '_')}")


def check_extra() -> None:
    """Raise `UserError` if a package of the extra `eval` is not installed."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"eval needs {' and '.join(missing)}; install with: pip install 'regsurgery[eval]'")
