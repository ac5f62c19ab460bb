"""`reproduce`: a patched folder or Hub repository -> the surgery again, from its source, and what differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.checkpoints.download import snapshot
from regsurgery.checkpoints.limits import read_json, refuse_links_out
from regsurgery.checkpoints.sums import SUMS_NAME, read_sums, sha256
from regsurgery.checkpoints.whole import temporary_folder
from regsurgery.emit import run_record
from regsurgery.emit.published import published
from regsurgery.emit.run_record import AS_GIVEN, read_run_record
from regsurgery.errors import ModelNotFoundError, UserError
from regsurgery.frontends.model_id import DEMO
from regsurgery.images.digests import image_digest
from regsurgery.options import READING, PatchOptions, ReproduceOptions, takes
from regsurgery.recipe import RECIPE_NAME, find_recipe
from regsurgery.version import __version__

if TYPE_CHECKING:
    from regsurgery.images.image_set import ImageSet
    from regsurgery.progress import Progress

RECORDS = ("*.json", "*.yaml", SUMS_NAME)  # the files needed from a repository; no weights
OPEN_CLIP_CONFIG = "open_clip_config.json"


@dataclass(frozen=True)
class Reproduction:
    """What `reproduce` found.

    Attributes:
        identical: every file has the sha256 listed in SHA256SUMS.
        output: the new folder, if one was asked for.
        source: the model that was patched, as it was given.
        num_files: number of files in SHA256SUMS.
        differences: file -> how it differs.
        versions: package -> (then, now), for those that differ.
        figures: figure of the verdict -> (then, now), for those that differ.
        note: what is not counted as a difference; "" if there is nothing of the kind.
    """

    identical: bool
    output: str | None
    source: str
    num_files: int
    differences: Mapping[str, str]
    versions: Mapping[str, tuple[str, str]]
    figures: Mapping[str, tuple[Any, Any]]
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`: the attributes."""
        return asdict(self)


@takes(ReproduceOptions)
def reproduce(where: str | Path, output: str | Path | None = None, *, options: ReproduceOptions) -> Reproduction:
    """Patch the source of a patched checkpoint again, with the recipe and flags of its records, and compare SHA256SUMS.

    No code from the checkpoint is run. The neurons are those of its recipe; they are not searched for again.

    Args:
        where: folder that `patch` wrote, or the Hub id of one; no weights of a repository are downloaded.
        output: new folder for the result; by default it is discarded.
        options: see `options.ReproduceOptions`; its fields are the keyword arguments.

    Raises:
        ModelNotFoundError: the source, or the repository, is not there.
        CheckpointError: the records are missing or broken, or the source's weights are not those that were patched.
        UserError: the images are missing, or not those of the run.
        VerificationError: the result does not pass verification.
    """
    from regsurgery.commands.patch import patch

    progress, root = options.progress, Path(where)
    is_folder = root.is_dir()
    if is_folder:
        refuse_links_out(root)
    else:
        progress.stage("download")
        root, _ = snapshot(str(where), str(where), None, RECORDS)
    record = read_run_record(root)
    run, wanted = record["run"], read_sums(root)
    again = _options_of(root, run, where, options)
    versions = _other_versions(record)
    for package, (then, now) in versions.items():
        progress.say(f"note: {package} was {then}, here it is {now}; figures and fitted weights may differ as a result")
    with temporary_folder() as scratch:
        target = scratch / "reproduced" if output is None else Path(output)
        patch(options.source or run["model"], target, again)
        progress.stage("checksums")
        found = read_sums(target) if is_folder else published(target, str(where)).digests
        differences = _differences(root, wanted, found, is_folder=is_folder)
        note = ""
        if OPEN_CLIP_CONFIG in differences and _differ_by_their_place(root, target):
            del differences[OPEN_CLIP_CONFIG]
            note = f"{OPEN_CLIP_CONFIG} differs only in the folder that it names, which is its own"
        figures = _other_figures(record["verify"], read_run_record(target)["verify"])
    kept = None if output is None else str(output)
    return Reproduction(not differences, kept, run["model"], len(wanted), differences, versions, figures, note)


