"""The command line: parse, call the API, render. Heavy imports stay inside the commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from regsurgery import __version__, cli_recipes
from regsurgery.cli_errors import exit_code_of
from regsurgery.cli_options import (
    AllowPickle,
    AsJson,
    DeviceMap,
    Force,
    Format,
    Images,
    ImageSize,
    MaxMemory,
    Mode,
    Model,
    NumImages,
    NumRegisters,
    OutputFolder,
    Patched,
    Private,
    Quiet,
    RecipeName,
    Revision,
    Seed,
    Smallest,
    Strict,
    TrustRemoteCode,
)
from regsurgery.errors import (
    EXIT_DIFFERENT,
    EXIT_NOTHING_TO_FIX,
    EXIT_USER_ERROR,
    EXIT_VERIFICATION_FAILED,
    NothingToFixError,
)
from regsurgery.evaluation import TASKS

if TYPE_CHECKING:
    from regsurgery.loading import LoadOptions
    from regsurgery.render import Screen

app = typer.Typer(
    name="regsurgery",
    help="Rewrite Vision Transformer checkpoints so that outlier tokens are gone.\n\nMODEL is a folder, a Hub id, "
    "timm:NAME, open_clip:ARCH/TAG, or demo. Exit codes: 0 done; 1 verification failed (diff, reproduce: "
    "differences); 2 the input is at fault; 3 nothing to fix; 130 interrupted.",
    epilog="Example: regsurgery patch demo -o demo-patched",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_recipes.app)


@app.command(epilog="Example: regsurgery doctor demo")
def doctor(
    model: Model,
    images: Images = None,
    num_images: NumImages = None,
    image_size: ImageSize = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Diagnose MODEL: does it have outlier tokens? If so, where do they start, and would surgery remove them?"""
    from regsurgery import pipeline
    from regsurgery.render import Screen

    options = _options(allow_pickle, trust_remote_code, revision, max_memory, device_map)
    with Screen(as_json=as_json, quiet=quiet) as screen:
        diagnosis = pipeline.doctor(
            model, images=images, num_images=num_images, image_size=image_size, options=options, progress=screen
        )
    screen.diagnosed(diagnosis)
    if diagnosis.verdict != "register_neurons":
        raise typer.Exit(EXIT_NOTHING_TO_FIX)


