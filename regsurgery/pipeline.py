"""`doctor`, `patch` and `verify`, aloud: recipe + checkpoint -> load -> trace -> match -> passes -> verify -> emit."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery import backends, checkpoint_io
from regsurgery.errors import CheckpointError, RecipeError, UnsupportedModelError, UserError, VerificationError
from regsurgery.loading import Loaded, LoadOptions, Source
from regsurgery.loading import load as load_original
from regsurgery.patched import (
    existing_folder,
    folder_format,
    read_patched_config,
    restore_original,
    take_register_tokens,
)
from regsurgery.recipe import Recipe, bundled_recipes, find_recipe, parse_recipe, recipe_for_model

if TYPE_CHECKING:
    from torch import Tensor, nn

    from regsurgery.calibration import ImageSet
    from regsurgery.diagnosis import Diagnosis
    from regsurgery.sites import Sites
    from regsurgery.surgery import Surgery
    from regsurgery.trace import Traced
    from regsurgery.verification import Verdict


class Progress:
    """What the pipeline tells about itself while it runs; the command line draws it. This one is silent."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage begins; `total` images where it goes over images."""

    def advance(self, num_images: int) -> None:
        """That many images are done."""

    def say(self, line: str) -> None:
        """A fact worth a line."""


@dataclass(frozen=True)
class PatchResult:
    """What `patch` did. `output` is None for a dry run; `seconds` and `peak_rss_mb` are of the whole process so far."""

    output: str | None
    mode: str
    format: str
    recipe: Recipe
    verdict: Verdict
    seconds: float
    peak_rss_mb: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "mode": self.mode,
            "format": self.format,
            "register_neurons": {str(b): list(neurons) for b, neurons in self.recipe.register_neurons.items()},
            "verify": self.verdict.as_dict(),
            "seconds": round(self.seconds, 3),
            "peak_rss_mb": round(self.peak_rss_mb, 1),
        }


