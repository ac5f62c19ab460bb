"""The house: which layer may import which, no circles, and functions that a reader can hold in the head.

Imports inside functions and those for type checkers count as much as the others.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "regsurgery"
# From the ground up; a file or package may import what is in its own layer or below.
LAYERS = (
    (
        "errors",
        "progress",
        "version",
        "garbage",
        "memory",
        "plain",
        "html",
        "settings",
        "modes",
        "families",
        "formats",
        "interval",
        "machine",
        "strict_yaml",
        "runtime",
        "recipe",
    ),
    ("checkpoints", "images"),
    ("options",),
    ("frontends",),
    ("compiler",),
    ("models", "demo"),
    ("search", "backends"),
    ("verification", "emit"),
    ("evaluation", "reporting", "hub", "commands", "surveying"),
    ("cli", "__main__", "__init__"),
)
MAX_PARAMETERS = 8
MAX_LINES = 60
LONGER = "# longer than a screen: "  # such a comment in a function says why it is


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ("regsurgery", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)] = path
    return found


MODULES = modules()


def imports(module: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "regsurgery":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module), node.lineno
        elif isinstance(node, ast.Import):
            yield from ((a.name, node.lineno) for a in node.names if a.name.split(".")[0] == "regsurgery")


def layer_of(module: str) -> int:
    place = module.split(".")[1] if "." in module else "__init__"
    return next(number for number, layer in enumerate(LAYERS) if place in layer)


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    for module, path in MODULES.items():
        source = path.read_text("utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{module}:{node.lineno} {node.name}", node, source


def test_every_file_has_a_layer() -> None:
    placed = [place for layer in LAYERS for place in layer]
    there = {module.split(".")[1] for module in MODULES}
    assert len(placed) == len(set(placed)) and set(placed) == there and len(LAYERS) <= 10


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_runs_upwards(module: str) -> None:
    upwards = [f"line {line}: {other}" for other, line in imports(module) if layer_of(other) > layer_of(module)]
    assert not upwards


def test_no_import_runs_in_a_circle() -> None:
    graph = {module: {other for other, _ in imports(module)} & MODULES.keys() - {module} for module in MODULES}
    while free := [module for module, others in graph.items() if not others]:
        for module in free:
            del graph[module]
        graph = {module: others - set(free) for module, others in graph.items()}
    assert not graph, "each of these imports another one, and by that itself"


def test_the_packages_files_are_no_shortcuts() -> None:
    """What is in a package's `__init__` is imported with each of its files, so it holds nothing but the docstring."""
    for module, path in MODULES.items():
        if path.name == "__init__.py" and path.parent != PACKAGE:
            assert len(ast.parse(path.read_text("utf-8")).body) == 1, module


# Keyword-only arguments of what users call, by name.
PUBLIC = {
    "neuron_shift": "the operator of the method, whose arguments stand in every patched graph and config",
    "observe": "public API",
}


def test_no_function_takes_more_than_it_can_explain() -> None:
    """But for what users call: the API's keywords, and the flags of a command."""
    wide = []
    for where, node, _ in functions():
        arguments = node.args
        if where.startswith("regsurgery.cli.app:") or node.name in PUBLIC:
            continue
        names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        if len([name for name in names if name not in ("self", "cls")]) > MAX_PARAMETERS:
            wide.append(where)
    assert not wide


def test_no_call_hands_on_more_than_it_can_explain() -> None:
    """A dataclass is made of as many fields as it has, by their names; so is a page from its template."""
    classes = {node.name for path in MODULES.values() for node in ast.walk(ast.parse(path.read_text("utf-8")))
               if isinstance(node, ast.ClassDef)} | {"cls", "kind", "render"}  # fmt: skip
    wide = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and len(node.args) + len(node.keywords) > MAX_PARAMETERS:
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                if name not in classes:
                    wide.append(f"{module}:{node.lineno} {name}")
    assert not wide


def test_every_function_fits_one_screen_or_says_why_not() -> None:
    long = []
    for where, node, source in functions():
        assert node.end_lineno is not None
        size = node.end_lineno - node.lineno + 1
        text = ast.get_source_segment(source, node) or ""
        if size > MAX_LINES and LONGER not in text:
            long.append(f"{where}: {size} lines")
    assert not long


def test_patch_reads_as_one_straight_line() -> None:
    (node,) = [node for where, node, _ in functions() if where.startswith("regsurgery.commands.patch:")
               and node.name == "patch"]  # fmt: skip
    body = [statement for statement in node.body if not isinstance(statement, ast.Expr)]
    assert body[0].lineno and node.body[-1].end_lineno is not None
    assert node.body[-1].end_lineno - body[0].lineno + 1 <= 40
