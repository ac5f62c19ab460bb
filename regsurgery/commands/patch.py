"""`patch`: MODEL -> load -> trace -> match -> find -> surgery -> emit -> verify -> a folder, whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.checkpoints.copying import CopiesAhead, copy_file
from regsurgery.checkpoints.reading import index_of
from regsurgery.checkpoints.whole import check_output, copies_ahead, temporary_folder
from regsurgery.errors import BrokenModelError, RecipeError, UserError, VerificationError
from regsurgery.families import family_of
from regsurgery.formats import LIBRARIES, PROGRAMS, STOCK_CODE, any_size, has_host
from regsurgery.frontends.loaded import Loaded
from regsurgery.hub.recipe import named_recipe
from regsurgery.machine import peak_rss_mb
from regsurgery.models import open_model
from regsurgery.modes import MODES, NATIVE, SHIFT
from regsurgery.options import PatchOptions, takes
from regsurgery.progress import Progress
from regsurgery.recipe import COMPATS, REFERENCE, Recipe, recipe_for_model

if TYPE_CHECKING:
    from regsurgery.compiler.located import Located
    from regsurgery.compiler.surgery import Surgery
    from regsurgery.images.image_set import ImageSet
    from regsurgery.search.division import Division
    from regsurgery.verification.size_drift import SizeDrifts
    from regsurgery.verification.verdict import Verdict

GENERATED_TO_CHECK = 32  # pictures of another kind, to check calibration on
NEEDS_PHOTOS = (
    "native: not calibrated: calibration needs photos; give some with --images DIR (generated pictures mislead it)"
)
NEEDS_MEMORY = (
    "native: not calibrated: weights stay on disk, and calibration reads them at every step; raise --max-memory, or "
    "pass --calibrate to calibrate anyway"
)


@dataclass(frozen=True)
class PatchResult:
    """What `patch` did. `output` is None for a dry run, `verdict` and `sizes` where nothing was verified.

    `call` loads the output, where it needs the folder's own loader file; it is "" otherwise. `seconds` and
    `peak_rss_mb` are of the whole process so far.
    """

    output: str | None
    mode: str
    format: str
    recipe: Recipe
    call: str
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


@takes(PatchOptions)
def patch(model: str | Path, output: str | Path, options: PatchOptions) -> PatchResult:
    """Patch `model` and write the patched checkpoint to the new folder `output`.

    Args:
        model: folder, weights file, Hub id, `timm:NAME`, `open_clip:ARCH/TAG` or `demo`.
        options: see `options.PatchOptions`; its fields are the keyword arguments. What is found or fitted on some
            images is verified on others. The output has the original's tensors, at their own size.

    Raises:
        NothingToFixError: no recipe was given, and surgery would not help.
        UserError: the input is at fault; see `errors`.
        CheckpointError: among these, a source that changes while it is read; `output` is not created.
        VerificationError: the patched model fails verification; `output` is not created.
    """
    started, output, progress = time.monotonic(), Path(output), options.progress
    if not options.dry_run:
        check_output(output)
    given = _given_recipe(model, options)
    images = options.image_set()
    with copies_ahead(output) as copies:
        how = {"look_through": options.verification, "use_meanwhile": partial(_copy_early, copies, given, options)}
        located = open_model(model, options, options.image_size, partial(_check_writable, given, options), **how)
        _say_what_is_patched(located, images, progress)
        for attempt in _attempts(located, output, given, images, options):
            try:
                with located.loaded.files.blamed():
                    fmt, verdict, sizes = _apply(located, attempt, output, copies, options)
            except (RecipeError, VerificationError) as error:
                if attempt.is_last or isinstance(error, BrokenModelError):
                    raise attempt.named(error) from None
                progress.say(f"{attempt.name} does not fit this model ({error}); finding its register neurons instead")
            else:
                recipe, where = attempt.recipe, None if options.dry_run else str(output)
                seconds = time.monotonic() - started
                call = _call(located.loaded, fmt, recipe, where)
                return PatchResult(where, recipe.mode, fmt, recipe, call, verdict, sizes, seconds, peak_rss_mb())
    raise AssertionError("the last attempt succeeds or raises")


# --- what is tried ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """A recipe to be applied, in its final mode and with its final number of registers.

    Attributes:
        images: the images of the run, with those that the recipe was found on, if any.
        name: the recipe's name in errors.
        is_last: nothing else is tried if it fails.
    """

    recipe: Recipe
    images: Division
    name: str = ""
    is_last: bool = True

    def named(self, error: Exception) -> Exception:
        """`error`, with the recipe's name if it is about the recipe."""
        return RecipeError(f"{self.name}: {error}") if self.name and isinstance(error, RecipeError) else error


