"""`doctor`, `find`, `patch` and `verify`, aloud.

`patch` is the line: recipe (given, bundled or found) + checkpoint -> load -> trace -> match -> passes -> verify ->
emit.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery import backends, checkpoint_io
from regsurgery.copying import copy_file
from regsurgery.errors import (
    CheckpointError,
    OutputError,
    RecipeError,
    UnsupportedModelError,
    UserError,
    VerificationError,
    did_you_mean,
)
from regsurgery.families import family_of
from regsurgery.loading import Loaded, LoadOptions
from regsurgery.loading import load as load_original
from regsurgery.original import restore_original
from regsurgery.patched import PatchedFolder, at_home, open_patched, reloaded, take_our_tensors
from regsurgery.recipe import MAX_REGISTERS, MODES, Recipe, find_recipe, recipe_for_model

if TYPE_CHECKING:
    from regsurgery.calibration import ImageSet
    from regsurgery.deciding import FindOptions, Found
    from regsurgery.diagnosis import Diagnosis
    from regsurgery.distributed import Processes
    from regsurgery.sharing import FoundPart, Part, Share
    from regsurgery.sites import Sites
    from regsurgery.size_drift import SizeDrifts
    from regsurgery.stats_file import Statistics
    from regsurgery.surgery import Surgery
    from regsurgery.trace import Traced
    from regsurgery.verdict import Verdict


HELD_OUT = 30  # of the user's images, at least so many are for verification alone, where there are three times as many
GENERATED_TO_FIT = 128  # pictures to fit on where the user gives none
SEARCH, FIT, UNSEEN = "search", "fit", "unseen"  # what pictures are for
GENERATED_TO_CHECK = 32  # pictures of another kind
NOT_CALIBRATED = (
    "native: not calibrated, which needs photos; give some with --images DIR (generated pictures mislead it)"
)


class Progress:
    """What the pipeline tells about itself while it runs; the command line draws it. This one is silent."""

    def stage(self, name: str, total: int | None = None, *, in_bytes: bool = False) -> None:
        """A new stage begins; `total` images where it goes over images, or bytes."""

    def advance(self, number: int) -> None:
        """That many images or bytes are done."""

    def say(self, line: str) -> None:
        """A fact worth a line."""


@dataclass(frozen=True)
class PatchResult:
    """What `patch` did. `output` is None for a dry run, `verdict` and `sizes` where nothing was verified.

    `seconds` and `peak_rss_mb` are of the whole process so far.
    """

    output: str | None
    mode: str
    format: str
    recipe: Recipe
    verdict: Verdict | None
    sizes: SizeDrifts | None
    seconds: float
    peak_rss_mb: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "mode": self.mode,
            "format": self.format,
            "register_neurons": {str(b): list(neurons) for b, neurons in self.recipe.register_neurons.items()},
            "verify": None if self.verdict is None else self.verdict.as_dict(),
            "sizes": [] if self.sizes is None else self.sizes.as_dicts(),
            "seconds": round(self.seconds, 3),
            "peak_rss_mb": round(self.peak_rss_mb, 1),
        }


def patch(
    model: str,
    output: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    mode: str | None = None,
    calibrate: bool | None = None,
    stop_after: int | None = None,
    format: str | None = None,
    num_registers: int | None = None,
    smallest: bool = False,
    image_size: int | None = None,
    images: str | Path | ImageSet | None = None,
    num_images: int | None = None,
    seed: int = 0,
    force: bool = False,
    options: LoadOptions | None = None,
    link: bool = False,
    verification: bool = True,
    strict: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PatchResult:
    """Patch `model` and write the patched checkpoint to the new folder `output`.

    Args:
        model: folder, Hub id, `timm:NAME`, `open_clip:ARCH/TAG` or `demo`.
        recipe: a `Recipe`, a recipe file or the name of a bundled recipe. By default the bundled one for `model`, if
            there is one and its verification passes; else the neurons are found.
        mode: one of `recipe.MODES`; by default the recipe's.
        calibrate: native mode: train the register neurons' output columns on the images; by default where photos are
            given. On generated pictures it is kept only where it gains on those of another kind, too.
        stop_after: native mode: end calibration after that many steps, as a run did that was interrupted there.
        format: one of `backends.FORMATS`; by default that of the model's library, or in native mode the one of a stock
            host.
        num_registers: that many register tokens; by default the recipe's, or as many as drift least.
        smallest: where neurons are found: the smallest set, with one register; see `find`.
        image_size: side in pixels of the images that neurons are found, registers counted and the result verified on,
            by default the model's own. What is written has the original's tensors, at their own size.
        images: where images for finding, fitting and verification are, see `calibration.image_set`, or themselves. What
            is found or fitted on images is verified on others.
        seed: of generated pictures.
        force: find neurons in a model that was trained with registers, too.
        link: make hard links of shards that stay what they are, where the file system can.
        verification: compare original and patched model on images; without, the folder says that nobody did, and files
            whose sha256 the Hub gave are not looked through for NaN.
        strict: warnings of the verification, and too few images to judge, are failures.
        dry_run: do everything, but write nothing to `output`.

    Raises:
        NothingToFixError: no recipe was given, and surgery is not the cure.
        UserError: the input is at fault; see `errors`.
        VerificationError: the patched model fails verification; `output` is not created.
    """
    from regsurgery.calibration import ImageSet, another_kind, image_set
    from regsurgery.deciding import FindOptions
    from regsurgery.sharing import Share

    started = time.monotonic()
    progress = progress or Progress()
    output = Path(output)
    if not dry_run:
        checkpoint_io.check_output(output)
    for name, chosen, known in (("format", format, backends.FORMATS), ("mode", mode, MODES)):
        if chosen is not None and chosen not in known:
            raise UserError(f"{name} {chosen}: not one of {', '.join(known)}{did_you_mean(chosen, list(known))}")
    _check_registers(num_registers)
    if format is not None:
        backends.require(format)
    given = None if recipe is None else _given_recipe(model, recipe, progress)
    pictures = images if isinstance(images, ImageSet) else image_set(images, num_images, seed=seed, say=progress.say)

    photos = pictures.evidence == "photos"
    wants_calibration = photos if calibrate is None else calibrate
    linked = link or dry_run
    # Without a recipe there may be nothing to fix; other formats and modes have files of their own.
    copied = given is not None and (mode or given.mode) != "native" and (format or "") not in ("pt2", "onnx")

    with checkpoint_io.copies_ahead(output) as copies:

        def copy_shards(weights: Sequence[Path]) -> None:
            if copied and not linked and checkpoint_io.index_of(weights) is not None:
                copies.start(weights)

        loaded, traced, sites = load_and_locate(
            model,
            options,
            progress,
            format,
            image_size,
            look_through=verification,
            use_meanwhile=copy_shards,
        )
        progress.say(f"preprocessing: {loaded.preprocess_note}; images: {pictures.note}")
        if family_of(loaded.library, loaded.architecture) is None:
            progress.say(
                f"{loaded.architecture} is none of the families that the tests cover (regsurgery families); its sites "
                "were found in its graph, and what is written is verified all the same"
            )

        def operate_and_write(chosen: Recipe, seen: tuple[ImageSet, ImageSet] | None = None) -> PatchResult:
            from regsurgery.fitting import FIT_IMAGES, perform_bias, perform_native
            from regsurgery.run_record import fitted_digests, run_of
            from regsurgery.surgery import perform

            if num_registers not in (None, chosen.num_registers):
                chosen = chosen.with_num_registers(num_registers)
            if mode is not None:
                chosen = chosen.with_mode(mode)
            fmt = _format(format, loaded, chosen, progress)
            progress.stage("surgery")
            fit, unseen = None, pictures if seen is None else seen[1]
            if chosen.mode == "shift":
                with _objects_stay():
                    surgery = perform(loaded, chosen, traced, sites)
            else:
                reused = seen is not None and photos and seen[0] is not seen[1]
                fit, unseen = seen if reused else _disjoint(images, pictures, seed, FIT)  # type: ignore[misc]
                if chosen.mode == "bias":
                    surgery = perform_bias(loaded, chosen, traced, sites, fit, progress=progress)
                else:
                    surgery = perform_native(
                        loaded,
                        chosen,
                        traced,
                        sites,
                        fit,
                        calibration=wants_calibration,
                        check=None if photos else another_kind(GENERATED_TO_CHECK, seed=seed),
                        stop_after=stop_after,
                        seed=seed,
                        progress=progress,
                    )
                    if calibrate is None and not photos:
                        progress.say(NOT_CALIBRATED)
            fitted = fitted_digests(chosen, None if fit is None else fit.some(FIT_IMAGES))
            with tempfile.TemporaryDirectory() as nowhere:
                target = Path(nowhere) / "dry-run" if dry_run else output
                surgery = replace(surgery, place=partial(copy_file, link=True) if linked else copies.place)
                run = run_of(
                    loaded,
                    chosen,
                    fmt,
                    pictures if verification or chosen.mode != "shift" else None,
                    fitted,
                    calibrate=wants_calibration,
                    stopped_after=_stopped_after(surgery),
                    seed=seed,
                    num_images=num_images,
                    force=force,
                    verification=verification,
                    image_size=image_size,
                )
                shown = unseen if verification else None
                verdict, sizes = _write(surgery, target, fmt, shown, run, progress, strict=strict)
            seconds = time.monotonic() - started
            return PatchResult(
                None if dry_run else str(output), chosen.mode, fmt, chosen, verdict, sizes, seconds, _peak_rss_mb()
            )

        if given is not None:
            try:
                return operate_and_write(given)
            except RecipeError as error:
                raise error if isinstance(recipe, Recipe) else RecipeError(f"{recipe}: {error}") from error
        bundled = recipe_for_model(loaded.source.repo or loaded.source.id)
        if bundled is not None:
            name, chosen = bundled
            progress.say(f"recipe: {name} (bundled)")
            try:
                return operate_and_write(chosen)
            except (RecipeError, VerificationError) as error:
                progress.say(f"recipe {name} does not fit this model ({error}); finding its register neurons instead")
        journal = None if dry_run else output.absolute().with_name(f".{output.name}.journal")
        searched, unseen = _disjoint(images, pictures, seed, SEARCH)
        wanted = FindOptions(seed, force, smallest=smallest, num_registers=num_registers)
        found = _find(loaded, traced, sites, Share.of(searched), wanted, journal, progress)
        return operate_and_write(found.recipe, (searched, unseen))


def _stopped_after(surgery: Surgery) -> int | None:
    """How many steps of calibration were run, where it was interrupted."""
    calibration = surgery.config_block.get("fit", {}).get("calibration") or {}
    return calibration.get("stopped_after")


def _format(wanted: str | None, loaded: Loaded, recipe: Recipe, progress: Progress) -> str:
    """The format to write: `wanted`, or the one that suits the model and the mode.

    Raises:
        UserError: the mode cannot write that format.
        UnsupportedModelError: native mode: the stock host has no room for the model.
    """
    from regsurgery.backends.canonical import default_host

    fmt = wanted or (default_host(loaded) if recipe.mode == "native" else loaded.library)
    if fmt not in backends.LIBRARIES:
        _check_memory(loaded, f"format {fmt} is written")
    elif recipe.mode == "native":
        progress.say(f"native host: {fmt}, unmodified")
        if loaded.own is not None and not backends.any_size(fmt, "native"):
            raise UserError(
                f"--image-size: in native mode format {fmt} takes the model's own size only; use --format timm"
            )
        backends.backend(fmt, "native").check(loaded.own or loaded, recipe.num_registers)
    elif fmt != loaded.library:
        raise UserError(
            f"format {fmt}: {loaded.source.id} is a {loaded.library} checkpoint, which mode {recipe.mode} writes as "
            f"{loaded.library}, pt2 or onnx"
        )
    return fmt


def _check_memory(loaded: Loaded, what: str) -> None:
    if loaded.stored:
        size = sum(path.stat().st_size for path in loaded.weights) / 1e9
        raise UserError(
            f"{loaded.source.id}: {what} with all weights in memory, and they are {size:.1f} GB; allow that with "
            f"--max-memory {size + 0.1:.1f}GB, or write the model's own format"
        )


def _disjoint(
    images: str | Path | ImageSet | None, pictures: ImageSet, seed: int, purpose: str
) -> tuple[ImageSet, ImageSet]:
    """Images to search or fit on, and others to verify on; few photos of a search are all for both.

    Of the user's images a fifth is for verification, but at least `HELD_OUT`, and at most a third.
    """
    from regsurgery.calibration import MIN_IMAGES, ImageSet, image_set
    from regsurgery.sharing import MIN_DIVIDED

    total = pictures.num_images
    if pictures.evidence == "generated":
        if purpose == SEARCH:
            return pictures, image_set(None, total, seed=seed, purpose=UNSEEN)
        return image_set(None, GENERATED_TO_FIT, seed=seed, purpose=purpose), pictures
    if purpose == SEARCH and total < MIN_DIVIDED:
        return pictures, pictures
    if total < 2 * MIN_IMAGES:
        where = pictures.note if isinstance(images, ImageSet) else images
        raise UserError(
            f"{where}: {total} images, at least {2 * MIN_IMAGES} are needed to fit on some and verify on others"
        )
    fit, unseen = pictures.hold_out(max(MIN_IMAGES, min(total // 3, max(HELD_OUT, total // 5))))
    return fit, replace(unseen, note=f"{unseen.num_images} of the {pictures.note}, held out")


def find(
    model: str,
    output: str | Path | None = None,
    *,
    images: str | Path | None = None,
    num_images: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    force: bool = False,
    precision: str = "checkpoint",
    smallest: bool = False,
    num_registers: int | None = None,
    merge: Sequence[str | Path] = (),
    options: LoadOptions | None = None,
    progress: Progress | None = None,
) -> Found:
    """Find the register neurons of `model`, how many registers they need, and what the patches keep.

    Of the settings that leave no outlier token it is the one whose outputs drift least from the original's, on images
    that took no part in the search.

    Started by `torchrun` or `accelerate launch`, the processes share out the images; the first one writes.

    Args:
        output: recipe file to write. A recipe that `find` wrote there before is replaced, anything else refused. Beside
            it lies a journal (`<output>.journal`) while the search runs; with it a killed search continues.
        images, num_images: see `calibration.image_set`.
        image_size: side of the images in pixels, by default the model's own.
        seed: of generated pictures and of the control with random neurons.
        force: search a model that was trained with registers, too.
        precision: of the pass over all images: `checkpoint`, as the checkpoint is, or `bf16`, under autocast, with sums
            in float32 and float64. What is decided on the pilot's images always is as the checkpoint is.
        smallest: the smallest set of neurons that suppresses the outlier tokens, with one register, whatever it drifts.
        num_registers: that many registers; by default as many as drift least.
        merge: statistics files of all parts, in any order, that `find_part` wrote for the same model, images and
            options: decide by them, without a pass over the images. The recipe is that of a search in one process.

    Raises:
        NothingToFixError: there are no outlier tokens, or MLP neurons are not their cause.
        UserError: the input is at fault; see `errors`.
    """
    from regsurgery.deciding import FindOptions
    from regsurgery.distributed import processes

    _check_precision(precision)
    _check_registers(num_registers)
    wanted = FindOptions(seed, force, precision, smallest, num_registers)
    progress = progress or Progress()
    if output is not None:
        output = Path(output)
        _check_recipe_output(output)
    with processes() as group:
        parts, part = None, None
        if merge:
            from regsurgery.sharing import Part
            from regsurgery.stats_file import read_parts

            parts = read_parts([Path(path) for path in merge])
            part = Part(1, len(parts))  # any will do, to look at the pilot's images and no more than needed
        loaded, traced, sites, share = _shared(
            model, images, num_images, image_size, seed, part, options, progress, group
        )
        journal = None if output is None else output.absolute().with_name(f"{output.name}.journal")
        found = _find(loaded, traced, sites, share, wanted, journal, progress, group, parts)
        if output is not None and group.is_first:
            checkpoint_io.replace_file(output, found.recipe.to_yaml().encode())
    return found


def find_part(
    model: str,
    stats: str | Path,
    part: tuple[int, int],
    *,
    images: str | Path | None = None,
    num_images: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    force: bool = False,
    precision: str = "checkpoint",
    options: LoadOptions | None = None,
    progress: Progress | None = None,
) -> FoundPart:
    """Run one part of `find`, as a job of an array; `find(merge=...)` puts the parts together.

    Args:
        stats: statistics file to write; one that is there is replaced, anything else refused. Beside it lies a journal
            (`<stats>.journal`) while the part runs; with it a killed part continues.
        part: `(i, n)`, the i-th of n parts, i from 1. Parts share the images by batches of 8, or, where WebDataset tars
            are at least n and `num_images` is not given, by whole tars.

    Other arguments are those of `find`, and the same in every part.

    Raises:
        NothingToFixError: there are no outlier tokens, or MLP neurons are not their cause.
        UserError: the input is at fault; see `errors`.
    """
    from regsurgery.deciding import FindOptions
    from regsurgery.distributed import processes
    from regsurgery.finding import find_part as search
    from regsurgery.sharing import Part
    from regsurgery.stats_file import check_statistics_output

    _check_precision(precision)
    progress, stats = progress or Progress(), Path(stats)
    chosen = Part.parse(f"{part[0]}/{part[1]}")
    check_statistics_output(stats)
    with processes() as group:
        loaded, traced, sites, share = _shared(
            model, images, num_images, image_size, seed, chosen, options, progress, group
        )
        return search(
            loaded,
            traced,
            sites,
            share,
            chosen,
            stats,
            FindOptions(seed, force, precision),
            processes=group,
            progress=progress,
        )


def _shared(
    model: str,
    images: str | Path | None,
    num_images: int | None,
    image_size: int | None,
    seed: int,
    part: Part | None,
    options: LoadOptions | None,
    progress: Progress,
    group: Processes,
) -> tuple[Loaded, Traced, Sites, Share]:
    from regsurgery.sharing import share_out

    share = share_out(images, num_images, seed=seed, say=progress.say, part=part, processes=group)
    loaded, traced, sites = load_and_locate(model, options, progress, image_size=image_size)
    progress.say(f"preprocessing: {loaded.preprocess_note}; images: {share.own.note}")
    return loaded, traced, sites, share


def _find(
    loaded: Loaded,
    traced: Traced,
    sites: Sites,
    share: Share,
    options: FindOptions,
    journal: Path | None,
    progress: Progress,
    group: Processes | None = None,
    parts: dict[Path, Statistics] | None = None,
) -> Found:
    from regsurgery.distributed import Processes
    from regsurgery.finding import find as search

    found = search(
        loaded,
        traced,
        sites,
        share,
        options,
        journal_path=journal,
        processes=group or Processes(),
        progress=progress,
        parts=parts,
    )
    recipe = found.recipe
    neurons = ", ".join(f"{b}:{n}" for b, listed in recipe.register_neurons.items() for n in listed)
    tokens = "1 register token" if recipe.num_registers == 1 else f"{recipe.num_registers} register tokens"
    progress.say(f"register neurons (block:neuron): {neurons}; {tokens}; {found.second_resolution.note}")
    return found


def _check_registers(num_registers: int | None) -> None:
    if num_registers is not None and not 1 <= num_registers <= MAX_REGISTERS:
        raise UserError(f"--num-registers {num_registers}: must be from 1 to {MAX_REGISTERS}")


def _check_precision(precision: str) -> None:
    from regsurgery.scores import PRECISIONS

    if precision not in PRECISIONS:
        raise UserError(
            f"precision {precision}: not one of {', '.join(PRECISIONS)}{did_you_mean(precision, list(PRECISIONS))}"
        )


def _check_recipe_output(output: Path) -> None:
    checkpoint_io.check_parent(output)
    if not output.exists():
        return
    try:
        ours = " find" in str(find_recipe(str(output)).provenance.get("found_by"))
    except RecipeError:
        ours = False
    if not ours:
        raise OutputError(f"{output}: exists and was not written by regsurgery find; choose another file with -o")


def doctor(
    model: str,
    *,
    images: str | Path | None = None,
    num_images: int | None = None,
    image_size: int | None = None,
    options: LoadOptions | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Whether `model` has outlier tokens, where they start and what causes them. A model that cannot be matched is a
    diagnosis too: `unsupported`, with the reason.

    Raises:
        UserError: the model cannot be found or loaded, or the images cannot be read.
    """
    from regsurgery.calibration import image_set
    from regsurgery.diagnosis import Diagnosis, diagnose

    progress = progress or Progress()
    pictures = image_set(images, num_images, say=progress.say)
    try:
        loaded, traced, sites = load_and_locate(model, options, progress, image_size=image_size)
    except UnsupportedModelError as error:
        return Diagnosis("unsupported", str(error), pictures.note, pictures.num_images)
    progress.say(f"preprocessing: {loaded.preprocess_note}; images: {pictures.note}")
    progress.stage("norms", pictures.num_images)
    return diagnose(loaded, traced, sites, pictures, progress=progress.advance)


