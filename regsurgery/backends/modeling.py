"""`modeling_regsurgery.py`, the self-contained loader file of a patched folder: assembling and importing it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from regsurgery.checkpoints.safetensors_file import weights_dtype
from regsurgery.checkpoints.writing import write_json, write_weights
from regsurgery.errors import CheckpointError
from regsurgery.runtime import hidden, surgery

if TYPE_CHECKING:
    from regsurgery.compiler.surgery import Surgery

FILE_NAME = "modeling_regsurgery.py"


def modeling_source(host: ModuleType, tail: str = "") -> str:
    """The source of the loader file: `runtime/hidden.py`, `runtime/surgery.py`, the host's loader module, and `tail`.

    Docstrings of modules and imports from regsurgery are left out, but for the first docstring; what a module imports
    from the project comes before it.
    """
    first, *others = (_text(module) for module in (hidden, surgery, host))
    return "\n\n\n".join((first.rstrip(), *map(_body, others))) + f"\n{tail}"


def _text(module: ModuleType) -> str:
    assert module.__file__ is not None
    return Path(module.__file__).read_text("utf-8")


def _body(source: str) -> str:
    """`source` without its docstring and what it imports from `__future__` and regsurgery."""
    lines = source.splitlines()
    for statement in reversed(ast.parse(source).body):
        module = statement.module or "" if isinstance(statement, ast.ImportFrom) else ""
        docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if docstring or module == "__future__" or module.split(".")[0] == "regsurgery":
            del lines[statement.lineno - 1 : statement.end_lineno]
    return "\n".join(lines).strip()


def is_source(text: str, host: ModuleType, *tails: str) -> bool:
    """Whether `text` is `modeling_source(host)`, followed by any of `tails`, with a name in place of each `{...}`."""
    plain = modeling_source(host)
    templates = "|".join(r"\w+".join(re.escape(part) for part in re.split(r"\{\w+\}", tail)) for tail in tails)
    return text.startswith(plain) and re.fullmatch(f"({templates})*", text[len(plain) :]) is not None


def foreign_loader(folder: Path, is_own: Callable[[str], bool]) -> str | None:
    """The name of the folder's loader file, if it has one that is not our own."""
    file = folder / FILE_NAME
    return FILE_NAME if file.is_file() and not is_own(file.read_text("utf-8", "replace")) else None


def write_folder(surgery: Surgery, folder: Path, config_name: str, source: str, **entries: Any) -> None:
    """Write the loader file, the original config plus `entries` and our own, and the weights plus register tokens."""
    (folder / FILE_NAME).write_text(source, "utf-8")
    config = {**surgery.loaded.config, **entries, "regsurgery": surgery.config_block}
    write_json(folder / config_name, config)
    dtype = weights_dtype(surgery.loaded.weights)  # open_clip runs in float32, whatever the file's dtype
    added = {name: value.to(dtype) for name, value in surgery.new_tensors().items()}
    write_weights(surgery.loaded.weights, folder, added, surgery.place)


def import_modeling(folder: Path) -> ModuleType:
    """Import a patched folder's own loader file; this runs code, so the user must trust the folder."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; {folder} is not a folder that regsurgery wrote")
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    # Compiled here instead of imported: an import would leave __pycache__ in the folder.
    exec(compile(path.read_text("utf-8"), str(path), "exec"), module.__dict__)
    return module
