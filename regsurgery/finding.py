"""`find`, aloud: pilot -> scores over all images -> the smallest set that removes the outliers -> the setting with the
least drift -> a recipe that says how.

The scores may come from the parts of an array job: `find_part` makes the statistics of one, `find` merges them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import regsurgery
from regsurgery.deciding import FindOptions, Found, Search, decide
from regsurgery.detect import MAX_CANDIDATES
from regsurgery.diagnosis import Diagnosis, diagnose
from regsurgery.distributed import Processes
from regsurgery.errors import NothingToFixError
from regsurgery.journal import Journal, TrialJournal
from regsurgery.loading import Loaded
from regsurgery.prefetch import prefetched
from regsurgery.scores import Scorer, Sums, candidates
from regsurgery.sharing import BATCH, FoundPart, Part, Share
from regsurgery.sites import Sites
from regsurgery.stats_file import Statistics, add_statistics, write_statistics
from regsurgery.trace import Traced

if TYPE_CHECKING:
    from regsurgery.pipeline import Progress


def find(
    loaded: Loaded,
    traced: Traced,
    sites: Sites,
    share: Share,
    options: FindOptions,
    *,
    journal_path: Path | None,
    processes: Processes,
    progress: Progress,
    parts: dict[Path, Statistics] | None = None,
) -> Found:
    """Find the register neurons of `loaded`, how many registers they need, and what patches keep.

    Args:
        parts: statistics to decide by, instead of a pass over the images; then `share` is any part's.

    Raises:
        NothingToFixError: the pilot's verdict is not `register_neurons`, or no neurons are the outliers' cause.
        UserError: too few of the images could be read; or `parts` are of another search.
    """
    diagnosis, scorer = _pilot(loaded, traced, sites, share, options, processes, progress)
    sums, journal = scorer.new_sums(), None
    if parts is None:
        journal = _score(scorer, sums, share, journal_path, processes, progress)
        tried = sum(processes.gathered(share.num_images()))
    else:
        add_statistics(parts, _settings(scorer, share), sums)
        tried = sum(statistics.tried for statistics in parts.values())
        num_broken = sum(len(statistics.broken) for statistics in parts.values())
        progress.say(f"merged {len(parts)} parts: {sums.num_images} images, {num_broken} more could not be read")
    ranked = candidates(sums, scorer.columns_H, MAX_CANDIDATES)
    key = (_settings(scorer, share), share.identity, asdict(options), tried)
    path = None if journal_path is None else journal_path.with_name(f"{journal_path.name}.trials")
    trials = TrialJournal(path if processes.is_first else None, _digest(key))
    search = Search(loaded, traced, sites, scorer, share, share.note(tried), options, progress, trials)
    found = processes.decided_by_first(lambda: decide(search, diagnosis, sums, ranked))
    trials.remove()
    if journal is not None:
        journal.remove()
    return found


def find_part(
    loaded: Loaded,
    traced: Traced,
    sites: Sites,
    share: Share,
    part: Part,
    path: Path,
    options: FindOptions,
    *,
    processes: Processes,
    progress: Progress,
) -> FoundPart:
    """The pilot, and the pass over the images of one part, whose sums go into the statistics file `path`.

    Raises:
        NothingToFixError: the pilot's verdict is not `register_neurons`.
        UserError: too few of the pilot's images could be read.
    """
    _, scorer = _pilot(loaded, traced, sites, share, options, processes, progress)
    sums = scorer.new_sums()
    journal = _score(scorer, sums, share, path.with_name(f"{path.name}.journal"), processes, progress)
    tried = sum(processes.gathered(share.num_images()))
    broken: dict[str, str] = {}
    for each in processes.gathered(journal.broken):
        broken |= each
    statistics = Statistics(_settings(scorer, share), part, tried, broken)
    processes.decided_by_first(lambda: write_statistics(path, statistics, sums))
    journal.remove()  # only now, in every process: the file is there
    return FoundPart(str(path), part, sums.num_images, len(broken))


def _pilot(
    loaded: Loaded,
    traced: Traced,
    sites: Sites,
    share: Share,
    options: FindOptions,
    processes: Processes,
    progress: Progress,
) -> tuple[Diagnosis, Scorer]:
    """Is there a cause to be found, and up to which block."""
    progress.stage("pilot", share.pilot.num_images)
    diagnosis = processes.decided_by_first(
        lambda: diagnose(
            loaded, traced, sites, share.pilot, force=options.force, batch_size=BATCH, progress=progress.advance
        )
    )
    if diagnosis.verdict != "register_neurons":
        raise NothingToFixError(diagnosis)
    last_block = diagnosis.settled_block
    assert last_block is not None
    progress.say(f"{diagnosis.verdict}: {diagnosis.reason}; scoring blocks 0 to {last_block}")
    return diagnosis, Scorer(loaded, traced, sites, last_block, precision=options.precision)


def _settings(scorer: Scorer, share: Share) -> dict[str, Any]:
    """What sums must have in common to be added."""
    return {
        "regsurgery": regsurgery.__version__,
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


def _score(
    scorer: Scorer, sums: Sums, share: Share, path: Path | None, processes: Processes, progress: Progress
) -> Journal:
    """The pass over all images of the share, into `sums`, which then are those of all processes."""
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
