"""`find`, aloud: pilot -> scores over all images -> the set that the search chooses -> a recipe that says how."""

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
from regsurgery.recipe import Recipe
from regsurgery.scores import Candidate, Scorer, Sums, candidates
from regsurgery.sites import Sites
from regsurgery.trace import Traced, trace
from regsurgery.trials import Neurons, Trials, by_blocks

if TYPE_CHECKING:
    from regsurgery.pipeline import Progress

BATCH = 8
PILOT_IMAGES = 32  # for the diagnosis
TRIAL_IMAGES = 16  # of them, for every trial of a set
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
    images: ImageSet,
    *,
    seed: int,
    journal_path: Path | None,
    force: bool,
    processes: Processes,
    progress: Progress,
) -> Found:
    """Find the register neurons of `loaded`; with `force` in a model that was trained with registers, too.

    Raises:
        NothingToFixError: the pilot's verdict is not `register_neurons`, or no neurons are the outliers' cause.
        UserError: too few of the images could be read.
    """
    pilot = images.some(PILOT_IMAGES)
    progress.stage("pilot", pilot.num_images)
    diagnosis = processes.decided_by_first(
        lambda: diagnose(loaded, traced, sites, pilot, force=force, batch_size=BATCH, progress=progress.advance)
    )
    if diagnosis.verdict != "register_neurons":
        raise NothingToFixError(diagnosis)
    last_block = diagnosis.settled_block
    assert last_block is not None
    progress.say(f"{diagnosis.verdict}: {diagnosis.reason}; scoring blocks 0 to {last_block}")
    scorer = Scorer(loaded, traced, sites, last_block)
    sums, journal = _score(scorer, loaded, images, last_block, journal_path, processes, progress)
    ranked = candidates(sums, scorer.columns_H, MAX_CANDIDATES)
    found = processes.decided_by_first(
        lambda: _decide(loaded, traced, sites, scorer, images, diagnosis, sums, ranked, seed, progress)
    )
    journal.remove()
    return found


def _score(
    scorer: Scorer,
    loaded: Loaded,
    images: ImageSet,
    last_block: int,
    path: Path | None,
    processes: Processes,
    progress: Progress,
) -> tuple[Sums, Journal]:
    """The pass over all images; every process takes every `processes.count`-th batch."""
    sums = scorer.new_sums()
    settings = (regsurgery.__version__, torch.__version__, loaded.source.sha256, loaded.preprocess_note,
                images.source.fingerprint(), repr(images.chosen), BATCH, last_block, processes.count)  # fmt: skip
    if path is not None and processes.count > 1:
        path = path.with_name(f"{path.name}.{processes.rank}-of-{processes.count}")
    journal = Journal(path, hashlib.sha256(json.dumps(settings).encode()).hexdigest(), progress.say)
    last, broken = journal.resume(sums)
    images.broken.update(broken)
    progress.stage("scores", len(range(processes.rank * BATCH, images.num_images, processes.count * BATCH)) * BATCH)
    progress.advance(sums.num_images)
    first = processes.rank if last < 0 else last + processes.count
    for last, batch in images.numbered_batches(BATCH, loaded.preprocess, first=first, step=processes.count):
        scorer.add(sums, batch)
        journal.write(sums, last, images.broken)
        progress.advance(len(batch))
    journal.write(sums, last, images.broken, now=True)
    processes.add_up(sums.tensors())
    return sums, journal


def _decide(
    loaded: Loaded,
    traced: Traced,
    sites: Sites,
    scorer: Scorer,
    images: ImageSet,
    diagnosis: Diagnosis,
    sums: Sums,
    ranked: Sequence[Candidate],
    seed: int,
    progress: Progress,
) -> Found:
    progress.stage("search")
    pilot = list(images.some(PILOT_IMAGES).batches(BATCH, loaded.preprocess))
    batches = pilot[:: max(1, PILOT_IMAGES // TRIAL_IMAGES)]
    trials = Trials(loaded, traced, sites, batches)
    seen = scorer.new_sums()
    for batch in batches:
        scorer.add(seen, batch)
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
        provenance=_provenance(loaded, images.note, diagnosis, selection, sums, ranked, rows, second, seed),
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
    }
    return _rounded(facts)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value
