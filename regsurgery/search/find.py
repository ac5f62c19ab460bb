"""`find` in steps: pilot -> scores over all images -> the smallest set that removes the outliers -> the setting with
the least drift -> a recipe that records how.

The scores may come from the parts of an array job: `find_part` makes the statistics of one, `find` merges them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from regsurgery.compiler.located import Located
from regsurgery.errors import NothingToFixError
from regsurgery.options import SearchOptions
from regsurgery.progress import Progress
from regsurgery.search.decide import Found, Search, decide
from regsurgery.search.diagnosis import Diagnosis, diagnose
from regsurgery.search.journal import Journal, TrialJournal
from regsurgery.search.prefetch import prefetched
from regsurgery.search.processes import Processes
from regsurgery.search.scores import Scorer, Sums, candidates
from regsurgery.search.selection import MAX_CANDIDATES
from regsurgery.search.shares import BATCH, FoundPart, Part, Share
from regsurgery.search.statistics_file import Statistics, add_statistics, write_statistics
from regsurgery.version import __version__


@dataclass(frozen=True)
class Task:
    """One search, or one part of it: the model, the images of this process, and what the user chose."""

    located: Located
    share: Share
    options: SearchOptions
    processes: Processes = field(default_factory=Processes)

    @property
    def progress(self) -> Progress:
        return self.options.progress


def find(task: Task, journal_path: Path | None = None, parts: dict[Path, Statistics] | None = None) -> Found:
    """Find the register neurons of the model, how many registers they need, and what the patches keep.

    Args:
        journal_path: where the sums so far are kept, so that a killed search can continue.
        parts: statistics to decide from, instead of a pass over the images; the share may then be any part's.

    Raises:
        NothingToFixError: the pilot's verdict is not `register_neurons`, or neurons do not cause the outliers.
        UserError: too few of the images could be read, or `parts` belong to another search.
    """
    share, processes, progress = task.share, task.processes, task.progress
    diagnosis, scorer = _pilot(task)
    sums, journal = scorer.new_sums(), None
    if parts is None:
        journal = _score(task, scorer, sums, journal_path)
        tried = sum(processes.gathered(share.num_images()))
    else:
        add_statistics(parts, _settings(scorer, share), sums)
        tried = sum(statistics.tried for statistics in parts.values())
        num_broken = sum(len(statistics.broken) for statistics in parts.values())
        progress.say(f"merged {len(parts)} parts: {sums.num_images} images, {num_broken} more could not be read")
    ranked = candidates(sums, scorer.columns_H, MAX_CANDIDATES)
    key = (_settings(scorer, share), share.identity, task.options.decisive, tried)
    path = None if journal_path is None else journal_path.with_name(f"{journal_path.name}.trials")
    trials = TrialJournal(path if processes.is_first else None, _digest(key))
    search = Search(task.located, scorer, share, share.note(tried), task.options, progress, trials)
    found = processes.decided_by_first(lambda: decide(search, diagnosis, sums, ranked))
    trials.remove()
    if journal is not None:
        journal.remove()
    return found


def find_part(task: Task, part: Part, path: Path) -> FoundPart:
    """Run the pilot, and the pass over the images of one part, whose sums go into the statistics file `path`.

    Raises:
        NothingToFixError: the pilot's verdict is not `register_neurons`.
        UserError: too few of the pilot's images could be read, or the model's files changed meanwhile.
    """
    processes = task.processes
    _, scorer = _pilot(task)
    sums = scorer.new_sums()
    journal = _score(task, scorer, sums, path.with_name(f"{path.name}.journal"))
    tried = sum(processes.gathered(task.share.num_images()))
    broken: dict[str, str] = {}
    for each in processes.gathered(journal.broken):
        broken |= each
    statistics = Statistics(_settings(scorer, task.share), part, tried, broken)
    task.located.loaded.files.check()
    processes.decided_by_first(lambda: write_statistics(path, statistics, sums))
    journal.remove()  # only now, in every process, that the file exists
    return FoundPart(str(path), part, sums.num_images, len(broken))


def _pilot(task: Task) -> tuple[Diagnosis, Scorer]:
    """Whether there is a cause to find, and up to which block."""
    progress, pilot, force = task.progress, task.share.pilot, task.options.force
    progress.stage("pilot", pilot.num_images)
    diagnosis = task.processes.decided_by_first(
        lambda: diagnose(task.located, pilot, force=force, batch_size=BATCH, progress=progress.advance)
    )
    if diagnosis.verdict != "register_neurons":
        raise NothingToFixError(diagnosis)
    last_block = diagnosis.settled_block
    assert last_block is not None
    progress.say(f"{diagnosis.verdict}: {diagnosis.reason}; scoring blocks 0 to {last_block}")
    return diagnosis, Scorer(task.located, last_block, precision=task.options.precision)


def _settings(scorer: Scorer, share: Share) -> dict[str, Any]:
    """What sums must have in common to be added up."""
    return {
        "regsurgery": __version__,
        "torch": torch.__version__,
        "model": scorer.loaded.source.sha256,
        "preprocessing": scorer.loaded.preprocess_note,
        "images": share.identity,
        "number of images": "all" if share.by_file else share.num_chosen,
        "division": "batches" if share.name is None else "tars",
        "batch size": BATCH,
        "last block": len(scorer.blocks) - 1,
        "precision": scorer.precision,
    }


def _score(task: Task, scorer: Scorer, sums: Sums, path: Path | None) -> Journal:
    """The pass over all images of the share, into `sums`, which afterwards are those of all processes."""
    share, processes, progress = task.share, task.processes, task.progress
    images = share.own
    key = (_settings(scorer, share), images.source.fingerprint(), repr(images.chosen), share.first, share.step)
    if path is not None and processes.count > 1:
        path = path.with_name(f"{path.name}.{processes.rank}-of-{processes.count}")
    journal = Journal(path, _digest(key), progress.say)
    last = journal.resume(sums)
    images.broken.update(journal.broken)
    progress.stage("scores", share.num_images())
    progress.advance(sums.num_images)
    first = share.first if last < 0 else last + share.step
    batches = images.numbered_batches(
        BATCH,
        scorer.loaded.preprocess,
        first=first,
        step=share.step,
        by_file=share.by_file,
        least=0,  # the pilot has seen enough
        broken=journal.broken,
    )
    for last, batch in prefetched(batches, scorer.device):
        scorer.add(sums, batch)
        journal.write(sums, last)
        progress.advance(len(batch))
    journal.write(sums, last, now=True)
    processes.add_up(sums.tensors())
    return journal


def _digest(key: Any) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()
