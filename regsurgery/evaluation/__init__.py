"""`regsurgery eval TASK DIR`: figures of the original and of the patched model, side by side, in one run.

A **task** is one module of this package. Its contract:

    def evaluate(pair: Pair, images: ImageSet, *, progress: Progress, seed: int, OPTION=DEFAULT, ...) -> Result

- its keyword parameters beside `progress` and `seed` are the options it takes; `TASKS` says which module a task is;
- `pair.batches(images)` gives the images, `pair.observer(...)` looks at both models with one forward of each,
  `pair.at_size(...)` is the pair for another image size;
- figures are added to `interval.Figures`, one value an image, and come back as `Result.rows`;
- memory must not grow with the number of images: sums, no lists of maps;
- `progress.stage(name, total)` and `progress.advance(images)` tell how far it is.

The package is called `evaluation`, not `evaluate`, because `regsurgery.evaluate` is the function.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from types import ModuleType

    from regsurgery.evaluation.interval import Row
    from regsurgery.loading import LoadOptions
    from regsurgery.pipeline import Progress

# name -> what it shows; the module is of the same name, with _ for -
TASKS = {
    "norms": "patch norms and outlier tokens after every block",
    "attention": "entropy, maximum and spatial coherence of attention maps; attention to the register",
    "fidelity": "how far outputs and tokens moved: KL divergence, first class, cosines",
    "classify": "top-1 and top-5 on labelled images, by the model's own head or zero-shot",
    "controls": "the shift against the paper's setting, random neurons, and neurons zeroed without a register",
    "latency": "time and memory, patched over original",
    "probe": "a linear probe on frozen features, on held-out labelled images",
    "knn": "nearest neighbours of frozen features, on labelled images",
    "lost": "unsupervised object discovery (LOST) on data in VOC layout: CorLoc",
    "segment": "patches' classes by a linear or k-means probe, on images with masks: mIoU",
    "shift-map": "outliers moved to chosen places instead of the register",
}
NEEDS = ("scipy", "sklearn", "matplotlib")  # packages of the extra `eval`


@dataclass(frozen=True)
class Result:
    """What a task found.

    Attributes:
        rows: the figures.
        notes: facts worth a line.
        details: what a picture or a program needs beside the figures; plain data.
        num_images: how many images were seen, where it was not all of them.
    """

    rows: Sequence[Row]
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    num_images: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """Figures of one task, original against patched.

    Attributes:
        task, folder, format, mode: what was evaluated; mode `original` for an unpatched model.
        images: one line that says what the images were; `num_images` is how many both models saw.
        outliers_per_image: of the original on these images, by `statistics.robust_outliers`; None where the task did
            not look.
        expectation: why no difference is to be expected, or "".
        rows, notes, details: as in `Result`.
        settings: the options that the task ran with.
    """

    task: str
    folder: str
    format: str
    mode: str
    images: str
    num_images: int
    outliers_per_image: float | None
    expectation: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    details: Mapping[str, Any]
    settings: Mapping[str, Any]

    def __getitem__(self, name: str) -> Row:
        """The only row of that name; KeyError where there is none, or several."""
        (row, *others) = [row for row in self.rows if row.name == name] or [None]
        if row is None or others:
            raise KeyError(name)
        return row

    def select(self, name: str, **where: int | str) -> list[Row]:
        """The rows of that name whose `where` has all of those."""
        return [row for row in self.rows if row.name == name and where.items() <= dict(row.where).items()]

    def as_dict(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "folder": self.folder,
            "format": self.format,
            "mode": self.mode,
            "images": self.images,
            "num_images": self.num_images,
            "outliers_per_image": self.outliers_per_image,
            "expectation": self.expectation,
            "settings": dict(self.settings),
            "notes": list(self.notes),
            "figures": [row.as_dict() for row in self.rows],
            "details": dict(self.details),
        }

    def _repr_html_(self) -> str:
        from regsurgery.evaluation.table import as_html

        return as_html(self)


def evaluate(
    folder: str | Path,
    task: str,
    *,
    images: str | Path | None = None,
    original: str | None = None,
    num_images: int | None = None,
    seed: int = 0,
    png: str | Path | None = None,
    options: LoadOptions | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Evaluation:
    """Evaluate a patched folder against its original.

    Args:
        folder: a folder that `patch` wrote, in any mode and format; or a MODEL, which then is both.
        task: one of `TASKS`.
        images, num_images: see `calibration.image_set`.
        original: MODEL to compare with, where the folder cannot restore it.
        seed: of resampled intervals, generated pictures and random controls.
        png: picture to write, of the tasks that draw one; see `pictures.DRAWN`.
        settings: options of the task, see its module.

    Raises:
        UserError: there is no such task or option, or the input is at fault; see `errors`.
    """
    from regsurgery.calibration import image_set
    from regsurgery.evaluation.pair import open_pair
    from regsurgery.evaluation.pictures import check_png, write_pictures
    from regsurgery.pipeline import Progress

    progress = progress or Progress()
    module = task_module(task)
    _check_settings(task, module, settings)
    if png is not None:
        check_png(task, Path(png))
    pictures = image_set(images, num_images, seed=seed, say=progress.say)
    with open_pair(folder, original, options, progress) as pair:
        progress.say(f"preprocessing: {pair.loaded.preprocess_note}; images: {pictures.note}")
        result = module.evaluate(pair, pictures, progress=progress, seed=seed, **settings)
        found = pair.outliers.per_image
        no_neurons = pair.recipe is not None and not pair.recipe.register_neurons
        evaluation = Evaluation(
            task=task,
            folder=pair.folder,
            format=pair.format,
            mode=pair.mode,
            images=pictures.note,
            num_images=result.num_images or pictures.num_images - len(pictures.broken),
            outliers_per_image=found,
            expectation=_expectation(pair.is_same, no_neurons, found),
            rows=tuple(result.rows),
            notes=result.notes,
            details=result.details,
            settings=settings,
        )
        if png is not None:
            for written in write_pictures(task, evaluation, pair, pictures, Path(png)):
                progress.say(f"wrote {written}")
        return evaluation


def task_module(task: str) -> ModuleType:
    """The module of a task.

    Raises:
        UserError: there is no such task, or a package of the extra `eval` is not installed.
    """
    if task not in TASKS:
        raise UserError(f"no task '{task}'; there are {', '.join(TASKS)}{did_you_mean(task, list(TASKS))}")
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"eval needs {' and '.join(missing)}, not installed; install with: pip install 'regsurgery[eval]'"
        )
    return importlib.import_module(f"regsurgery.evaluation.{task.replace('-', '_')}")


def _check_settings(task: str, module: ModuleType, settings: Mapping[str, Any]) -> None:
    takes = [
        name
        for name, parameter in inspect.signature(module.evaluate).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in ("progress", "seed")
    ]
    for name in settings:
        if name not in takes:
            known = f"it takes {', '.join(takes)}" if takes else "it takes none"
            raise UserError(f"eval {task}: has no option '{name}'; {known}")


def _expectation(is_same: bool, no_neurons: bool, outliers_per_image: float | None) -> str:
    from regsurgery.diagnosis import MIN_OUTLIERS

    if is_same:
        return "no difference to expect: the model is not patched, and both columns are the same model"
    if no_neurons:
        return "no difference to expect: the recipe has no register neurons"
    if outliers_per_image is not None and outliers_per_image < MIN_OUTLIERS:
        return (
            f"no difference to expect: the original has {outliers_per_image:.2f} outlier tokens per image here, so "
            "there was nothing to fix"
        )
    return ""