@app.command(epilog="Example: regsurgery find demo -o demo.yaml")
def find(
    model: Model,
    statistics: Annotated[
        list[Path] | None, typer.Argument(help="With --merge: the statistics files of all parts.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Recipe file to write.")] = Path("recipe.yaml"),
    images: Images = None,
    num_images: NumImages = None,
    image_size: ImageSize = None,
    seed: Seed = 0,
    force: Force = False,
    num_registers: NumRegisters = None,
    smallest: Smallest = False,
    part: Annotated[
        str | None, typer.Option("--part", help="I/N: run only part I of N, as one job of an array (with --stats).")
    ] = None,
    stats: Annotated[Path | None, typer.Option("--stats", help="Statistics file that --part writes.")] = None,
    precision: Annotated[
        str, typer.Option("--precision", help="Precision of the pass over all images: checkpoint, or bf16 (autocast).")
    ] = "checkpoint",
    merge: Annotated[
        bool, typer.Option("--merge", help="Decide from the statistics files of all parts, listed after MODEL.")
    ] = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Find register neurons and write a recipe. To split the work over an array job, see docs/scale.md."""
    from regsurgery import pipeline
    from regsurgery.distributed import is_first_process
    from regsurgery.render import Screen
    from regsurgery.sharing import FoundPart, Part

    if (part is None) != (stats is None):
        raise typer.BadParameter("--part I/N and --stats FILE go together", param_hint="--part")
    if merge != bool(statistics) or (merge and part is not None):
        raise typer.BadParameter("goes with statistics files behind MODEL, and without --part", param_hint="--merge")
    options = _options(allow_pickle, trust_remote_code, revision, max_memory, device_map)
    given: dict[str, Any] = {
        "images": images,
        "num_images": num_images,
        "image_size": image_size,
        "seed": seed,
        "force": force,
        "precision": precision,
    }
    with Screen(as_json=as_json, quiet=quiet or not is_first_process()) as screen, _nothing_to_fix(screen):
        if part is None or stats is None:
            found = pipeline.find(
                model,
                output,
                merge=statistics or (),
                smallest=smallest,
                num_registers=num_registers,
                options=options,
                progress=screen,
                **given,
            )
        else:
            found = pipeline.find_part(model, stats, Part.parse(part), options=options, progress=screen, **given)
    if isinstance(found, FoundPart):
        if is_first_process():
            screen.found_part(found)
        return
    if is_first_process():
        screen.found(found, output)
    if not found.suppressed:
        raise typer.Exit(EXIT_VERIFICATION_FAILED)


@app.command(epilog="Example: regsurgery patch demo -o demo-patched")
def patch(
    model: Model,
    output: OutputFolder,
    recipe: RecipeName = None,
    mode: Mode = None,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Native mode: train what the registers hold (default: if --images gives photos).",
            show_default=False,
        ),
    ] = None,
    format: Format = None,
    num_registers: NumRegisters = None,
    smallest: Smallest = False,
    images: Images = None,
    num_images: NumImages = None,
    image_size: ImageSize = None,
    seed: Seed = 0,
    force: Force = False,
    push: Annotated[str | None, typer.Option("--push", help="Push the folder to USER/NAME on the Hub.")] = None,
    private: Private = None,
    link: Annotated[bool, typer.Option("--link", help="Hard-link unchanged shards instead of copying.")] = False,
    verification: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the original and the patched model on images.")
    ] = True,
    strict: Strict = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything, but write nothing.")] = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Patch MODEL into a new checkpoint folder: find its register neurons (or use a recipe), patch, and verify."""
    from regsurgery import hub, pipeline
    from regsurgery.render import Screen

    with Screen(as_json=as_json, quiet=quiet) as screen, _nothing_to_fix(screen):
        if push is not None:
            hub.check_before_patching(push, private=private, verification=verification)
        result = pipeline.patch(
            model,
            output,
            recipe=recipe,
            mode=mode,
            calibrate=calibrate,
            format=format,
            num_registers=num_registers,
            smallest=smallest,
            images=images,
            num_images=num_images,
            image_size=image_size,
            seed=seed,
            force=force,
            link=link,
            verification=verification,
            strict=strict,
            dry_run=dry_run,
            progress=screen,
            options=_options(allow_pickle, trust_remote_code, revision, max_memory),
        )
        pushed = None
        if push is not None and not dry_run:
            pushed = hub.push(output, push, private=private, progress=screen)
    screen.patched(result, pushed)


@app.command(epilog="Example: regsurgery verify demo-patched")
def verify(
    folder: Annotated[
        str, typer.Argument(help="Folder that regsurgery patch wrote, or USER/NAME on the Hub.", show_default=False)
    ],
    original: Annotated[str | None, typer.Option("--original", help="MODEL to compare with.")] = None,
    images: Images = None,
    num_images: NumImages = None,
    strict: Strict = False,
    image_size: ImageSize = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Hub revision.")] = None,
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare a patched folder with its original. Prints figures and a verdict."""
    from regsurgery import pipeline
    from regsurgery.render import Screen

    options = _options(trust_remote_code=trust_remote_code, revision=revision, max_memory=max_memory)
    with Screen(as_json=as_json, quiet=quiet) as screen:
        verdict = pipeline.verify(
            folder,
            original=original,
            images=images,
            num_images=num_images,
            strict=strict,
            image_size=image_size,
            options=options,
            progress=screen,
        )
    screen.verified(verdict)
    if not verdict.passed:
        raise typer.Exit(EXIT_VERIFICATION_FAILED)


@app.command("eval", epilog="Example: regsurgery eval norms demo-patched")
def evaluate(
    task: Annotated[str, typer.Argument(help=f"{', '.join(TASKS)}.", show_default=False)],
    folder: Annotated[str, typer.Argument(help="Folder that regsurgery patch wrote, or MODEL.", show_default=False)],
    original: Annotated[str | None, typer.Option("--original", help="MODEL to compare with.")] = None,
    images: Images = None,
    num_images: NumImages = None,
    block: Annotated[
        int | None, typer.Option("--block", help="Only this block, or features of this block (from 0).")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="classify: zero-shot; one class a line, prompts split by tabs.")
    ] = None,
    draws: Annotated[int | None, typer.Option("--draws", help="controls: number of random neuron sets.", min=1)] = None,
    runs: Annotated[int | None, typer.Option("--runs", help="latency: number of paired runs.", min=4)] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="latency: images per batch.", min=1)] = None,
    features: Annotated[
        str | None, typer.Option("--features", help="probe, knn: cls (the class token) or mean (of the patches).")
    ] = None,
    train: Annotated[
        Path | None, typer.Option("--train", help="probe, knn: labelled images to learn from, instead of --images.")
    ] = None,
    neighbours: Annotated[
        int | None, typer.Option("--neighbours", help="knn: number of neighbours that vote.", min=1)
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option("--kind", help="lost: keys, queries or values (default: all).")
    ] = None,
    bias: Annotated[
        list[float] | None, typer.Option("--bias", help="lost: added to similarities (default: 0, -0.2 and -0.4).")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option("--masks", help="segment: folder of PNG files of class indices.")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="segment: linear or kmeans.")] = None,
    where: Annotated[str | None, typer.Option("--where", help="shift-map: x,y,w,h, as fractions or in pixels.")] = None,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="shift-map: image that is white where outliers go.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", help="norms, attention, shift-map: write a picture.")] = None,
    seed: Seed = 0,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate the original and the patched model side by side, with n and a 95 % interval for each figure."""
    from regsurgery import evaluation
    from regsurgery.render import Screen

    given = {
        "block": block,
        "prompts": prompts,
        "draws": draws,
        "runs": runs,
        "batch": batch,
        "features": features,
        "train": train,
        "neighbours": neighbours,
        "kind": kind,
        "bias": bias,
        "masks": masks,
        "method": method,
        "where": where,
        "mask": mask,
    }
    with Screen(as_json=as_json, quiet=quiet) as screen:
        found = evaluation.evaluate(
            folder,
            task,
            original=original,
            images=images,
            num_images=num_images,
            seed=seed,
            png=png,
            options=_options(max_memory=max_memory, device_map=device_map),
            progress=screen,
            **{name: value for name, value in given.items() if value not in (None, [])},
        )
    screen.evaluated(found)


@app.command(epilog="Example: regsurgery report demo-patched -o demo-patched.html")
def report(
    folder: Patched,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write (default: FOLDER-report.html).")
    ] = None,
    images: Images = None,
    num_images: Annotated[int, typer.Option("--num-images", help="Maximum number of images.", min=1)] = 16,
    original: Annotated[str | None, typer.Option("--original", help="MODEL to compare with.")] = None,
    boxes: Annotated[bool, typer.Option("--boxes/--no-boxes", help="Draw LOST's boxes.")] = True,
    block: Annotated[
        int | None, typer.Option("--block", help="Block of LOST's features (default: the fourth from the end).")
    ] = None,
    kind: Annotated[str, typer.Option("--kind", help="LOST's features: keys, queries or values.")] = "keys",
    bias: Annotated[float, typer.Option("--bias", help="Added to LOST's similarities.")] = -0.2,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML file that opens offline: norms, attention and object boxes over images, neurons, figures."""
    from regsurgery import reporting
    from regsurgery.render import Screen

    with Screen(as_json=as_json, quiet=quiet) as screen:
        made = reporting.report(
            folder,
            output,
            images=images,
            num_images=num_images,
            original=original,
            boxes=boxes,
            lost_block=block,
            lost_kind=kind,
            lost_bias=bias,
            options=_options(max_memory=max_memory, device_map=device_map),
            progress=screen,
        )
    screen.reported(made)


@app.command(epilog="Example: regsurgery unpatch demo-patched -o demo-restored")
def unpatch(
    folder: Patched,
    output: OutputFolder,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Restore the original checkpoint byte for byte. Every file is checked against its recorded sha256."""
    from regsurgery import restoring
    from regsurgery.render import Screen

    with Screen(as_json=as_json, quiet=quiet) as screen:
        restored = restoring.unpatch(folder, output, progress=screen)
    screen.unpatched(restored)


@app.command(epilog="Example: regsurgery push demo-patched USER/demo-patched")
def push(
    folder: Annotated[Path, typer.Argument(help="Folder that regsurgery patch wrote.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="USER/NAME on the Hub.", show_default=False)],
    private: Private = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch to push to.")] = None,
    message: Annotated[str | None, typer.Option("--message", "--commit-message", help="Commit message.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the contents of a repository that regsurgery did not write.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List files and sizes without pushing.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Push a verified folder to the Hugging Face Hub as one commit. Log in first with `hf auth login`."""
    from regsurgery import hub
    from regsurgery.render import Screen

    with Screen(as_json=as_json, quiet=quiet) as screen:
        pushed = hub.push(
            folder,
            repo,
            private=private,
            revision=revision,
            message=message,
            create_pr=create_pr,
            force=force,
            dry_run=dry_run,
            progress=screen,
        )
    screen.pushed(pushed)


@app.command(epilog="Example: regsurgery reproduce demo-patched")
def reproduce(
    where: Annotated[
        str, typer.Argument(help="Folder that regsurgery patch wrote, or the Hub id of one.", show_default=False)
    ],
    images: Annotated[Path | None, typer.Option("--images", help="The images of that run, if it used photos.")] = None,
    source: Annotated[
        str | None, typer.Option("--source", help="Where the original MODEL is now, if it has moved.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="New folder to keep the result in.")] = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Patch the source of a patched checkpoint again as recorded, and compare SHA256SUMS.

    Exit codes: 0 identical; 1 different; 2 the input is at fault.
    """
    from regsurgery import reproducing
    from regsurgery.render import Screen

    options = _options(allow_pickle, trust_remote_code, max_memory=max_memory)
    with Screen(as_json=as_json, quiet=quiet) as screen:
        reproduction = reproducing.reproduce(
            where, output, images=images, source=source, options=options, progress=screen
        )
    screen.reproduced(reproduction)
    if not reproduction.identical:
        raise typer.Exit(EXIT_DIFFERENT)


@app.command(epilog="Example: regsurgery diff demo-patched demo-restored")
def diff(
    a: Annotated[Path, typer.Argument(help="Checkpoint folder or safetensors file.", show_default=False)],
    b: Annotated[
        Path, typer.Argument(help="Checkpoint folder or safetensors file to compare with.", show_default=False)
    ],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List the tensors that differ, by name.

    Exit codes, as of the Unix tool: 0 identical; 1 differences; 2 the input is at fault.
    """
    from regsurgery import tensor_diff
    from regsurgery.render import Screen

    with Screen(as_json=as_json, quiet=quiet) as screen:
        difference = tensor_diff.diff(a, b, progress=screen)
    screen.compared(difference)
    if not difference.identical:
        raise typer.Exit(EXIT_DIFFERENT)


@app.command(epilog="Example: regsurgery families")
def families(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List the supported model families, each of which the tests verify, and what is refused."""
    from regsurgery.families import FAMILIES, REFUSED

    if as_json:
        rows = [
            {**asdict(family), "formats": {mode: family.formats(mode) for mode in ("shift", "native", "bias")}}
            for family in FAMILIES
        ]
        print(json.dumps({"families": rows, "refused": [asdict(refused) for refused in REFUSED]}, indent=2))
        return
    from regsurgery.tables import family_markdown, family_table

    if quiet:
        return
    if markdown:
        print(family_markdown(), end="")
    else:
        family_table()


def _options(
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    max_memory: str | None = None,
    device_map: str | None = None,
) -> LoadOptions:
    from regsurgery.loading import LoadOptions, parse_size

    return LoadOptions(
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        revision=revision,
        device_map=device_map,
        max_memory=None if max_memory is None else parse_size(max_memory),
    )


@contextmanager
def _nothing_to_fix(screen: Screen) -> Iterator[None]:
    """Show the diagnosis where there is nothing to fix, and exit 3."""
    try:
        yield
    except NothingToFixError as error:
        screen.diagnosed(error.diagnosis)
        raise typer.Exit(EXIT_NOTHING_TO_FIX) from None


def _version(show: bool) -> None:
    if show:
        print(f"regsurgery {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(EXIT_USER_ERROR)


def main() -> NoReturn:
    """Parse the command line, do it, and raise SystemExit with the exit code."""
    sys.exit(exit_code_of(partial(app, prog_name="regsurgery", standalone_mode=False)))
