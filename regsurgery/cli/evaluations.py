"""`regsurgery eval TASK`: one command per task, with the task's own options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from regsurgery.cli.options import takes
from regsurgery.evaluation.tasks import TASKS, Task
from regsurgery.options import EvaluateOptions

app = typer.Typer(
    name="eval",
    help="Evaluate the original and the patched model side by side, with n and a 95 % interval for each figure.",
    short_help="Evaluate original and patched model side by side.",
    epilog="Example: regsurgery eval norms demo-patched",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Folder = Annotated[
    str, typer.Argument(help="Folder that regsurgery patch wrote, or MODEL.", metavar="FOLDER", show_default=False)
]


def _command(task: Task) -> Callable[..., Any]:
    @takes(task.options, () if task.draws else ("png",))
    def evaluate(folder: Folder, options: EvaluateOptions, as_json: bool, quiet: bool) -> None:
        from dataclasses import replace

        from regsurgery.cli.screen import Screen
        from regsurgery.evaluation.evaluate import evaluate

        with Screen(as_json=as_json, quiet=quiet) as screen:
            found = evaluate(folder, task.name, replace(options, progress=screen))
        screen.evaluated(found)

    return evaluate


for _task in TASKS.values():
    app.command(
        _task.name,
        help=f"Evaluate {_task.shows}.",
        short_help=f"Evaluate {_task.short}.",
        epilog=f"Example: regsurgery eval {_task.name} demo-patched",
    )(_command(_task))
