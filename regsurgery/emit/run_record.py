"""`regsurgery_run.json` of a patched folder: what is needed to repeat the run that wrote it, and its figures.

    {"schema": 1,
     "regsurgery": the version that wrote the folder,
     "run": {"model": MODEL as given, "revision": its Hub commit or null, "sha256": of its weights,
             "mode", "format", "num_registers": as written; "calibrate": native mode only, else null,
             "searched": only, and true, where the neurons were found on the images of the run,
             "arch", "ema", "prefix", "library", "subfolder": only where they were given, see `LoadOptions.reading`,
             "stopped_after": only where calibration was interrupted: the number of steps that were run,
             "seed", "num_images", "force", "verification", "image_size", "tower": as given,
             "images": null if pictures were generated or no image was used, else {"note": what they are called,
                       "count": how many, "sha256": over their contents, see `image_digest`},
             "fitted": the first 12 digits of the sha256 of every image file or record that took part in the search for
                       the neurons or in the fit of the weights, sorted; missing in folders of earlier versions,
             "versions": {package: version} of what computed the bytes},
     "verify": null if not verified, else the verdict, its numbers to six digits,
     "sizes": the drift at several image sizes, see `size_drift.SizeDrift`; empty if it was not measured}

The same input and flags give the same bytes: there is no date and nothing about how the run went. Flags that do not
affect the bytes (links, memory, permissions while loading) are left out.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.checkpoints.limits import read_json
from regsurgery.checkpoints.writing import write_json
from regsurgery.errors import CheckpointError
from regsurgery.images.digests import SHORT, image_digest, image_digests
from regsurgery.version import __version__

if TYPE_CHECKING:
    from regsurgery.compiler.surgery import Surgery
    from regsurgery.images.image_set import ImageSet
    from regsurgery.options import PatchOptions
    from regsurgery.recipe import Recipe
    from regsurgery.verification.size_drift import SizeDrifts
    from regsurgery.verification.verdict import Verdict

RUN_RECORD_NAME = "regsurgery_run.json"
SCHEMA = 1
DIGITS = 6
PACKAGES = {"torch": "torch", "torchvision": "torchvision", "transformers": "transformers", "timm": "timm",
            "open_clip": "open_clip_torch", "Pillow": "Pillow"}  # fmt: skip
TYPES: dict[str, type | tuple[type, ...]] = {
    "model": str, "revision": (str, type(None)), "sha256": str, "mode": str, "format": str, "num_registers": int,
    "calibrate": (bool, type(None)), "seed": int, "num_images": (int, type(None)), "force": bool, "verification": bool,
    "images": (dict, type(None)), "versions": dict,
}  # fmt: skip
AS_GIVEN = ("seed", "num_images", "force", "verification", "image_size", "tower")  # fields of `PatchOptions`
OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "stopped_after": int, "searched": bool, "tower": (str, type(None)),
    "arch": str, "ema": bool, "prefix": str, "library": str, "subfolder": str,
}  # fmt: skip


def write_run_record(
    folder: Path, run: dict[str, Any], verdict: Verdict | None, sizes: SizeDrifts | None = None
) -> None:
    """Write the record of `run` to the patched `folder`."""
    record = {
        "schema": SCHEMA,
        "regsurgery": __version__,
        "run": run,
        "verify": None if verdict is None else rounded(verdict.as_dict()),
        "sizes": [] if sizes is None else rounded(sizes.as_dicts()),
    }
    write_json(folder / RUN_RECORD_NAME, record)


def read_run_record(folder: Path) -> dict[str, Any]:
    """The record of a patched folder, as in the module's docstring.

    Raises:
        CheckpointError: the record is missing or broken, or has a schema that this version does not know.
    """
    path = Path(folder) / RUN_RECORD_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{path}: missing; without it, nothing is known about how this folder was made: patch the model again"
        )
    record = read_json(path, "patch the model again")
    if record.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path}: has schema {str(record.get('schema'))[:100]!r}; this regsurgery reads schema {SCHEMA}: update "
            "regsurgery, or patch the model again"
        )
    problem = _problem(record)
    if problem:
        raise CheckpointError(f"{path}: not a valid record of a run ({problem}); patch the model again")
    return record


def _problem(record: dict[str, Any]) -> str | None:
    run, verify = record.get("run"), record.get("verify")
    if not isinstance(record.get("regsurgery"), str):
        return "'regsurgery' is not a version"
    if not isinstance(run, dict):
        return "'run' is not an object"
    if verify is not None and not (isinstance(verify, dict) and isinstance(verify.get("passed"), bool)):
        return "'verify' is not a verdict"
    for key, kind in TYPES.items():
        if key not in run or not isinstance(run[key], kind):
            return f"'run' has no valid '{key}'"
    for key, kind in OPTIONAL.items():
        if key in run and not isinstance(run[key], kind):
            return f"'run' has no valid '{key}'"
    side = run.get("image_size")  # missing in records of older versions
    if side is not None and not (type(side) is int and side > 0):
        return "'run' has no valid 'image_size'"
    images = run["images"]
    if images is not None and not all(
        isinstance(images.get(key), kind) for key, kind in (("note", str), ("count", int), ("sha256", str))
    ):
        return "'images' under 'run' lacks note, count or sha256"
    fitted = run.get("fitted", [])
    if not isinstance(fitted, list) or not all(isinstance(digest, str) for digest in fitted):
        return "'fitted' under 'run' is not a list of digests"
    return None


def run_of(
    surgery: Surgery,
    fmt: str,
    images: ImageSet,
    fit: ImageSet | None,
    searched: bool,
    options: PatchOptions,
    calibrate: bool,
) -> dict[str, Any]:
    """The `run` entry of a record.

    Args:
        images: the images of the run, if any were used.
        fit: the images that weights were fitted on.
        searched: whether neurons were found on images of the run.
        calibrate: whether calibration was requested, if the mode has it.
    """
    recipe, source = surgery.recipe, surgery.loaded.source
    calibration = surgery.config_block.get("fit", {}).get("calibration") or {}
    stopped = {"stopped_after": calibration["stopped_after"]} if "stopped_after" in calibration else {}
    return {
        "model": source.id,
        "revision": source.revision,
        "sha256": source.sha256,
        "mode": recipe.mode,
        "format": fmt,
        "num_registers": recipe.num_registers,
        "calibrate": calibrate if recipe.kind.stock else None,
        **stopped,
        **source.read_with,
        **{name: getattr(options, name) for name in AS_GIVEN},
        "images": images_of(images) if options.verification or recipe.kind.fitted else None,
        "fitted": sorted(fitted_digests(recipe, fit)),
        "versions": versions(),
        **({"searched": True} if searched else {}),
    }


def versions() -> dict[str, str]:
    """The versions of the packages that affect what is written."""
    return {name: metadata.version(package) for name, package in PACKAGES.items()}


def images_of(pictures: ImageSet) -> dict[str, Any] | None:
    """The `images` entry of a record: None for generated pictures, which `seed` and `num_images` reproduce."""
    if pictures.evidence == "generated":
        return None
    return {"note": pictures.note, "count": pictures.num_images, "sha256": image_digest(pictures)}


def fitted_digests(recipe: Recipe, fit: ImageSet | None) -> set[str]:
    """The digests of the images that the search for the recipe's neurons saw, and of the images of the fit.

    A recipe's provenance may hold anything; what is not a digest is skipped.
    """
    seen = recipe.provenance.get("images_seen")
    digests = {str(digest) for digest in seen} if isinstance(seen, (list, tuple)) else set()
    known = {digest for digest in digests if re.fullmatch(rf"[0-9a-f]{{{SHORT}}}", digest)}
    return known | set(() if fit is None else image_digests(fit))


def fitted_of(folder: Path) -> set[str] | None:
    """The digests in the record of a patched folder; None if there are none, or no record.

    Raises:
        CheckpointError: the record is broken.
    """
    if not (folder / RUN_RECORD_NAME).is_file():
        return None
    fitted = read_run_record(folder)["run"].get("fitted")
    return None if fitted is None else set(fitted)


def judged(verdict: Verdict, images: ImageSet, fitted: set[str] | None, *, strict: bool) -> Verdict:
    """The verdict, with the number of its images that are among the `fitted` ones (None: not known)."""
    verdict = replace(verdict, fitted_images=count_fitted(images, fitted))
    return verdict.strictly() if strict else verdict


def count_fitted(pictures: ImageSet, fitted: set[str] | None) -> int | None:
    """The number of images that are among `fitted`; None if that is not known. The images are read only if needed."""
    if not fitted:
        return None if fitted is None else 0
    return sum(digest in fitted for digest in image_digests(pictures))


def rounded(value: Any) -> Any:
    """`value`, plain data, with numbers to `DIGITS` digits; infinity and NaN, which JSON lacks, become null."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
