"""The command line: parse, call the API, render. Heavy imports stay inside the commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from regsurgery.cli import evaluations, recipes
from regsurgery.cli.completion import lists
from regsurgery.cli.ending import exit_code_of
from regsurgery.cli.options import AsJson, Model, OutputFolder, Patched, Quiet, takes
from regsurgery.errors import (
    EXIT_DIFFERENT,
    EXIT_NOTHING_TO_FIX,
    EXIT_USER_ERROR,
    EXIT_VERIFICATION_FAILED,
    NothingToFixError,
)
from regsurgery.options import (
    CheckOptions,
    DoctorOptions,
    PatchOptions,
    PushOptions,
    ReportOptions,
    ReproduceOptions,
    SearchOptions,
    SurveyOptions,
    VerifyOptions,
)
from regsurgery.version import __version__

if TYPE_CHECKING:
    from regsurgery.cli.screen import Screen

app = typer.Typer(
    name="regsurgery",
    help="Rewrite Vision Transformer checkpoints so that outlier tokens are gone.\n\nMODEL is a folder, a "
    "weights file, a Hub id, timm:NAME, open_clip:ARCH/TAG, or demo. Exit codes: 0 done; 1 verification failed (diff, "
    "reproduce: differences); 2 invalid input; 3 nothing to fix; 70 a bug; 71 too little memory; 130 interrupted; 129, "
    "143 ended by SIGHUP, SIGTERM.",
    epilog="Example: regsurgery patch demo -o demo-patched",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command(epilog="Example: regsurgery doctor demo", short_help="Diagnose MODEL: does it have outlier tokens?")
@takes(DoctorOptions)
def doctor(model: Model, options: DoctorOptions, as_json: bool, quiet: bool) -> None:
    """Diagnose MODEL: does it have outlier tokens? If so, where do they start, and would surgery remove them?"""
    from regsurgery.cli.screen import Screen
    from regsurgery.commands.doctor import doctor

    with Screen(as_json=as_json, quiet=quiet) as screen:
        diagnosis = doctor(model, options, progress=screen)
    screen.diagnosed(diagnosis)
    if diagnosis.verdict != "register_neurons":
        raise typer.Exit(EXIT_NOTHING_TO_FIX)


@app.command(epilog="Example: regsurgery find demo -o demo.yaml")
@takes(SearchOptions)
def find(
    model: Model,
    options: SearchOptions,
    as_json: bool,
    quiet: bool,
    statistics: Annotated[
        list[Path] | None,
        typer.Argument(
            help="With --merge: the statistics files of all parts.", metavar="STATISTICS", show_default=False
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Recipe file to write.", metavar="FILE")] = Path(
        "recipe.yaml"
    ),
    part: Annotated[
        str | None,
        typer.Option("--part", help="Run only part I of N, as one job of an array (with --stats).", metavar="I/N"),
    ] = None,
    stats: Annotated[
        Path | None, typer.Option("--stats", help="Statistics file that --part writes.", metavar="FILE")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Decide from the statistics files of all parts, listed after MODEL.")
    ] = False,
) -> None:
    """Find register neurons and write a recipe. To split the work over an array job, see docs/scale.md."""
    from regsurgery.cli.screen import Screen
    from regsurgery.commands.find import find, find_part
    from regsurgery.search.processes import is_first_process
    from regsurgery.search.shares import Part

    if (part is None) != (stats is None):
        raise typer.BadParameter("--part I/N and --stats FILE go together", param_hint="--part")
    if merge != bool(statistics) or (merge and part is not None):
        raise typer.BadParameter("goes with statistics files after MODEL, and without --part", param_hint="--merge")
    found = found_part = None
    with Screen(as_json=as_json, quiet=quiet or not is_first_process()) as screen, _nothing_to_fix(screen):
        if part is not None and stats is not None:
            found_part = find_part(model, stats, Part.parse(part), options, progress=screen)
        else:
            found = find(model, output, merge=statistics or (), **vars(options) | {"progress": screen})
    if is_first_process():
        if found_part is not None:
            screen.found_part(found_part)
        elif found is not None:
            screen.found(found, output)
    if found is not None and not found.suppressed:
        raise typer.Exit(EXIT_VERIFICATION_FAILED)


@app.command(
    epilog="Example: regsurgery patch demo -o demo-patched", short_help="Patch MODEL into a new checkpoint folder."
)
@takes(PatchOptions)
def patch(
    model: Model,
    output: OutputFolder,
    options: PatchOptions,
    as_json: bool,
    quiet: bool,
    push: Annotated[
        str | None, typer.Option("--push", help="Push the folder to USER/NAME on the Hub.", metavar="USER/NAME")
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Visibility of a new repository (default: account setting)."),
    ] = None,
) -> None:
    """Patch MODEL into a new checkpoint folder: find its register neurons (or use a recipe), patch, and verify."""
    from regsurgery.cli.screen import Screen
    from regsurgery.commands.patch import patch
    from regsurgery.hub.push import check_before_patching
    from regsurgery.hub.push import push as push_folder

    with Screen(as_json=as_json, quiet=quiet) as screen, _nothing_to_fix(screen):
        if push is not None:
            check_before_patching(push, private=private, verification=options.verification)
        result = patch(model, output, options, progress=screen)
        pushed = None
        if push is not None and not options.dry_run:
            pushed = push_folder(output, push, private=private, progress=screen)
    screen.patched(result, pushed)


@app.command(epilog="Example: regsurgery verify demo-patched", short_help="Compare a patched folder with its original.")
@takes(VerifyOptions)
def verify(
    folder: Annotated[
        str,
        typer.Argument(
            help="Folder that regsurgery patch wrote, or USER/NAME on the Hub.", metavar="FOLDER", show_default=False
        ),
    ],
    options: VerifyOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare a patched folder with its original, and print figures and a verdict."""
    from regsurgery.cli.screen import Screen
    from regsurgery.commands.verify import verify

    with Screen(as_json=as_json, quiet=quiet) as screen:
        verdict = verify(folder, options, progress=screen)
    screen.verified(verdict)
    if not verdict.passed:
        raise typer.Exit(EXIT_VERIFICATION_FAILED)