def _attempts(
    located: Located, output: Path, given: Recipe | None, images: ImageSet, options: PatchOptions
) -> Iterator[Attempt]:
    """The given recipe; otherwise the bundled one for the model, if there is one and not the authors' method is wanted,
    then the one that is found.
    """
    from regsurgery.commands.find import search_for
    from regsurgery.search.division import Division
    from regsurgery.search.find import Task
    from regsurgery.search.shares import Share

    whole = Division.without_search(images)
    if given is not None:
        name = "" if isinstance(options.recipe, Recipe) else str(options.recipe)
        division = Division.for_search(images, options.seed) if options.searched else whole
        yield Attempt(_adapted(given, options), division, name)
        return
    source = located.loaded.source
    bundled = recipe_for_model(source.repo or source.id)
    if bundled is not None and options.compat != REFERENCE:
        name, recipe = bundled
        options.progress.say(f"recipe: {name} (bundled)")
        yield Attempt(_adapted(recipe, options), whole, f"recipe {name}", is_last=False)
    journal = None if options.dry_run else output.absolute().with_name(f".{output.name}.journal")
    division = Division.for_search(images, options.seed)
    found = search_for(Task(located, Share.of(division.searched or images), options), journal)
    yield Attempt(_adapted(found.recipe, options), division)


def _given_recipe(model: str | Path, options: PatchOptions) -> Recipe | None:
    """The recipe that the user named, if any."""
    if options.recipe is None or isinstance(options.recipe, Recipe):
        return options.recipe
    chosen = named_recipe(str(options.recipe), options.progress)
    if chosen.model and chosen.model not in (str(model), Path(model).absolute().name):
        options.progress.say(f"note: the recipe was made for {chosen.model}")
    return chosen


def _adapted(recipe: Recipe, options: PatchOptions) -> Recipe:
    """`recipe` with the number of registers, the extremes and the mode that the user wants."""
    if options.compat not in (COMPATS[0], recipe.compat):
        recipe = recipe.with_compat(options.compat)
    if options.num_registers not in (None, recipe.num_registers):
        recipe = recipe.with_num_registers(options.num_registers)
    return recipe if options.mode is None else recipe.with_mode(options.mode)


# --- one attempt ------------------------------------------------------------------------------------------------------


def _apply(
    located: Located, attempt: Attempt, output: Path, copies: CopiesAhead, options: PatchOptions
) -> tuple[str, Verdict | None, SizeDrifts | None]:
    """Surgery -> emit -> verify; what was written gets its final name if it passes. Returns its format, too."""
    from regsurgery.compiler.modes.operate import operate
    from regsurgery.compiler.modes.operation import Operation
    from regsurgery.emit.folder import complete, emit
    from regsurgery.emit.run_record import run_of
    from regsurgery.images.image_set import another_kind
    from regsurgery.verification.folder import check_folder

    recipe, images, progress = attempt.recipe, attempt.images, options.progress
    fmt = _format(located.loaded, recipe, options)
    progress.stage("surgery")
    fit, unseen = images.for_fit(options.seed) if recipe.kind.fitted else (None, images.unseen)
    photos = images.every.evidence == "photos"
    obstacle = NEEDS_PHOTOS if not photos else NEEDS_MEMORY if located.loaded.stored else None
    calibrate = obstacle is None if options.calibrate is None else options.calibrate
    check = None if photos else another_kind(GENERATED_TO_CHECK, seed=options.seed)
    operation = Operation(located, recipe, fit, calibrate, check, options.stop_after, options.seed, progress)
    surgery = replace(operate(operation), place=partial(copy_file, link=True) if options.links else copies.place)
    if recipe.kind.stock and options.calibrate is None and obstacle is not None:
        progress.say(obstacle)
    fitted_on = None if fit is None else operation.fit_images
    run = run_of(surgery, fmt, images.every, fitted_on, images.searched is not None, options, calibrate)
    verdict = sizes = None
    with _target(output, options) as target, emit(surgery.as_written(), target, fmt) as folder:
        if options.verification:
            verdict, sizes = _verified(surgery, folder, fmt, unseen, set(run["fitted"]), options)
        else:
            check_folder(surgery, folder, fmt, progress)
        complete(surgery.as_written(), folder, fmt, verdict, run, sizes)
    return fmt, verdict, sizes


