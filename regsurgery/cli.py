"""The command line: parse, call the API, render. Heavy imports stay inside the commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from regsurgery import __version__
from regsurgery.errors import (
    EXIT_DIFFERENT,
    EXIT_NOTHING_TO_FIX,
    EXIT_VERIFICATION_FAILED,
    NothingToFixError,
    RegsurgeryError,
)
from regsurgery.evaluation import TASKS

if TYPE_CHECKING:
    from regsurgery.loading import LoadOptions
    from regsurgery.render import Screen

app = typer.Typer(
    name="regsurgery",
    help="Rewrite Vision Transformer checkpoints so that outlier tokens are gone.\n\nMODEL is a folder, a Hub id, "
    "timm:NAME, open_clip:ARCH/TAG, or demo. Exit codes: 0 done; 1 verification failed (diff: differences); 2 the "
    "input is at fault; 3 nothing to fix.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Argument(help="Folder, Hub id, timm:NAME, open_clip:ARCH/TAG, or demo.", show_default=False)
]
Images = Annotated[
    Path | None,
    typer.Option(
        "--images", help="Folder of images, parquet or arrow files or WebDataset tars; dead-leaves pictures by default."
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Of generated pictures and random controls.")]
Force = Annotated[bool, typer.Option("--force", help="Also find in a model that was trained with registers.")]
DeviceMap = Annotated[
    str | None, typer.Option("--device-map", help="Where the model runs: auto (accelerate), cuda, ...; CPU by default.")
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        help="8GB: weights of larger checkpoints stay on disk; half of what is free by default.",
    ),
]
NumImages = Annotated[int | None, typer.Option("--num-images", help="At most that many images.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pickled weights (weights_only).")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the source checkpoint brings.")
]
Revision = Annotated[str | None, typer.Option("--revision", help="Hub revision of MODEL.")]


@app.command(epilog="Example: regsurgery doctor demo")
def doctor(
    model: Model,
    images: Images = None,
    num_images: NumImages = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Is there anything to fix in MODEL, where does it start, and is surgery the cure?"""
    from regsurgery import pipeline
    from regsurgery.render import Screen

    options = _options(allow_pickle, trust_remote_code, revision, max_memory, device_map)
    with Screen(as_json=as_json, quiet=quiet) as screen:
        diagnosis = pipeline.doctor(model, images=images, num_images=num_images, options=options, progress=screen)
    screen.diagnosed(diagnosis)
    if diagnosis.verdict != "register_neurons":
        raise typer.Exit(EXIT_NOTHING_TO_FIX)