@app.command(
    epilog="Example: regsurgery check demo-patched",
    short_help="Is the surgery still in effect in a folder, after training, say?",
)
@takes(CheckOptions)
def check(
    folder: Annotated[
        str,
        typer.Argument(
            help="Patched folder, as written or as saved again by its library, or USER/NAME on the Hub.",
            metavar="FOLDER",
            show_default=False,
        ),
    ],
    options: CheckOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Load a patched folder, and look whether its surgery is in effect: neurons shifted, no outlier tokens left.

    Unlike verify it needs no original. Exit codes: 0 in effect; 1 not; 2 invalid input.
    """
    from regsurgery.cli.screen import Screen
    from regsurgery.commands.check import check

    with Screen(as_json=as_json, quiet=quiet) as screen:
        seen = check(folder, options, progress=screen)
    screen.checked(seen)
    if not seen:
        raise typer.Exit(EXIT_VERIFICATION_FAILED)


app.add_typer(evaluations.app)


@app.command(
    epilog="Example: regsurgery report demo-patched -o demo-patched.html",
    short_help="Write one HTML file that opens offline.",
)
@takes(ReportOptions)
def report(
    folder: Patched,
    options: ReportOptions,
    as_json: bool,
    quiet: bool,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write (default: FOLDER-report.html).", metavar="FILE"),
    ] = None,
) -> None:
    """Write one HTML file that opens offline: norms, attention and object boxes over images, neurons, figures."""
    from regsurgery.cli.screen import Screen
    from regsurgery.reporting.report import report

    with Screen(as_json=as_json, quiet=quiet) as screen:
        made = report(folder, output, options=options, progress=screen)
    screen.reported(made)


@app.command(
    epilog="Example: regsurgery survey published -o survey --images photos",
    short_help="Fill a table over many models; can be killed and continued.",
)
@takes(SurveyOptions)
def survey(
    listed: Annotated[
        str,
        typer.Argument(
            help="List of models, a YAML file, or a bundled one: published.",
            metavar="LIST",
            show_default=False,
            autocompletion=lists,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the survey; continued if it has one.", metavar="FOLDER")
    ],
    options: SurveyOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run doctor, find, patch (the paper's setting and ours, every mode) and eval for each model of a list.

    What is done is kept in FOLDER: the same command continues. A model that fails leaves the others alone.
    Exit codes: 0 done; 1 a model failed, see the table; 2 invalid input.
    """
    from regsurgery.cli.screen import Screen
    from regsurgery.surveying.survey import survey

    with Screen(as_json=as_json, quiet=quiet) as screen:
        found = survey(listed, output, options, progress=screen)
    screen.surveyed(found)
    if found.failed:
        raise typer.Exit(EXIT_VERIFICATION_FAILED)


@app.command(epilog="Example: regsurgery unpatch demo-patched -o demo-restored")
def unpatch(
    folder: Patched,
    output: OutputFolder,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Restore the original checkpoint byte for byte. Every file is checked against its recorded sha256."""
    from regsurgery.cli.screen import Screen
    from regsurgery.commands.unpatch import unpatch

    with Screen(as_json=as_json, quiet=quiet) as screen:
        restored = unpatch(folder, output, progress=screen)
    screen.unpatched(restored)


@app.command(epilog="Example: regsurgery push demo-patched USER/demo-patched")
@takes(PushOptions)
def push(
    folder: Patched,
    repo: Annotated[str, typer.Argument(help="Repository on the Hub.", metavar="USER/NAME", show_default=False)],
    options: PushOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Push a verified folder to the Hugging Face Hub as one commit. Log in first with `hf auth login`."""
    from regsurgery.cli.screen import Screen
    from regsurgery.hub.push import push

    with Screen(as_json=as_json, quiet=quiet) as screen:
        pushed = push(folder, repo, options, progress=screen)
    screen.pushed(pushed)


@app.command(
    epilog="Example: regsurgery reproduce demo-patched",
    short_help="Patch the source again as recorded, and compare.",
)
@takes(ReproduceOptions)
def reproduce(
    where: Annotated[
        str,
        typer.Argument(
            help="Folder that regsurgery patch wrote, or USER/NAME on the Hub.", metavar="FOLDER", show_default=False
        ),
    ],
    options: ReproduceOptions,
    as_json: bool,
    quiet: bool,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder to keep the result in.", metavar="FOLDER")
    ] = None,
) -> None:
    """Patch the source of a patched checkpoint again as recorded, and compare SHA256SUMS.

    Exit codes: 0 identical; 1 different; 2 invalid input.
    """
    from regsurgery.cli.screen import Screen
    from regsurgery.commands.reproduce import reproduce

    with Screen(as_json=as_json, quiet=quiet) as screen:
        reproduction = reproduce(where, output, options=options, progress=screen)
    screen.reproduced(reproduction)
    if not reproduction.identical:
        raise typer.Exit(EXIT_DIFFERENT)


@app.command(epilog="Example: regsurgery diff demo-patched demo-restored")
def diff(
    a: Annotated[Path, typer.Argument(help="Checkpoint folder or safetensors file.", metavar="A", show_default=False)],
    b: Annotated[
        Path,
        typer.Argument(help="Checkpoint folder or safetensors file to compare with.", metavar="B", show_default=False),
    ],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List the tensors that differ, by name.

    Exit codes, as for the Unix tool: 0 identical; 1 different; 2 invalid input.
    """
    from regsurgery.cli.screen import Screen
    from regsurgery.commands.diff import diff

    with Screen(as_json=as_json, quiet=quiet) as screen:
        difference = diff(a, b, progress=screen)
    screen.compared(difference)
    if not difference.identical:
        raise typer.Exit(EXIT_DIFFERENT)


@app.command(epilog="Example: regsurgery families", short_help="List the supported model families.")
def families(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List the supported model families (all covered by the tests), and what is refused."""
    from regsurgery.families import FAMILIES, REFUSED
    from regsurgery.modes import MODES

    if as_json:
        rows = [
            {**asdict(family), "formats": {name: family.formats(mode) for name, mode in MODES.items()}}
            for family in FAMILIES
        ]
        print(json.dumps({"families": rows, "refused": [asdict(refused) for refused in REFUSED]}, indent=2))
        return
    from regsurgery.cli.tables import family_markdown, family_table

    if quiet:
        return
    if markdown:
        print(family_markdown(), end="")
    else:
        family_table()


app.add_typer(recipes.app)


@contextmanager
def _nothing_to_fix(screen: Screen) -> Iterator[None]:
    """If there is nothing to fix, show the diagnosis and exit with code 3."""
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
    """Parse the command line, run the command, and raise SystemExit with the exit code."""
    sys.exit(exit_code_of(partial(app, prog_name="regsurgery", standalone_mode=False)))