def _options_of(root: Path, run: Mapping[str, Any], where: str | Path, options: ReproduceOptions) -> PatchOptions:
    """The options of the run, with what the user allows now."""
    recipe = find_recipe(str(root / RECIPE_NAME))
    if options.source is None:
        _check_source(run)
    as_given: dict[str, Any] = {name: run.get(name) for name in AS_GIVEN}
    return PatchOptions(
        recipe=recipe,
        calibrate=run["calibrate"],
        stop_after=run.get("stopped_after"),
        searched=run.get("searched", False),
        format=run["format"],
        images=_pictures(run, options.images, where, options.progress),
        **as_given,
        **{name: run[name] for name in READING if name in run},
        allow_pickle=options.allow_pickle,
        trust_remote_code=options.trust_remote_code,
        max_memory=options.max_memory,
        commit=run["revision"],
        sha256=run["sha256"],
        called=run["model"],
        progress=options.progress,
    )


def _check_source(run: Mapping[str, Any]) -> None:
    """A source without a revision was a folder, a weights file, or the demo."""
    model = run["model"]
    if model != DEMO and run["revision"] is None and not Path(model).exists():
        where = "" if Path(model).is_absolute() else f" (relative to {Path.cwd()})"
        raise ModelNotFoundError(
            f"{model}: what was patched is not there{where}; move it back to that path (weights sha256 "
            f"{run['sha256']}), or give its new place with --source"
        )


def _pictures(
    run: Mapping[str, Any], images: str | Path | None, where: str | Path, progress: Progress
) -> ImageSet | None:
    """The images of the run, or None if it used generated ones or none."""
    from regsurgery.images.image_set import image_set

    recorded = run["images"]
    if recorded is None:
        if images is not None:
            raise UserError(f"{images}: the run that wrote {where} used no photos; leave out --images")
        return None
    described = f"{recorded['note']} (sha256 {recorded['sha256'][:16]}...)"
    if images is None:
        raise UserError(f"{where}: the run that wrote it used {described}; give them with --images")
    pictures = image_set(images, run["num_images"], seed=run["seed"], say=progress.say)
    digest = image_digest(pictures)
    if digest != recorded["sha256"]:
        raise UserError(
            f"{images}: not the images of the run: it used {described}, but these are {pictures.num_images} with "
            f"sha256 {digest[:16]}...; give the same files and no others"
        )
    return replace(pictures, note=recorded["note"])  # the folder may have another name now


def _other_versions(record: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    now = {"regsurgery": __version__, **run_record.versions()}
    then = {"regsurgery": record["regsurgery"], **record["run"]["versions"]}
    return {name: (str(then.get(name)), now[name]) for name in now if then.get(name) != now[name]}


def _differences(root: Path, wanted: Mapping[str, str], found: Mapping[str, str], *, is_folder: bool) -> dict[str, str]:
    """File -> how the sums `found` differ from `wanted`, which are `root`'s, or from `root` itself."""
    differences = {}
    for name in sorted(wanted.keys() | found.keys()):
        path = root / name
        if name not in found:
            differences[name] = "was not written again"
        elif name not in wanted:
            differences[name] = "is new: it was not in the original folder"
        elif found[name] != wanted[name]:
            differences[name] = "has different content"
        elif (is_folder or path.is_file()) and not (path.is_file() and sha256(path) == wanted[name]):
            differences[name] = f"matches {SUMS_NAME}, but the file in the folder was changed or lost since"
    return differences


def _differ_by_their_place(root: Path, target: Path) -> bool:
    """Whether two configs of native mode in open_clip differ only in the folder's path, which names the tower."""
    configs = []
    for path in (root / OPEN_CLIP_CONFIG, target / OPEN_CLIP_CONFIG):
        config = read_json(path) if path.is_file() else {}
        model = config.get("model_cfg")
        tower = model.get("vision_cfg") if isinstance(model, dict) else None
        if not isinstance(tower, dict) or not str(tower.get("timm_model_name", "")).startswith("local-dir:"):
            return False
        tower["timm_model_name"] = "local-dir:"
        configs.append(config)
    return configs[0] == configs[1]


def _other_figures(then: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> dict[str, tuple[Any, Any]]:
    then, now = then or {}, now or {}
    names = sorted(then.keys() | now.keys())
    return {name: (then.get(name), now.get(name)) for name in names if then.get(name) != now.get(name)}
