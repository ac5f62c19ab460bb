"""How `find` decides: scores -> the smallest set of neurons -> the setting with the least drift -> a recipe.

Everything here uses few images: neurons are found and grown on the pilot's images, settings are compared on others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from regsurgery.compiler.located import Located, OfLocated
from regsurgery.compiler.match import match
from regsurgery.compiler.trace import trace
from regsurgery.errors import NothingToFixError, UnsupportedModelError, UserError
from regsurgery.frontends.image_size import text
from regsurgery.frontends.libraries import frontend
from regsurgery.images.digests import image_digests
from regsurgery.images.tars import Tars
from regsurgery.options import PRECISIONS, SearchOptions
from regsurgery.recipe import REFERENCE, Recipe
from regsurgery.runtime.surgery import registers_for
from regsurgery.search.diagnosis import Diagnosis
from regsurgery.search.drift import DriftTrials, Graphs, Setting
from regsurgery.search.faithful import FILLS, Choice, Cure, SettingRow, choose, grow, register_counts
from regsurgery.search.journal import TrialJournal
from regsurgery.search.reference import Ranking, rank, sweep
from regsurgery.search.scores import Candidate, Scorer, Sums
from regsurgery.search.selection import GONE, Selection, select
from regsurgery.search.shares import BATCH, PILOT_IMAGES, Share
from regsurgery.search.trials import Trials
from regsurgery.version import __version__

if TYPE_CHECKING:
    from regsurgery.progress import Progress

TRIAL_IMAGES = 16  # of the pilot's images, for every trial of a set
MAX_TRIED_AGAIN = 3  # settings that are tried at the second image size
SHOWN_CANDIDATES = 10
LISTED_IMAGES = 1024  # a recipe lists the digests of at most this many images
LARGE_IMAGE = 320  # pixels; below it, the second resolution is 1.5 times as large, above it two thirds
DIGITS = 4  # significant digits of every figure in a recipe


@dataclass(frozen=True)
class SecondResolution:
    """The chosen setting at another image size, on the pilot's images.

    Attributes:
        image_size: (height, width).
        held: whether the outliers are gone there too, if there are any; None if the model takes no other size.
        note: the same as a line of text.
        original, patched: outliers per image.
        drift: number of registers -> drift with it.
        num_patches: at the model's own size, if the number of registers is to follow the number of patches.
    """

    image_size: tuple[int, int]
    held: bool | None
    note: str
    original: float | None = None
    patched: float | None = None
    drift: Mapping[int, float] = field(default_factory=dict)
    num_patches: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "image_size": list(self.image_size),
            "held": self.held,
            "outliers_per_image": {"original": self.original, "patched": self.patched},
            "drift": {str(count): drift for count, drift in self.drift.items()},
            "note": self.note,
        }


@dataclass(frozen=True)
class Found:
    """What `find` found.

    Attributes:
        threshold: mean over the images of the norm above which a patch is an outlier, after block `settled_block` of
            the diagnosis.
        smallest: the smallest set that suppresses the outliers, with one register: the paper's setting.
        choice: the setting of the recipe, and the table it was chosen from.
        num_images: images that the scores are summed over.
        candidates: the best by contribution.
        judged_on: description of the images that settings were compared on.
        reference: the authors' ranking, where their method was asked for; `recipe` is then theirs.
    """

    recipe: Recipe
    diagnosis: Diagnosis
    smallest: Selection
    choice: Choice
    threshold: float
    num_images: int
    candidates: tuple[Candidate, ...]
    second_resolution: SecondResolution
    judged_on: str
    reference: Ranking | None = None

    @property
    def remaining(self) -> float:
        """Outliers per image that the paper's setting leaves, ours or as the authors' code has it."""
        if self.reference is None:
            return self.smallest.glance.outliers
        return next(float(row.tried.outliers.mean()) for row in self.choice.rows if row.chosen)

    @property
    def suppressed(self) -> bool:
        """Whether shifting removes the outliers, and, of our own settings, the registers take over their norm."""
        return self.smallest.suppressed if self.reference is None else self.remaining <= GONE

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
            "num_registers": self.recipe.num_registers,
            "fill": self.recipe.fill,
            "judged_on": self.judged_on,
            "sweep": [row.as_dict() for row in self.choice.rows],
            "suppressed": self.suppressed,
            "second_resolution": self.second_resolution.as_dict(),
            **({} if self.reference is None else {"reference": _of_reference(self.reference)}),
        }


@dataclass(frozen=True)
class Search(OfLocated):
    """The inputs of a decision.

    Attributes:
        share: its pilot and its judging images are used.
        note: description of all images of the search.
        journal: remembers what was tried, so that a stopped search continues.
        graphs: of the model with registers, for all `trials`.
    """

    located: Located
    scorer: Scorer
    share: Share
    note: str
    options: SearchOptions
    progress: Progress
    journal: TrialJournal
    graphs: Graphs = field(default_factory=dict)

    def trials(self, name: str, images: Sequence[torch.Tensor]) -> DriftTrials:
        """Trials on the batches `images`; `name` distinguishes them from other trials."""
        return self.at(name, self.located, images, self.graphs)

    def at(
        self,
        name: str,
        located: Located,
        images: Sequence[torch.Tensor],
        graphs: Graphs | None = None,
    ) -> DriftTrials:
        """Like `trials`, for the model at another image size."""

        def done() -> None:
            self.journal.write()
            self.progress.advance(1)

        memo = self.journal.trials.setdefault(name, {})
        return DriftTrials(located, images, memo=memo, graphs=graphs, done=done)


def decide(search: Search, diagnosis: Diagnosis, sums: Sums, ranked: Sequence[Candidate]) -> Found:
    """Choose among `ranked`, the candidates of `sums`, best first.

    Raises:
        NothingToFixError: the outliers are not caused by neurons.
    """
    progress, loaded = search.progress, search.loaded
    progress.stage("search")
    pilot = list(search.share.pilot.batches(BATCH, loaded.preprocess))
    batches = pilot[:: max(1, PILOT_IMAGES // TRIAL_IMAGES)]
    trials = Trials(search.located, batches)
    exact, seen = Scorer(search.located, len(search.scorer.blocks) - 1), search.scorer.new_sums()
    for batch in batches:
        exact.add(seen, batch)
    smallest = select(trials, ranked, seen, pilot, progress.advance)
    if not smallest.neurons:
        reason = f"{diagnosis.reason}; but shifting MLP neurons does not reduce them, so neurons are not their cause"
        raise NothingToFixError(replace(diagnosis, verdict="unsupported", reason=reason))
    cure = Cure(trials.original.outliers, max(GONE, smallest.glance.outliers), trials.outlier_norm)
    judging, judged_on = _judging(search, pilot)
    choice = _choose(search, cure, smallest, [(c.block, c.neuron) for c in ranked], batches, judging)
    progress.stage("second resolution")
    choice, second = _second_resolution(search, cure, choice)
    num_patches, reference = second.num_patches, None
    if search.options.compat == REFERENCE:
        reference, row = _reference(search, cure, diagnosis, batches, judging)
        choice, num_patches, second = choice.beside(row), None, replace(second, note=f"ours {second.note}")
    recipe = replace(choice.setting.recipe(), model=loaded.source.name, num_patches=num_patches)
    found = Found(
        recipe=recipe,
        diagnosis=diagnosis,
        smallest=smallest,
        choice=choice,
        threshold=sums.threshold,
        num_images=sums.num_images,
        candidates=tuple(ranked),
        second_resolution=second,
        judged_on=judged_on,
        reference=reference,
    )
    return replace(found, recipe=replace(recipe, provenance=_rounded(_facts(search, found))))


def _reference(
    search: Search,
    cure: Cure,
    diagnosis: Diagnosis,
    batches: Sequence[torch.Tensor],
    judging: Sequence[torch.Tensor],
) -> tuple[Ranking, SettingRow]:
    """The authors' method: the ranking, and its setting, tried on the images `judging`.

    Raises:
        UserError: a hyperparameter cannot be used; see `reference`.
    """
    options, progress = search.options, search.progress
    own = search.share.own
    progress.stage("reference", own.num_images)
    assert diagnosis.emergence_block is not None
    ranking = rank(search.located, own, diagnosis.emergence_block, options, progress.advance)

    def setting(count: int) -> Setting:
        return Setting(ranking.best(count), options.num_registers or 1, compat=REFERENCE)

    progress.stage("reference: number of neurons")
    grown, ranked = search.trials("reference", batches), f"{len(ranking.scored)} neurons are ranked"
    top_k = options.top_k or sweep(lambda count: cure.gone(grown(setting(count))), len(ranking.scored))
    if top_k is None:
        raise UserError(
            f"--compat reference: {ranked} in blocks 0 to {ranking.top_layer}, and no number of the best suppresses "
            "the outliers; give --top-k, or another --top-layer"
        )
    if top_k > len(ranking.scored):
        raise UserError(f"--top-k {top_k}: only {ranked} in blocks 0 to {ranking.top_layer}")
    tried = search.trials("reference, judged", judging)(setting(top_k))
    cost = 100 * setting(top_k).num_registers / search.sites.num_tokens
    progress.say(
        f"reference: {ranking.num_outliers / own.num_images:.2f} patches per image above {ranking.threshold:.4g} after "
        f"block {ranking.detect_block}; top_layer {ranking.top_layer}, top_k {top_k}"
    )
    return ranking, SettingRow(f"reference, top_k {top_k}", setting(top_k), tried, cost)


def _facts(search: Search, found: Found) -> dict[str, Any]:
    """What a recipe records about how it was found."""
    recipe, diagnosis, loaded = found.recipe, found.diagnosis, search.loaded
    chosen = {
        "register_neurons": {block: list(neurons) for block, neurons in recipe.register_neurons.items()},
        "num_registers": recipe.num_registers,
        "fill": recipe.fill,
        "num_patches": recipe.num_patches,
    }
    return {
        "found_by": f"regsurgery {__version__} find",
        "chosen": chosen,
        "source": {"sha256": loaded.source.sha256, "revision": loaded.source.revision},
        "images": search.note,
        "num_images": found.num_images,
        "evidence": search.share.pilot.evidence,
        "judged_on": found.judged_on,
        "preprocessing": loaded.preprocess_note,
        "seed": search.options.seed,
        **({} if search.scorer.precision == PRECISIONS[0] else {"scores_in": search.scorer.precision}),
        "positional": diagnosis.positional,
        "emergence_block": diagnosis.emergence_block,
        "settled_block": diagnosis.settled_block,
        "threshold": found.threshold,
        "outliers_per_image": {"original": diagnosis.outliers_per_image, "patched": found.remaining},
        "suppressed": found.suppressed,
        "candidates": [
            {
                "block": c.block,
                "index": c.neuron,
                "contribution": c.contribution,
                "mean_activation": c.activation,
                "outliers_alone": c.alone,
            }
            for c in found.candidates[:SHOWN_CANDIDATES]
        ],
        "sweep": [row.as_dict() for row in found.choice.rows],
        "second_resolution": found.second_resolution.as_dict(),
        **({} if found.reference is None else {"reference": _of_reference(found.reference)}),
        "images_seen": _images_seen(search.share),
    }


def _of_reference(ranking: Ranking) -> dict[str, Any]:
    return {
        "norm_threshold": ranking.threshold,
        "detect_block": ranking.detect_block,
        "top_layer": ranking.top_layer,
        "num_images": ranking.num_images,
        "num_outliers": ranking.num_outliers,
        "scores": [[block, neuron, score] for block, neuron, score in ranking.scored[:SHOWN_CANDIDATES]],
    }


def _images_seen(share: Share) -> list[str]:
    """Digests of the images that took part in the search; for more than `LISTED_IMAGES`, and for tars, which need not
    all be at hand, only those that decided.
    """
    sets = [share.pilot, *([share.judging] if share.judging is not None else [])]
    if share.own.num_images <= LISTED_IMAGES and not isinstance(share.own.source, Tars):
        sets.append(share.own)
    return sorted({digest for images in sets for digest in image_digests(images)})


def _judging(search: Search, pilot: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], str]:
    """The images that settings are compared on, and their description."""
    judging = search.share.judging
    if judging is not None:
        return list(judging.batches(BATCH, search.loaded.preprocess)), judging.note
    others = [batch for number, batch in enumerate(pilot) if number % max(1, PILOT_IMAGES // TRIAL_IMAGES)]
    count = sum(map(len, others or pilot))
    what = "that neurons were not grown on" if others else "of the search itself: too few for others"
    return list(others or pilot), f"{count} images {what}"


def _choose(
    search: Search,
    cure: Cure,
    smallest: Selection,
    ranked: Sequence[tuple[int, int]],
    batches: Sequence[torch.Tensor],
    judging: Sequence[torch.Tensor],
) -> Choice:
    """Grow sets of neurons by drift on `batches`, and choose a setting on the images `judging`."""
    search.progress.stage("drift")
    wanted = search.options
    counts = register_counts(cure.original, 1 if wanted.smallest and not wanted.num_registers else wanted.num_registers)
    pool = () if wanted.smallest else ranked
    sets, count = [smallest.neurons], min(counts)
    if not wanted.smallest:
        sets, count = grow(search.trials("grow", batches), smallest.neurons, pool, cure, counts)
    trials = search.trials("judge", judging)
    fills = () if wanted.smallest else FILLS
    return choose(trials, sets, count, cure, counts, search.sites.num_tokens, ranked=ranked, fills=fills)


def _second_resolution(search: Search, cure: Cure, choice: Choice) -> tuple[Choice, SecondResolution]:
    """Try the chosen setting at another image size, and the next best ones where outliers come back there.

    Then decide whether the same number of registers drifts less there, or one that follows the number of patches.
    """
    loaded, sites, own = search.loaded, search.sites, search.located.traced.image_size
    num_patches = sites.num_tokens - sites.num_prefix
    size = second_size(own, num_patches)
    try:
        other = frontend(loaded.library).at_size(loaded, size)
        retraced = trace(other, size)
        resized = Located(other, retraced, match(retraced))
    except UnsupportedModelError:
        return choice, SecondResolution(size, None, f"holds at {text(own)} only: the model takes no other size")
    images = list(search.share.pilot.some(TRIAL_IMAGES).batches(BATCH, other.preprocess))
    trials = search.at("second resolution", resized, images)
    setting = next((one for one in choice.ranked[:MAX_TRIED_AGAIN] if cure.gone(trials(one))), choice.setting)
    tried = trials(setting)
    held, before, after = cure.gone(tried), trials.original_outliers, float(tried.outliers.mean())
    verb = "holds" if held else "does not hold"
    note = f"{verb} at {text(size)}: {before:.2f} outlier tokens per image become {after:.2f}"
    count = registers_for(resized.sites.num_tokens - resized.sites.num_prefix, setting.num_registers, num_patches)
    drift = {setting.num_registers: float(tried.drift.mean())}
    follows = False
    if count != setting.num_registers and sites.placement == "end" and search.options.registers_are_free:
        scaled = trials(replace(setting, num_registers=count))
        drift[count] = float(scaled.drift.mean())
        more, _ = tried.worse_than(scaled)  # if in doubt, follow: larger images have more outliers
        follows = more > 0 and cure.gone(scaled)
        better = (
            f"{count} registers drift less than {setting.num_registers}" if follows else "no other number is better"
        )
        note = f"{note}; {better} there"
    found = SecondResolution(size, held, note, before, after, drift, num_patches if follows else None)
    return choice.with_setting(setting), found


def second_size(size: tuple[int, int], num_patches: int) -> tuple[int, int]:
    """Another image size of whole patches: half again as large, or two thirds of a large one."""
    height, width = size
    patch = round((height * width / num_patches) ** 0.5)
    factor = 1.5 if max(size) < LARGE_IMAGE else 2 / 3
    return (round(factor * height / patch) * patch, round(factor * width / patch) * patch)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value
