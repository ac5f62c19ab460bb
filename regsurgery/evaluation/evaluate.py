"""`regsurgery eval TASK DIR`: figures of the original and of the patched model, side by side, in one run.

A **task** is one module of this package. Its contract:

    def evaluate(pair: Pair, images: ImageSet, *, progress: Progress, seed: int, OPTION=DEFAULT, ...) -> Result

- its keyword parameters other than `progress` and `seed` are its own options, defined with their help texts in a
  dataclass in `options.py`; `tasks.TASKS` lists the tasks;
- `pair.batches(images)` yields the images, `pair.observer(...)` observes both models with one forward of each,
  `pair.at_size(...)` is the pair for another image size;
- figures are added to `interval.Figures`, one value per image, and returned as `Result.rows`;
- memory must not grow with the number of images: keep sums, not lists of maps;
- `progress.stage(name, total)` and `progress.advance(images)` report the progress.

The package is called `evaluation`, not `evaluate`, because `regsurgery.evaluate` is the function.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.errors import UserError
from regsurgery.evaluation.result import Evaluation
from regsurgery.evaluation.tasks import TASKS, task_module
from regsurgery.options import EvaluateOptions, filled

if TYPE_CHECKING:
    from regsurgery.images.image_set import ImageSet
    from regsurgery.verification.pair import Pair


def evaluate(folder: str | Path, task: str, options: EvaluateOptions | None = None, **given: Any) -> Evaluation:
    """Evaluate a patched folder against its original.

    Args:
        folder: a folder that `patch` wrote, in any mode and format; or a MODEL, which is then compared with itself.
        task: one of `tasks.TASKS`.
        options: of the task's own class, see `tasks.TASKS`; or its fields as keyword arguments, which win.

    Raises:
        UserError: there is no such task or option, or the input is at fault; see `errors`.
    """
    from regsurgery.evaluation.pictures import check_png
    from regsurgery.verification.pair import open_pair

    task_module(task)
    options = _options(task, given, options)
    if options.png is not None:
        check_png(task, Path(options.png))
    images = options.image_set()
    with open_pair(folder, options.original, options) as pair:
        return evaluate_pair(pair, task, images, options)


def evaluate_pair(pair: Pair, task: str, images: ImageSet, options: EvaluateOptions) -> Evaluation:
    """One task on models that are open, for several on one pair; `options.images` is not read.

    Raises:
        UserError: as of `evaluate`.
    """
    from regsurgery.verification.pair import OutlierCount

    module = task_module(task)
    progress, settings = options.progress, options.settings
    progress.say(f"preprocessing: {pair.loaded.preprocess_note}; images: {images.note}")
    pair = replace(pair, outliers=OutlierCount())
    result = module.evaluate(pair, images, progress=progress, seed=options.seed, **settings)
    found = pair.outliers.per_image
    no_neurons = pair.recipe is not None and not pair.recipe.register_neurons
    evaluation = Evaluation(
        task=task,
        folder=pair.folder,
        format=pair.format,
        mode=pair.mode,
        images=images.note,
        num_images=result.num_images or images.num_images - len(images.broken),
        outliers_per_image=found,
        expectation=_expectation(pair.is_same, no_neurons, found),
        rows=tuple(result.rows),
        notes=result.notes,
        details=result.details,
        settings=settings,
    )
    if options.png is not None:
        from regsurgery.evaluation.pictures import write_pictures

        for written in write_pictures(task, evaluation, pair, images, Path(options.png)):
            progress.say(f"wrote {written}")
    return evaluation


def _options(task: str, given: dict[str, Any], options: EvaluateOptions | None) -> EvaluateOptions:
    kind = TASKS[task].options
    common = {one.name for one in fields(EvaluateOptions)}
    known = {one.name for one in fields(kind)}
    for name in given:
        if name not in known:
            takes = ", ".join(one.name for one in fields(kind) if one.name not in common)
            raise UserError(f"eval {task}: has no option '{name}'; its options are {takes or 'none'}")
    return filled(kind, given, options)


def _expectation(is_same: bool, no_neurons: bool, outliers_per_image: float | None) -> str:
    from regsurgery.search.diagnosis import MIN_OUTLIERS

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
