"""`find`, aloud: pilot -> scores over all images -> the set that the search chooses -> a recipe that says how.

The scores may come from the parts of an array job: `find_part` makes the statistics of one, `find` merges them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import regsurgery
from regsurgery import backends
from regsurgery.calibration import ImageSet
from regsurgery.detect import GONE, MAX_CANDIDATES, Row, Selection, select, sweep, sweep_sizes
from regsurgery.diagnosis import Diagnosis, diagnose
from regsurgery.distributed import Processes
from regsurgery.errors import NothingToFixError, UnsupportedModelError
from regsurgery.journal import Journal
from regsurgery.loading import Loaded
from regsurgery.match import match
from regsurgery.prefetch import prefetched
from regsurgery.recipe import Recipe
from regsurgery.scores import PRECISIONS, Candidate, Scorer, Sums, candidates
from regsurgery.sharing import BATCH, PILOT_IMAGES, FoundPart, Part, Share
from regsurgery.sites import Sites
from regsurgery.stats_file import Statistics, add_statistics, write_statistics
from regsurgery.trace import Traced, trace
from regsurgery.trials import Neurons, Trials, by_blocks

if TYPE_CHECKING:
    from regsurgery.pipeline import Progress

TRIAL_IMAGES = 16  # of the pilot's, for every trial of a set
SHOWN_CANDIDATES = 10
LARGE_IMAGE = 320  # pixels; the second resolution is half again as large below it, two thirds above it
DIGITS = 4  # significant ones of every figure in a recipe


@dataclass(frozen=True)
class SecondResolution:
    """The chosen set at another image size, on the pilot's images.

    Attributes:
        image_size: (height, width).
        held: the outliers are gone there too, if there are any; None where the model takes no other size.
        note: one line that says so.
    """

    image_size: tuple[int, int]
    held: bool | None
    note: str
    original: float | None = None
    patched: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "image_size": list(self.image_size),
            "held": self.held,
            "outliers_per_image": {"original": self.original, "patched": self.patched},
            "note": self.note,
        }


@dataclass(frozen=True)
class Found:
    """What `find` found.

    Attributes:
        threshold: mean over the images of the norm above which a patch is an outlier, after block `settled_block` of
            the diagnosis.
        num_images: images that the scores are sums over.
        candidates: the best by contribution.
    """

    recipe: Recipe
    diagnosis: Diagnosis
    selection: Selection
    threshold: float
    num_images: int
    candidates: tuple[Candidate, ...]
    sweep: tuple[Row, ...]
    second_resolution: SecondResolution

    def as_dict(self) -> dict[str, Any]:
        return {
            "register_neurons": {str(b): list(neurons) for b, neurons in self.recipe.register_neurons.items()},
            "emergence_block": self.diagnosis.emergence_block,
            "threshold": self.threshold,
            "num_images": self.num_images,
            "candidates": [
                {
                    "block": c.block,
                    "index": c.neuron,
                    "score": c.contribution,
                    "mean_activation": c.activation,
                    "outliers_alone": c.alone,
                }
                for c in self.candidates[:SHOWN_CANDIDATES]
            ],
            "sweep": [row.as_dict() for row in self.sweep],
            "suppressed": self.selection.suppressed,
            "second_resolution": self.second_resolution.as_dict(),
        }


def find(
    loaded: Loaded,
    traced: Traced,
    sites: Sites,
    share: Share,
    *,
    seed: int,
    force: bool,
    journal_path: Path | None,
    processes: Processes,
    progress: Progress,
    precision: str = PRECISIONS[0],
    parts: dict[Path, Statistics] | None = None,
) -> Found:
    """Find the register neurons of `loaded`; with `force` in a model that was trained with registers, too.

    Args:
        precision: of the pass over all images, one of `PRECISIONS`.
        parts: statistics to decide by, instead of a pass over the images; then `share` is any part's.

    Raises:
        NothingToFixError: the pilot's verdict is not `register_neurons`, or no neurons are the outliers' cause.
        UserError: too few of the images could be read; or `parts` are of another search.
    """
    diagnosis, scorer = _pilot(loaded, traced, sites, share, force, precision, processes, progress)
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
    note = share.note(tried)
    found = processes.decided_by_first(
        lambda: _decide(loaded, traced, sites, scorer, share.pilot, note, diagnosis, sums, ranked, seed, progress)
    )
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
    *,
    force: bool,
    processes: Processes,
    progress: Progress,
    precision: str = PRECISIONS[0],
) -> FoundPart:
    """The pilot, and the pass over the images of one part, whose sums go into the statistics file `path`.

    Raises:
        NothingToFixError: the pilot's verdict is not `register_neurons`.
        UserError: too few of the pilot's images could be read.
    """
    _, scorer = _pilot(loaded, traced, sites, share, force, precision, processes, progress)
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
    force: bool,
    precision: str,
    processes: Processes,
    progress: Progress,
) -> tuple[Diagnosis, Scorer]:
    """Is there a cause to be found, and up to which block."""
    progress.stage("pilot", share.pilot.num_images)
    diagnosis = processes.decided_by_first(
        lambda: diagnose(loaded, traced, sites, share.pilot, force=force, batch_size=BATCH, progress=progress.advance)
    )
    if diagnosis.verdict != "register_neurons":
        raise NothingToFixError(diagnosis)
    last_block = diagnosis.settled_block
    assert last_block is not None
    progress.say(f"{diagnosis.verdict}: {diagnosis.reason}; scoring blocks 0 to {last_block}")
    return diagnosis, Scorer(loaded, traced, sites, last_block, precision=precision)


def _settings(scorer: Scorer, share: Share) -> dict[str, Any]:
    """What sums must have in common to be added."""
    return {
        "regsurgery": regsurgery.__version__,
        "torch": torch.__version__,
        "model": scorer.loaded.source.sha256,
        "preprocessing": scorer.loaded.preprocess_note,
        "images": share.identity,
        "number of images": "all" if share.by_file else len(share.own.chosen),
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
    journal = Journal(path, hashlib.sha256(json.dumps(key).encode()).hexdigest(), progress.say)
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


def _decide(
    loaded: Loaded,
    traced: Traced,
    sites: Sites,
    scorer: Scorer,
    images: ImageSet,
    note: str,
    diagnosis: Diagnosis,
    sums: Sums,
    ranked: Sequence[Candidate],
    seed: int,
    progress: Progress,
) -> Found:
    progress.stage("search")
    pilot = list(images.batches(BATCH, loaded.preprocess))
    batches = pilot[:: max(1, PILOT_IMAGES // TRIAL_IMAGES)]
    trials = Trials(loaded, traced, sites, batches)
    exact, seen = Scorer(loaded, traced, sites, len(scorer.blocks) - 1), scorer.new_sums()
    for batch in batches:
        exact.add(seen, batch)
    selection = select(trials, ranked, seen, pilot, progress.advance)
    if not selection.neurons:
        reason = f"{diagnosis.reason}; but shifting MLP neurons does not reduce them: neurons are not their cause"
        raise NothingToFixError(replace(diagnosis, verdict="unsupported", reason=reason))
    progress.stage("sweep", len(sweep_sizes(len(selection.neurons), len(ranked))) + 3)
    rows = sweep(trials, ranked, selection, sites, seed, progress.advance)
    progress.stage("second resolution")
    second = _second_resolution(loaded, traced, sites, selection.neurons, batches)
    recipe = Recipe(
        by_blocks(selection.neurons),
        model=loaded.source.name,
        provenance=_provenance(loaded, note, diagnosis, selection, sums, ranked, rows, second, seed, scorer.precision),
    )
    return Found(recipe, diagnosis, selection, sums.threshold, sums.num_images, tuple(ranked), tuple(rows), second)


def _second_resolution(
    loaded: Loaded, traced: Traced, sites: Sites, neurons: Neurons, batches: Sequence[torch.Tensor]
) -> SecondResolution:
    """Try the chosen set at another image size; the pictures are resized after preprocessing."""
    size = second_size(traced.image_size, sites.num_tokens - sites.num_prefix)
    try:
        other = backends.library(loaded.library).at_size(loaded, size)
        retraced = trace(other, size)
        resites = match(retraced)
    except UnsupportedModelError:
        return SecondResolution(size, None, f"holds at {_text(traced.image_size)} only: the model takes no other size")
    resized = [
        torch.nn.functional.interpolate(batch.float(), size, mode="bicubic", antialias=True).to(batch.dtype)
        for batch in batches
    ]
    trial = Trials(other, retraced, resites, resized)
    before, after = trial.original.outliers, trial.glance(neurons).outliers
    held = after <= GONE
    verb = "holds" if held else "does not hold"
    note = f"{verb} at {_text(size)}: {before:.2f} outlier tokens per image become {after:.2f}"
    return SecondResolution(size, held, note, before, after)


def second_size(size: tuple[int, int], num_patches: int) -> tuple[int, int]:
    """Another image size of whole patches: half again as large, or two thirds of a large one."""
    height, width = size
    patch = round((height * width / num_patches) ** 0.5)
    factor = 1.5 if max(size) < LARGE_IMAGE else 2 / 3
    return (round(factor * height / patch) * patch, round(factor * width / patch) * patch)


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} pixels"


def _provenance(
    loaded: Loaded,
    note: str,
    diagnosis: Diagnosis,
    selection: Selection,
    sums: Sums,
    ranked: Sequence[Candidate],
    rows: Sequence[Row],
    second: SecondResolution,
    seed: int,
    precision: str,
) -> dict[str, Any]:
    """How the recipe came about; the same model, images and seed give the same text."""
    facts = {
        "found_by": f"regsurgery {regsurgery.__version__} find",
        "source": {"sha256": loaded.source.sha256, "revision": loaded.source.revision},
        "images": note,
        "num_images": sums.num_images,
        "preprocessing": loaded.preprocess_note,
        "seed": seed,
        "positional": diagnosis.positional,
        "emergence_block": diagnosis.emergence_block,
        "settled_block": diagnosis.settled_block,
        "threshold": sums.threshold,
        "outliers_per_image": {"original": diagnosis.outliers_per_image, "patched": selection.glance.outliers},
        "suppressed": selection.suppressed,
        "candidates": [
            {
                "block": c.block,
                "index": c.neuron,
                "contribution": c.contribution,
                "mean_activation": c.activation,
                "outliers_alone": c.alone,
            }
            for c in ranked[:SHOWN_CANDIDATES]
        ],
        "sweep": [row.as_dict() for row in rows],
        "second_resolution": second.as_dict(),
        **({} if precision == PRECISIONS[0] else {"scores_in": precision}),
    }
    return _rounded(facts)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value