@app.command(epilog="Example: regsurgery find demo -o demo.yaml")
def find(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Recipe file to write.")] = Path("recipe.yaml"),
    images: Images = None,
    num_images: NumImages = None,
    seed: Seed = 0,
    force: Force = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Find the register neurons of MODEL and write a recipe."""
    from regsurgery import pipeline
    from regsurgery.distributed import is_first_process
    from regsurgery.render import Screen

    options = _options(allow_pickle, trust_remote_code, revision, max_memory, device_map)
    with Screen(as_json=as_json, quiet=quiet or not is_first_process()) as screen, _nothing_to_fix(screen):
        found = pipeline.find(
            model,
            output,
            images=images,
            num_images=num_images,
            seed=seed,
            force=force,
            options=options,
            progress=screen,
        )
    if is_first_process():
        screen.found(found, output)
    if not found.selection.suppressed:
        raise typer.Exit(EXIT_VERIFICATION_FAILED)


@app.command(epilog="Example: regsurgery patch demo -o demo-patched")
def patch(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder to write.")],
    recipe: Annotated[str | None, typer.Option("--recipe", help="Recipe file, or name of a bundled recipe.")] = None,
    mode: Annotated[str | None, typer.Option("--mode", help="shift, native or bias; by default the recipe's.")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Native mode: train the registers on the images.")
    ] = True,
    format: Annotated[str | None, typer.Option("--format", help="transformers, timm, open_clip, pt2 or onnx.")] = None,
    num_registers: Annotated[int | None, typer.Option("--num-registers", help="Register tokens.", min=1)] = None,
    images: Images = None,
    num_images: NumImages = None,
    seed: Seed = 0,
    force: Force = False,
    link: Annotated[
        bool, typer.Option("--link", help="Hard links instead of copies of shards that stay what they are.")
    ] = False,
    verification: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare original and patched model on images.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything, but write nothing.")] = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Patch MODEL: find its register neurons (or take a recipe), surgery, verification, a new checkpoint folder."""
    from regsurgery import pipeline
    from regsurgery.render import Screen

    with Screen(as_json=as_json, quiet=quiet) as screen, _nothing_to_fix(screen):
        result = pipeline.patch(
            model,
            output,
            recipe=recipe,
            mode=mode,
            calibrate=calibrate,
            format=format,
            num_registers=num_registers,
            images=images,
            num_images=num_images,
            seed=seed,
            force=force,
            link=link,
            verification=verification,
            dry_run=dry_run,
            progress=screen,
            options=_options(allow_pickle, trust_remote_code, revision, max_memory),
        )
    screen.patched(result)


@app.command(epilog="Example: regsurgery verify demo-patched")
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder that regsurgery patch wrote.", show_default=False)],
    original: Annotated[str | None, typer.Option("--original", help="MODEL to compare with.")] = None,
    images: Images = None,
    num_images: NumImages = None,
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare a patched folder against its original: figures and a verdict."""
    from regsurgery import pipeline
    from regsurgery.render import Screen

    options = _options(max_memory=max_memory)
    with Screen(as_json=as_json, quiet=quiet) as screen:
        verdict = pipeline.verify(
            folder, original=original, images=images, num_images=num_images, options=options, progress=screen
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
    block: Annotated[int | None, typer.Option("--block", help="That block only, or its features; from 0.")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="classify: zero-shot; one class a line, prompts split by tabs.")
    ] = None,
    draws: Annotated[int | None, typer.Option("--draws", help="controls: sets of random neurons.", min=1)] = None,
    runs: Annotated[int | None, typer.Option("--runs", help="latency: pairs of runs.", min=4)] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="latency: images in a batch.", min=1)] = None,
    features: Annotated[
        str | None, typer.Option("--features", help="probe, knn: cls (the class token) or mean (of the patches).")
    ] = None,
    train: Annotated[
        Path | None, typer.Option("--train", help="probe, knn: labelled images to learn from, instead of --images.")
    ] = None,
    neighbours: Annotated[int | None, typer.Option("--neighbours", help="knn: how many vote.", min=1)] = None,
    kind: Annotated[
        list[str] | None, typer.Option("--kind", help="lost: keys, queries or values; all by default.")
    ] = None,
    bias: Annotated[
        list[float] | None, typer.Option("--bias", help="lost: added to similarities; 0, -0.2 and -0.4 by default.")
    ] = None,
    masks: Annotated[Path | None, typer.Option("--masks", help="segment: folder of PNG of class indices.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="segment: linear or kmeans.")] = None,
    where: Annotated[str | None, typer.Option("--where", help="shift-map: x,y,w,h, in fractions or pixels.")] = None,
    mask: Annotated[Path | None, typer.Option("--mask", help="shift-map: image, white where outliers go.")] = None,
    png: Annotated[Path | None, typer.Option("--png", help="norms, attention, shift-map: picture to write.")] = None,
    seed: Seed = 0,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Figures of the original and the patched model side by side, each with n and a 95 % interval."""
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


@app.command(epilog="Example: regsurgery unpatch demo-patched -o demo-restored")
def unpatch(
    folder: Annotated[Path, typer.Argument(help="Folder that regsurgery patch wrote.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder to write.")],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the checkpoint that was patched, byte for byte; every file is checked against its recorded sha256."""
    from regsurgery import restoring
    from regsurgery.render import Screen

    with Screen(as_json=as_json, quiet=quiet) as screen:
        restored = restoring.unpatch(folder, output, progress=screen)
    screen.unpatched(restored)


@app.command(epilog="Example: regsurgery diff demo-patched demo-restored")
def diff(
    a: Annotated[Path, typer.Argument(help="Checkpoint folder or safetensors file.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="The one to compare with.", show_default=False)],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List the tensors that differ between two checkpoints, by name.

    Exit codes, as of the Unix tool: 0 identical; 1 differences; 2 the input is at fault.
    """
    from regsurgery import tensor_diff
    from regsurgery.render import Screen

    with Screen(as_json=as_json, quiet=quiet) as screen:
        difference = tensor_diff.diff(a, b, progress=screen)
    screen.compared(difference)
    if not difference.identical:
        raise typer.Exit(EXIT_DIFFERENT)


@app.command(epilog="Example: regsurgery recipes")
def recipes(as_json: AsJson = False) -> None:
    """List the bundled recipes."""
    from regsurgery.recipe import bundled_recipes

    found = bundled_recipes()
    if as_json:
        print(json.dumps({name: recipe.as_dict() for name, recipe in found.items()}, indent=2))
        return
    from regsurgery.render import recipe_table

    recipe_table(found)


@app.command(epilog="Example: regsurgery families")
def families(
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
) -> None:
    """List the model families that the tests hold to the parity gate, mode by mode, and what is refused."""
    from regsurgery.families import FAMILIES, REFUSED

    if as_json:
        rows = [
            {**asdict(family), "formats": {mode: family.formats(mode) for mode in ("shift", "native", "bias")}}
            for family in FAMILIES
        ]
        print(json.dumps({"families": rows, "refused": [asdict(refused) for refused in REFUSED]}, indent=2))
        return
    from regsurgery.render import family_markdown, family_table

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


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> NoReturn:
    """Parse the command line, do it, and raise SystemExit with the exit code."""
    try:
        app()
    except RegsurgeryError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)
