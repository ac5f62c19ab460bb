"""`survey`: every model of a list through doctor, find, patch and eval. What is done is kept: it can be continued."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regsurgery.checkpoints.limits import read_json
from regsurgery.checkpoints.owned import locked
from regsurgery.checkpoints.whole import check_parent, remove_left
from regsurgery.errors import OutputError, UserError, did_you_mean
from regsurgery.evaluation.tasks import check_extra
from regsurgery.options import SurveyOptions, takes
from regsurgery.progress import Progress
from regsurgery.surveying.apart import ended, run_apart
from regsurgery.surveying.cache import cached_repository, free
from regsurgery.surveying.listed import Entry, read_list
from regsurgery.surveying.pages import write_pages
from regsurgery.surveying.records import CRASHED, Record, read_record, write_record, write_whole
from regsurgery.surveying.stages import Stage, done_with, forget_failures, next_stage, records_of
from regsurgery.surveying.tables import Surveyed
from regsurgery.surveying.work import Work, perform

SETTINGS, LOCK, MODEL, LOG = "settings.json", "survey.lock", "model.json", "log.txt"
MODELS = "models"  # the folder of the models' folders

Perform = Callable[[Work], int]  # runs a stage; its exit code


@dataclass(frozen=True)
class Survey:
    """What `survey` has done, in all its runs.

    Attributes:
        output: the folder, with `survey.md`, `survey.html` and `survey.json`.
        models: those of the list, or of `only`, each with the records of its stages.
    """

    output: str
    models: tuple[Surveyed, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of models of which a stage failed; a mode or a task that a model does not allow is no failure."""
        return tuple(model.name for model in self.models if model.failures)

    def as_dict(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "models": [model.as_dict() for model in self.models],
            "failed": list(self.failed),
        }


@takes(SurveyOptions)
def survey(listed: str | Path, output: str | Path, options: SurveyOptions) -> Survey:
    """Run doctor, find, patch and eval for every model of a list, and write one table into the folder `output`.

    A stage that has ended leaves a record there; a survey that was stopped in any way continues with the first that has
    none. An error of one model is a record, too. As every function that starts processes, call it under
    `if __name__ == "__main__"`.

    Args:
        listed: a list file, or the name of a bundled one, `published`.
        output: a new folder, or one of an earlier run with the same images and seed.
        options: see `options.SurveyOptions`; its fields are the keyword arguments.

    Raises:
        UserError: the list, an option or the images are at fault, or a signal ended a stage.
        OutputError: among these, `output` is not a survey's, or another run is at work there.
        CheckpointError: among these, a record in it is broken.
    """
    check_extra()
    entries, output = _chosen(read_list(listed), options.only, listed), Path(output)
    settings = _settings(options)
    with _own(output, options.progress):
        _check_settings(output / SETTINGS, settings)
        for number, entry in enumerate(entries, 1):
            options.progress.say(f"{entry.name} ({number} of {len(entries)})")
            _turn(entry, output / MODELS / entry.slug, options, _in_a_process)
            write_pages(output, _surveyed(output, entries, options), settings)
    return Survey(str(output), _surveyed(output, entries, options))


def _turn(entry: Entry, folder: Path, options: SurveyOptions, run: Perform) -> None:
    """All stages of a model that have no record, and what is left of it removed."""
    was_cached = _begin(entry, folder)
    if options.retry:
        forget_failures(folder, options)
    allowed = replace(options, progress=Progress())  # what a process can be given
    while (stage := next_stage(folder, options)) is not None:
        options.progress.stage(f"{entry.name}: {stage}")
        code = run(Work(entry, stage, folder, allowed))
        _record_end(stage, folder, code)
        _tidy(folder, options)
    _tidy(folder, options)
    if options.free_cache and not was_cached:
        freed = free(entry.model)
        if freed:
            options.progress.say(f"{entry.name}: {freed / 1e9:.2f} GB removed from the Hub's cache")


def _in_a_process(work: Work) -> int:
    return run_apart(perform, work, log=work.folder / LOG)


def _record_end(stage: Stage, folder: Path, code: int) -> None:
    """If the process ended without a word, say so where its next record would be."""
    for name in stage.records:
        if read_record(folder, name) is None:
            error = f"its process ended by {ended(code)}; see {LOG} in {MODELS}/{folder.name}"
            write_record(folder, Record(name, CRASHED, error))
            return