def operate(loaded: Loaded, recipe: Recipe, progress: Progress) -> Surgery:
    """Trace -> match -> passes."""
    from regsurgery.surgery import perform

    traced, sites = located(loaded, progress)
    progress.stage("surgery")
    return perform(loaded, recipe, traced, sites)


def load_and_locate(
    model: str,
    options: LoadOptions | None,
    progress: Progress,
    fmt: str | None = None,
    image_size: int | None = None,
    **how: Any,
) -> tuple[Loaded, Traced, Sites]:
    """Load -> trace -> match, at `image_size` pixels where that is given.

    `how` is of `loading.load`; what `fmt` cannot write is refused before the trace.
    """
    from regsurgery.image_size import at_image_size

    progress.stage("load")
    with _objects_stay():
        loaded = at_image_size(load_original(model, options, **how), image_size)
        if fmt == "onnx":
            backends.backend(fmt).check(loaded)
        try:
            return loaded, *located(loaded, progress)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"{loaded.source.id}: {error}; regsurgery families lists what is supported"
            ) from error


@contextlib.contextmanager
def _objects_stay() -> Iterator[None]:
    """No search for garbage meanwhile: what imports and traces make stays; searching it took a sixth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # what is there becomes the oldest generation, unsearched
            gc.freeze()
            gc.unfreeze()
        if collects:
            gc.enable()


def located(loaded: Loaded, progress: Progress, image_size: tuple[int, int] | None = None) -> tuple[Traced, Sites]:
    """Trace -> match; at `image_size` (height, width) where it is given."""
    from regsurgery.diagnosis import trained_registers
    from regsurgery.match import match
    from regsurgery.placement import beside_trained
    from regsurgery.trace import trace

    progress.stage("trace")
    traced = trace(loaded, image_size)
    progress.stage("match")
    sites = match(traced)
    return traced, beside_trained(sites, trained_registers(loaded, sites))


def _write(
    surgery: Surgery,
    target: Path,
    fmt: str,
    pictures: ImageSet | None,
    run: dict[str, Any],
    progress: Progress,
    *,
    strict: bool,
) -> tuple[Verdict | None, SizeDrifts | None]:
    """emit, with verification (if there are images for it) of what was emitted before it gets its final name."""
    from regsurgery.emit import complete, emit
    from regsurgery.size_drift import drift_at_sizes
    from regsurgery.written import module_of, verify_folder

    verdict = sizes = None

    # What is written is the checkpoint as it was, whatever image size the surgery was traced at.
    written = surgery if surgery.loaded.own is None else replace(surgery, loaded=surgery.loaded.own)
    with emit(written, target, fmt) as folder:
        if pictures is not None:
            module = module_of(surgery, folder, fmt)
            verdict = verify_folder(surgery, folder, fmt, pictures, progress, module)
            verdict = _judged(verdict, pictures, set(run["fitted"]), strict=strict)
            if not verdict.passed:
                raise VerificationError(f"verification failed, nothing was written: {'; '.join(verdict.failures)}")
            sizes = drift_at_sizes(surgery, folder, fmt, module, pictures, progress)
        complete(written, folder, fmt, verdict, run, sizes)
    return verdict, sizes


def _judged(verdict: Verdict, pictures: ImageSet, fitted: set[str] | None, *, strict: bool) -> Verdict:
    """The verdict, with how many of its images are among the `fitted` ones; None: those are not known."""
    from regsurgery.run_record import count_fitted

    verdict = replace(verdict, fitted_images=count_fitted(pictures, fitted))
    return verdict.strictly() if strict else verdict


def verify(
    folder: str | Path,
    *,
    original: str | None = None,
    images: str | Path | None = None,
    num_images: int | None = None,
    strict: bool = False,
    image_size: int | None = None,
    options: LoadOptions | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Compare a patched folder, or one on the Hub (USER/NAME, see `load`), against its original.

    The folder's files are checked against its SHA256SUMS, then its own loader file is run: a folder to be verified must
    be one that the user trusts. A patched checkpoint holds the original's tensors unchanged and is compared with them,
    a program (`.pt2`, `.onnx`) and one of native mode with the recorded source; `original` names another MODEL. Images
    have `image_size` pixels a side, by default those of the model, or of the program.

    Args:
        strict: warnings, and too few images to judge, are failures.

    Raises:
        CheckpointError: the folder is incomplete, or `original` is not what was patched.
    """
    from regsurgery.calibration import image_set
    from regsurgery.image_size import at_image_size
    from regsurgery.run_record import fitted_of
    from regsurgery.written import verify_folder, verify_native

    progress = progress or Progress()
    allowed = options or LoadOptions()
    root = at_home(folder, allowed.revision, trust_remote_code=allowed.trust_remote_code)
    pictures = image_set(images, num_images, say=progress.say)
    progress.stage("checksums")
    patched = open_patched(root)
    recipe, fmt = patched.recipe, patched.format
    with tempfile.TemporaryDirectory(prefix="regsurgery-") as scratch:
        progress.stage("load")
        loaded = original_of(patched, original, options, Path(scratch))
        if fmt in backends.PROGRAMS:
            image_size = _size_of_program(patched, image_size)
        loaded = at_image_size(loaded, image_size)
        if recipe.mode == "native":
            verdict = verify_native(loaded, recipe, *located(loaded, progress), root, fmt, pictures, progress)
        else:
            surgery = operate(loaded, recipe, progress)
            take_our_tensors(surgery, root, fmt)
            size = loaded.image_size if loaded.own else None
            module = reloaded(root, fmt, stored=loaded.stored, image_size=size)
            verdict = verify_folder(surgery, root, fmt, pictures, progress, module)
    return _judged(verdict, pictures, fitted_of(root), strict=strict)


