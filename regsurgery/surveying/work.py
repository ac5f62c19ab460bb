"""What the process of a stage does: the public API on one model, and a record of how it went."""

from __future__ import annotations

import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from regsurgery.checkpoints.whole import replace_file
from regsurgery.errors import NothingToFixError, UserError, VerificationError, in_short
from regsurgery.machine import hardware, peak_rss_mb
from regsurgery.memory import shortage
from regsurgery.options import SurveyOptions
from regsurgery.progress import Progress
from regsurgery.surveying.listed import Entry
from regsurgery.surveying.records import CRASHED, DONE, FAILED, NOTHING, REFUSED, Record, write_record
from regsurgery.surveying.stages import DOCTOR, FIND, OURS, PAPER, RECIPES, Stage

ALLOWED = ("allow_pickle", "trust_remote_code", "device_map", "max_memory")  # for all models of a survey


class Timed(Progress):
    """Prints into the stage's log, and keeps how long each part took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.name, self.began = "start", time.monotonic()

    def stage(self, name: str, total: int | None = None, *, in_bytes: bool = False) -> None:
        self.end()
        self.name = name
        self.say(name if total is None else f"{name}: {total}")

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """The part that runs has ended."""
        now = time.monotonic()
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + now - self.began
        self.began = now


@dataclass(frozen=True)
class Work:
    """A stage of a model.

    Attributes:
        folder: the model's, which its records are in.
    """

    entry: Entry
    stage: Stage
    folder: Path
    options: SurveyOptions

    @property
    def loading(self) -> dict[str, Any]:
        """What the user allows, and what the list says of the model."""
        options = self.options
        return {**{name: getattr(options, name) for name in ALLOWED}, **self.entry.loading}


def perform(work: Work) -> None:
    """Run a stage, and write its records; an exception is what they say, and nothing else."""
    if work.stage.kind == "eval":
        _evaluate(work)
        return
    (name,), progress = work.stage.records, Timed()
    write_record(work.folder, recorded(name, partial(WORK[work.stage.kind], work, progress), progress))


def recorded(stage: str, do: Callable[[], Mapping[str, Any]], progress: Timed) -> Record:
    """The record of calling `do`, whose result is that of the stage."""
    outcome, error, result = DONE, None, None
    started = progress.began = time.monotonic()
    _forget_peak()
    try:
        result = do()
    except NothingToFixError as found:
        outcome, error = NOTHING, str(found)
    except VerificationError as found:
        outcome, error = FAILED, str(found)
    except UserError as found:
        outcome, error = REFUSED, shortage(found) or str(found)
    except Exception as found:  # a bug, of ours or of a library, which must not end the other models' turns
        traceback.print_exc()
        outcome, error = CRASHED, shortage(found) or f"{type(found).__name__}: {in_short(found)}"
    progress.end()
    gpu, gpu_mb = _gpu()
    return Record(
        stage=stage,
        outcome=outcome,
        error=error,
        result=result,
        seconds=time.monotonic() - started,
        parts=progress.seconds,
        peak_rss_mb=peak_rss_mb(),
        peak_gpu_mb=gpu_mb,
        machine=hardware(gpu),
    )


# --- the stages -------------------------------------------------------------------------------------------------------


def _doctor(work: Work, progress: Timed) -> Mapping[str, Any]:
    from regsurgery.commands.doctor import doctor

    options = work.options
    chosen: dict[str, Any] = {"images": options.images, "num_images": options.num_images}
    return doctor(work.entry.model, **chosen, seed=options.seed, progress=progress, **work.loading).as_dict()


def _find(work: Work, progress: Timed) -> Mapping[str, Any]:
    """`find` on the images that `patch` would search, and the recipes that it leads to."""
    from regsurgery.commands.find import find

    recipe, papers = (work.folder / RECIPES[setting] for setting in (OURS, PAPER))
    papers.unlink(missing_ok=True)
    searched = _division(work.options).searched
    how: dict[str, Any] = {"images": searched, "seed": work.options.seed, "progress": progress}
    found = find(work.entry.model, recipe, **how, **work.loading)
    paper = found.recipe.papers_setting()
    if paper is not None:
        replace_file(papers, replace(paper, model=found.recipe.model).to_yaml().encode())
    ranked = [[one.block, one.neuron] for one in found.candidates]
    return {**found.as_dict(), "ranked": ranked, "paper_is_chosen": paper is None}


def _patch(work: Work, progress: Timed) -> Mapping[str, Any]:
    from regsurgery.commands.patch import patch
    from regsurgery.recipe import read_recipe

    variant, options = work.stage.variant, work.options
    assert variant is not None
    output = work.folder / variant.name
    shutil.rmtree(output, ignore_errors=True)  # of a run that was stopped before it wrote the record
    how: dict[str, Any] = {
        "recipe": read_recipe(work.folder / RECIPES[variant.setting]),
        "mode": variant.mode,
        "searched": True,
        "images": options.images,
        "num_images": options.num_images,
        "seed": options.seed,
        "progress": progress,
    }
    result = patch(work.entry.model, output, **how, **work.loading)
    return {**result.as_dict(), "num_registers": result.recipe.num_registers}


def _evaluate(work: Work) -> None:
    """The tasks, each with its record, on one pair, which is opened for the first."""
    from regsurgery.evaluation.evaluate import evaluate_pair
    from regsurgery.options import LoadOptions
    from regsurgery.verification.pair import Pair, open_pair

    variant, loading = work.stage.variant, work.loading
    assert variant is not None
    reading = {name: loading[name] for name in ALLOWED}
    opened: list[Pair] = []

    def scored(task: str, progress: Timed) -> Mapping[str, Any]:
        if not opened:
            how = LoadOptions(**reading, progress=progress)
            opened.append(stack.enter_context(open_pair(work.folder / variant.name, options=how)))
        (pair,) = opened
        images, options = _scored_on(work, task, pair, {**reading, "progress": progress})
        found = evaluate_pair(pair, task, images, options).as_dict()
        kept = {name: value for name, value in found.items() if name not in ("folder", "details", "settings")}
        return {**kept, "settings": {name: str(value) for name, value in options.settings.items()}}

    with ExitStack() as stack:
        for name, task in zip(work.stage.records, work.stage.tasks, strict=True):
            progress = Timed()
            write_record(work.folder, recorded(name, partial(scored, task, progress), progress))


def _scored_on(work: Work, task: str, pair: Any, how: Mapping[str, Any]) -> tuple[Any, Any]:
    """The images of a task, and its options."""
    from regsurgery.evaluation.tasks import TASKS
    from regsurgery.evaluation.zero_shot import has_text_tower
    from regsurgery.images.image_set import image_set

    given = work.options
    more: dict[str, Any] = {}
    if task == "classify" and given.prompts is not None and has_text_tower(pair.loaded):
        more = {"prompts": given.prompts}
    where = {"lost": given.voc, "classify": given.labelled}.get(task)
    say = how["progress"].say
    images = _division(given).unseen if where is None else image_set(where, given.num_scored, say=say)
    return images, TASKS[task].options(**how, **more, seed=given.seed)


WORK: dict[str, Callable[[Work, Timed], Mapping[str, Any]]] = {DOCTOR: _doctor, FIND: _find, "patch": _patch}


def _division(options: SurveyOptions) -> Any:
    from regsurgery.search.division import Division

    return Division.for_search(options.image_set(), options.seed)


# --- the GPU ----------------------------------------------------------------------------------------------------------


def _forget_peak() -> None:
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _gpu() -> tuple[str | None, float | None]:
    """Its name, and the most memory that torch has had there since `_forget_peak`, in MiB; None unless it was used."""
    import torch

    if not torch.cuda.is_initialized():
        return None, None
    return torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / 2**20