def patch(
    model: str,
    output: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    format: str | None = None,
    num_registers: int | None = None,
    images: str | Path | None = None,
    num_images: int | None = None,
    options: LoadOptions | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PatchResult:
    """Patch `model` and write the patched checkpoint to the new folder `output`.

    Args:
        model: folder, Hub id, `timm:NAME`, `open_clip:ARCH/TAG` or `demo`.
        recipe: a `Recipe`, a recipe file or the name of a bundled recipe; by default the bundled one for `model`.
        format: one of `backends.FORMATS`; by default that of the model's library.
        images: folder of images for verification; dead-leaves pictures by default.
        dry_run: do everything, but write nothing to `output`.

    Raises:
        UserError: the input is at fault; see `errors`.
        VerificationError: the patched model fails verification; `output` is not created.
    """
    from regsurgery.calibration import image_set

    started = time.monotonic()
    progress = progress or Progress()
    output = Path(output)
    if not dry_run:
        checkpoint_io.check_output(output)
    if format is not None and format not in backends.FORMATS:
        raise UserError(f"format {format}: not one of {', '.join(backends.FORMATS)}")
    chosen = None if recipe is None else _given_recipe(model, recipe, progress)
    pictures = image_set(images, num_images)

    progress.stage("load")
    loaded = load_original(model, options)
    chosen = chosen or _bundled_recipe(loaded.source, progress)
    if num_registers is not None:
        chosen = chosen.with_num_registers(num_registers)
    fmt = format or loaded.library
    if fmt in backends.LIBRARIES and fmt != loaded.library:
        raise UserError(
            f"format {fmt}: {model} is a {loaded.library} checkpoint, which can be written as {loaded.library} or pt2"
        )
    surgery = operate(loaded, chosen, progress)
    with tempfile.TemporaryDirectory() as nowhere:
        target = Path(nowhere) / "dry-run" if dry_run else output
        verdict = _write(surgery, target, fmt, pictures, progress)
    return PatchResult(
        output=None if dry_run else str(output),
        mode=chosen.mode,
        format=fmt,
        recipe=chosen,
        verdict=verdict,
        seconds=time.monotonic() - started,
        peak_rss_mb=_peak_rss_mb(),
    )


def doctor(
    model: str,
    *,
    images: str | Path | None = None,
    num_images: int | None = None,
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
    pictures = image_set(images, num_images)
    progress.stage("load")
    try:
        loaded = load_original(model, options)
        traced, sites = _locate(loaded, progress)
    except UnsupportedModelError as error:
        return Diagnosis("unsupported", str(error), pictures.note, pictures.num_images)
    progress.say(f"preprocessing: {loaded.preprocess_note}; images: {pictures.note}")
    progress.stage("norms", pictures.num_images)
    return diagnose(loaded, traced, sites, pictures, progress=progress.advance)


def operate(loaded: Loaded, recipe: Recipe, progress: Progress) -> Surgery:
    """Trace -> match -> passes."""
    from regsurgery.surgery import perform

    traced, sites = _locate(loaded, progress)
    progress.stage("surgery")
    return perform(loaded, recipe, traced, sites)


def _locate(loaded: Loaded, progress: Progress) -> tuple[Traced, Sites]:
    """Trace -> match."""
    from regsurgery.match import match
    from regsurgery.trace import trace

    progress.stage("trace")
    traced = trace(loaded)
    progress.stage("match")
    return traced, match(traced)


def _write(surgery: Surgery, target: Path, fmt: str, pictures: ImageSet, progress: Progress) -> Verdict:
    """emit, with verification of what was emitted before it gets its final name."""
    from regsurgery.emit import complete, emit

    with emit(surgery, target, fmt) as folder:
        progress.say(f"preprocessing: {surgery.loaded.preprocess_note}; images: {pictures.note}")
        verdict = _verify_folder(surgery, folder, fmt, pictures, progress)
        if not verdict.passed:
            raise VerificationError(f"verification failed, nothing was written: {'; '.join(verdict.failures)}")
        complete(surgery, folder, target, fmt, verdict)
    return verdict


def _verify_folder(surgery: Surgery, folder: Path, fmt: str, pictures: ImageSet, progress: Progress) -> Verdict:
    from regsurgery.verification import verify as compare

    progress.stage("verify", pictures.num_images)
    module = backends.backend(fmt).reload(folder, read_patched_config(folder, fmt))
    return compare(surgery, _runner(surgery, module, fmt), pictures, progress=progress.advance)


def _runner(surgery: Surgery, module: nn.Module, fmt: str) -> Callable[[list[Tensor]], dict[str, Tensor]]:
    if fmt not in backends.LIBRARIES:
        return lambda inputs: module(*inputs)
    image = [node.name for node in surgery.traced.graph_module.graph.find_nodes(op="placeholder")].index(
        surgery.traced.image
    )
    return lambda inputs: surgery.loaded.call(module, inputs[image])


def verify(
    folder: str | Path,
    *,
    original: str | None = None,
    images: str | Path | None = None,
    num_images: int | None = None,
    options: LoadOptions | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Compare a patched folder against its original.

    The folder's files are checked against its SHA256SUMS, then its own loader file is run: a folder to be verified must
    be one that the user trusts. A patched checkpoint holds the original's tensors unchanged and is compared with them,
    a `.pt2` folder with its recorded source; `original` names another MODEL to compare with.

    Raises:
        CheckpointError: the folder is incomplete, or `original` is not what was patched.
    """
    from regsurgery.calibration import image_set

    progress = progress or Progress()
    root = existing_folder(folder)
    pictures = image_set(images, num_images)
    progress.stage("checksums")
    checkpoint_io.check_sums(root)
    fmt = folder_format(root)
    config = read_patched_config(root, fmt)
    recipe = parse_recipe((root / "recipe.yaml").read_text("utf-8"), "recipe.yaml")
    recorded = config["regsurgery"]["source"]
    with tempfile.TemporaryDirectory(prefix="regsurgery-") as scratch:
        progress.stage("load")
        if original is None and fmt in backends.LIBRARIES:
            restored = Path(scratch) / "original"
            restore_original(root, restored, fmt)
            loaded = load_original(str(restored), options)
        else:
            loaded = load_original(original or recorded["id"], options)
            if loaded.source.sha256 != recorded["sha256"]:
                raise CheckpointError(
                    f"{loaded.source.id}: its weights are not those that were patched into {root} "
                    "(sha256 differs); give the original with --original"
                )
        surgery = operate(loaded, recipe, progress)
        if fmt in backends.LIBRARIES:
            take_register_tokens(surgery, root, fmt)
        return _verify_folder(surgery, root, fmt, pictures, progress)


def _given_recipe(model: str, recipe: str | Path | Recipe, progress: Progress) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    chosen = find_recipe(str(recipe))
    if chosen.model and chosen.model != model:
        progress.say(f"note: the recipe was made for {chosen.model}")
    return chosen


def _bundled_recipe(source: Source, progress: Progress) -> Recipe:
    bundled = recipe_for_model(source.repo or source.id)
    if bundled is None:
        raise RecipeError(
            f"{source.id}: no bundled recipe was made for it; give one with --recipe FILE "
            f"(bundled: {', '.join(bundled_recipes())})"
        )
    name, chosen = bundled
    progress.say(f"recipe: {name} (bundled)")
    return chosen


def _peak_rss_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)