def _size_of_program(patched: PatchedFolder, wanted: int | None) -> int | None:
    """The side of the square images that a program takes; None for others, which are of the model's own size.

    Raises:
        UserError: `wanted`, where it is given, is another one.
    """
    size = patched.config.get("image_size")
    square = isinstance(size, list) and len(size) == 2 and size[0] == size[1] and type(size[0]) is int
    side: int | None = size[0] if square else None  # type: ignore[index]
    if wanted not in (None, side):
        raise UserError(
            f"--image-size {wanted}: {patched.root} holds a program (format {patched.format}), which takes images of "
            f"{size} (height, width) only; leave --image-size out"
        )
    return side


def original_of(patched: PatchedFolder, original: str | None, options: LoadOptions | None, scratch: Path) -> Loaded:
    """The model that was patched: restored into the new folder `scratch / "original"` where `patched` has all
    its tensors and no `original` is named, else loaded from there or from where it came.

    Raises:
        CheckpointError: the folder is incomplete, or `original` is not what was patched.
    """
    block = patched.config["regsurgery"]
    recorded = block["source"]
    if original is None and patched.format in backends.LIBRARIES and block["mode"] != "native":
        restored = scratch / "original"
        restore_original(patched.root, restored, patched.format)
        return load_original(str(restored), options)
    loaded = load_original(original or recorded["id"], options)
    if loaded.source.sha256 != recorded["sha256"]:
        raise CheckpointError(
            f"{loaded.source.id}: its weights are not those that were patched into {patched.root} "
            "(sha256 differs); give the original with --original"
        )
    return loaded


def _given_recipe(model: str, recipe: str | Path | Recipe, progress: Progress) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    chosen = find_recipe(str(recipe))
    if chosen.model and chosen.model not in (model, Path(model).absolute().name):
        progress.say(f"note: the recipe was made for {chosen.model}")
    return chosen


def _peak_rss_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)
