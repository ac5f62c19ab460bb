"""Arguments that commands share, and options made of the dataclasses in `regsurgery.options`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from regsurgery.cli import completion
from regsurgery.cli.completion import models
from regsurgery.options import Flag

Model = Annotated[
    str,
    typer.Argument(
        help="Folder, weights file, Hub id, timm:NAME, open_clip:ARCH/TAG, or demo.",
        metavar="MODEL",
        show_default=False,
        autocompletion=models,
    ),
]
Patched = Annotated[
    Path, typer.Argument(help="Folder that regsurgery patch wrote.", metavar="FOLDER", show_default=False)
]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="New folder to write.", metavar="FOLDER")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors, and the output of --json.")]

TYPES = {"bool": bool, "int": int, "float": float, "str": str, "Path": Path, "list[str]": list[str],
         "list[int]": list[int], "list[float]": list[float]}  # fmt: skip
# Of texts: `Flag.metavar`, or the field's name.
METAVARS = {"int": "N", "list[int]": "N", "float": "X", "list[float]": "X", "Path": "PATH"}


def takes(options: type[Any], hide: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the flags of the dataclass `options`, and `--json` and `--quiet`.

    The command receives an object of that class as its parameter `options`, and `as_json` and `quiet` by name.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(command, eval_str=True).parameters
        flags = [flag for flag in _flags(options) if flag.name not in hide]
        names = {one.name for one in flags}

        @functools.wraps(command)
        def call(**given: Any) -> Any:
            chosen = {name: given.pop(name) for name in list(given) if name in names}
            return command(**given, options=options(**chosen))

        kept = [one for name, one in own.items() if name not in ("options", "as_json", "quiet")]
        last = [
            inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=AsJson),
            inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet),
        ]
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in kept] + flags + last
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {one.name: one.annotation for one in parameters}
        return call

    return decorate


def _flags(options: type[Any]) -> Iterator[inspect.Parameter]:
    """A parameter for every field that has a flag: the class's own fields first, then the inherited ones."""
    by_name = {one.name: one for one in fields(options)}
    order = [name for base in options.__mro__ for name in inspect.get_annotations(base) if name in by_name]
    for name in dict.fromkeys(order):
        flag = by_name[name].metadata.get("flag")
        if flag is not None and name not in options.HIDDEN:
            yield _parameter(by_name[name], flag)


def _parameter(field: Field[Any], flag: Flag) -> inspect.Parameter:
    name, _, optional = (flag.type or str(field.type)).partition(" | ")
    kind = TYPES[name] | None if optional else TYPES[name]
    how: dict[str, Any] = {"help": flag.help}
    if name != "bool":
        how["metavar"] = flag.metavar or METAVARS.get(name, field.name.upper())
    if flag.min is not None:
        how["min"] = flag.min
    if flag.complete is not None:
        how["autocompletion"] = getattr(completion, flag.complete)
    if not flag.shown:
        how["show_default"] = False
    names = flag.names or (f"--{field.name.replace('_', '-')}",)
    default = None if field.default is MISSING else field.default
    annotation = Annotated[kind, typer.Option(*names, **how)]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