def _verified(
    surgery: Surgery, folder: Path, fmt: str, images: ImageSet, fitted: set[str], options: PatchOptions
) -> tuple[Verdict, SizeDrifts]:
    """The verdict on what was written to `folder`, and its drift at other image sizes.

    Raises:
        VerificationError: the verdict is that it failed.
    """
    from regsurgery.emit.run_record import judged
    from regsurgery.verification.folder import module_of, verify_folder
    from regsurgery.verification.size_drift import drift_at_sizes

    module = module_of(surgery, folder, fmt)
    verdict = verify_folder(surgery, folder, fmt, images, options.progress, module)
    verdict = judged(verdict, images, fitted, strict=options.strict)
    if not verdict.passed:
        raise VerificationError(f"verification failed, nothing was written: {'; '.join(verdict.failures)}")
    return verdict, drift_at_sizes(surgery, folder, fmt, module, images, options.progress)


@contextmanager
def _target(output: Path, options: PatchOptions) -> Iterator[Path]:
    """Where to write: `output`, or in a dry run a place that is thrown away."""
    if not options.dry_run:
        yield output
        return
    with temporary_folder() as nowhere:
        yield nowhere / "dry-run"


# --- what can be written ----------------------------------------------------------------------------------------------


def _copy_early(copies: CopiesAhead, given: Recipe | None, options: PatchOptions, weights: Sequence[Path]) -> None:
    """Start copying the shards if they will certainly be needed unchanged.

    Without a recipe there may be nothing to fix; other formats and native mode have files of their own; what a dry run
    writes goes elsewhere.
    """
    if given is None or options.dry_run or MODES[options.mode or given.mode].stock or options.format in PROGRAMS:
        return
    if not options.links and index_of(weights) is not None:
        copies.start(weights)


def _check_writable(given: Recipe | None, options: PatchOptions, loaded: Loaded) -> None:
    """Before the trace, raise `UserError` for what the format cannot hold, and for a mode that cannot write it."""
    from regsurgery.backends.formats import backend

    if options.format in STOCK_CODE:
        mode = options.mode or (SHIFT.name if given is None else given.mode)
        if not MODES[mode].stock:
            raise UserError(f"format {options.format}: mode {mode} cannot write it; use --mode {NATIVE.name}")
        backend(options.format).check(loaded.own or loaded, 1)
    check = getattr(backend(options.format), "check", None) if options.format in PROGRAMS else None
    if check is not None:
        check(loaded)


def _format(loaded: Loaded, recipe: Recipe, options: PatchOptions) -> str:
    """The format to write: the requested one, or the one that suits the model and the mode.

    Raises:
        UserError: the mode cannot write that format.
        UnsupportedModelError: native mode: the stock host has no room for the model.
    """
    from regsurgery.backends.canonical import default_host
    from regsurgery.backends.formats import backend

    stock = recipe.kind.stock
    fmt = options.format or (default_host(loaded) if stock else loaded.library)
    if fmt not in LIBRARIES:
        _check_memory(loaded, f"format {fmt} is written")
    if has_host(fmt, recipe.kind):
        options.progress.say(f"native host: {fmt}, unmodified")
        if loaded.own is not None and not any_size(fmt, recipe.kind):
            raise UserError(
                f"--image-size: in native mode format {fmt} takes the model's own size only; use --format timm"
            )
        backend(fmt, recipe.kind).check(loaded.own or loaded, recipe.num_registers)
    elif fmt in LIBRARIES and fmt != loaded.library:
        raise UserError(
            f"format {fmt}: {loaded.source.id} is a {loaded.library} checkpoint, which mode {recipe.mode} writes as "
            f"{loaded.library}, {' or '.join(PROGRAMS)}"
        )
    return fmt


def _check_memory(loaded: Loaded, what: str) -> None:
    if loaded.stored:
        size = sum(path.stat().st_size for path in loaded.weights) / 1e9
        raise UserError(
            f"{loaded.source.id}: {what} with all weights in memory, which takes {size:.1f} GB; allow that with "
            f"--max-memory {size + 0.1:.1f}GB, or write the model's own format"
        )


def _say_what_is_patched(located: Located, images: ImageSet, progress: Progress) -> None:
    loaded = located.loaded
    progress.say(f"preprocessing: {loaded.preprocess_note}; images: {images.note}")
    if family_of(loaded.library, loaded.architecture) is None:
        progress.say(
            f"{loaded.architecture} is not one of the families that the tests cover (regsurgery families); its sites "
            "were found in its graph, and the output is verified as usual"
        )
    if loaded.tower is not None:
        progress.say(f"tower: {loaded.tower}, as named; every other stream of tokens stays as it is")


def _call(loaded: Loaded, fmt: str, recipe: Recipe, output: str | None) -> str:
    """What loads `output` through its own loader file, as Python; "" if it has none."""
    from regsurgery.backends.formats import backend

    if output is None or recipe.kind.stock or fmt not in LIBRARIES:
        return ""
    return backend(fmt, recipe.kind).call(loaded, output)