def _tidy(folder: Path, options: SurveyOptions) -> None:
    """Remove the patched folders that no stage needs."""
    for patched in () if options.keep else tuple(done_with(folder, options)):
        shutil.rmtree(patched)


# --- the folder -------------------------------------------------------------------------------------------------------


@contextmanager
def _own(output: Path, progress: Progress) -> Iterator[None]:
    """The folder of a survey, for one run at a time.

    Raises:
        OutputError: it cannot be made, is something else, or another run has it.
    """
    if not (output / LOCK).is_file():
        left = os.listdir(output) if output.is_dir() else [output.name] if output.exists() else []
        if left and LOCK not in left:  # or another run has just made it
            raise OutputError(f"{output}: exists and is not the folder of a survey; choose another with -o")
        check_parent(output)
    output.mkdir(exist_ok=True)
    with (output / LOCK).open("w") as lock:
        alone = locked(lock.fileno())
        if alone is False:
            raise OutputError(f"{output}: another survey is at work there; wait for it, or choose another with -o")
        if alone is None:
            progress.say(f"note: the file system of {output} has no locks; see to it that no other survey works there")
        (output / MODELS).mkdir(exist_ok=True)
        remove_left(output)
        yield


def _settings(options: SurveyOptions) -> dict[str, Any]:
    """What the figures of one table must have in common; None for what is not given.

    Raises:
        UserError: there are no images where they should be.
    """
    from regsurgery.checkpoints.sums import sha256
    from regsurgery.images.image_set import image_set

    settings: dict[str, Any] = {"seed": options.seed}
    for name in ("images", "voc", "labelled"):
        where, most = getattr(options, name), options.num_images if name == "images" else options.num_scored
        if where is None and name != "images":
            settings[name] = None
            continue
        images = image_set(where, most, seed=options.seed)
        settings[name] = {"note": images.note, "count": images.num_images, "identity": images.source.identity()}
    settings["prompts"] = None if options.prompts is None else sha256(Path(options.prompts))
    return settings


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Raise `OutputError` if an earlier run in this folder had other `settings`; keep them for the next."""
    earlier = read_json(path, "choose another folder with -o") if path.is_file() else {}
    for name, value in settings.items():
        was = earlier.get(name)
        if was is not None and _unnamed(was) != _unnamed(value):
            told = was.get("note") if isinstance(was, dict) else was
            raise OutputError(
                f"{path.parent}: was begun with other {name} ({told}), whose figures cannot stand in one table; give "
                f"the same --{name}, or choose another folder with -o"
            )
    write_whole(path, settings)


def _unnamed(setting: Any) -> Any:
    """A setting without the name of a folder, which may have moved."""
    return {**setting, "note": None} if isinstance(setting, dict) else setting


def _begin(entry: Entry, folder: Path) -> bool:
    """Make a model's folder, or find it; whether its repository was in the Hub's cache before.

    Raises:
        OutputError: the folder is another model's.
    """
    path, own = folder / MODEL, {"model": entry.model, **entry.loading}
    if not path.is_file():
        folder.mkdir(exist_ok=True)
        write_whole(path, {"entry": own, "was_cached": cached_repository(entry.model) is not None})
    remove_left(folder)
    begun = read_json(path, f"remove {folder}")
    if begun.get("entry") != own:
        raise OutputError(
            f"{folder}: has the figures of {begun.get('entry')}, not of {own}; give the model another name in the "
            "list, or remove that folder"
        )
    return begun.get("was_cached") is True


# --- the models -------------------------------------------------------------------------------------------------------


def _chosen(entries: Sequence[Entry], only: Sequence[str] | None, listed: str | Path) -> list[Entry]:
    names = [entry.name for entry in entries]
    for name in only or ():
        if name not in names:
            raise UserError(
                f"--only {name}: {listed} has no model of that name{did_you_mean(name, names)}; it has "
                f"{', '.join(names)}"
            )
    return [entry for entry in entries if not only or entry.name in only]


def _surveyed(output: Path, entries: Sequence[Entry], options: SurveyOptions) -> tuple[Surveyed, ...]:
    """The models with what is known of them."""
    return tuple(Surveyed(entry, tuple(records_of(output / MODELS / entry.slug, options))) for entry in entries)
