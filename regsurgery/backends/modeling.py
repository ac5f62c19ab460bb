"""`modeling_regsurgery.py`, the self-contained loader file of a patched folder: assembling and importing it."""

from __future__ import annotations

import ast
import hashlib
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from regsurgery.backends.released import RELEASED
from regsurgery.checkpoints.limits import MAX_JSON_BYTES
from regsurgery.checkpoints.safetensors_file import weights_dtype
from regsurgery.checkpoints.writing import write_json, write_weights
from regsurgery.errors import CheckpointError, in_short
from regsurgery.settings import replaced

if TYPE_CHECKING:
    from regsurgery.compiler.surgery import Surgery

FILE_NAME = "modeling_regsurgery.py"
RUNTIME = Path(__file__).parents[1] / "runtime"
UNKNOWN_CODE = (
    "neither this regsurgery nor a released one writes this file, so loading it would run unknown code; read it and "
    "allow it with --trust-remote-code (trust_remote_code=True), or patch the source again"
)
CALL = 'modeling_regsurgery.load("{folder}")'  # of timm and open_clip
REFUSAL = "transformers_weights"  # as in runtime/transformers.py, which cannot be imported without transformers
CLASS_OF_MODEL = re.compile(r"(?<=\n)\n\n(?=class (\w+)\(Patched\w+, transformers\.\1\):\n)")
FOLDERS = itertools.count()


def modeling_source(host: ModuleType, tail: str = "") -> str:
    """The source of the loader file: `runtime/hidden.py`, `runtime/surgery.py`, the host's loader module, and `tail`.

    Docstrings of modules and imports from regsurgery are left out, but for the first docstring; what a module imports
    from the project comes before it.
    """
    assert host.__file__ is not None
    common = (RUNTIME / name for name in ("hidden.py", "surgery.py"))
    first, *others = (path.read_text("utf-8") for path in (*common, Path(host.__file__)))
    return "\n\n\n".join((first.rstrip(), *map(_body, others))) + f"\n{tail}"


def _body(source: str) -> str:
    """`source` without its docstring and what it imports from `__future__` and regsurgery."""
    lines = source.splitlines()
    for statement in reversed(ast.parse(source).body):
        module = statement.module or "" if isinstance(statement, ast.ImportFrom) else ""
        docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if docstring or module == "__future__" or module.split(".")[0] == "regsurgery":
            del lines[statement.lineno - 1 : statement.end_lineno]
    return "\n".join(lines).strip()


def loader_digest(text: str) -> str:
    """The sha256 of a loader file with `{name}` and `{config}` for its model's class names, and equal classes once.

    So it is the same for all models, and two files have the same only if their bytes are equal but for these names.
    """
    plain, *rest = CLASS_OF_MODEL.split(text)
    classes: dict[str, None] = {}
    for name, source in zip(rest[::2], rest[1::2], strict=True):
        names = {name: "{name}", rest[0]: "{config}"}
        classes[re.sub(r"\w+", lambda word, names=names: names.get(word[0], word[0]), source)] = None
    return hashlib.sha256("\n\n".join([plain, *classes]).encode()).hexdigest()


def known_loader(folder: Path, own: str) -> str | None:
    """The text of the folder's loader file, if its digest is `own` or that of a released version.

    Raises:
        CheckpointError: there is no such file, or it is too large to be one.
    """
    content = _loader(folder)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return None
    known = {own, *(digest for digests in RELEASED.values() for digest in digests)}
    return text if loader_digest(text) in known else None


def foreign_loader(folder: Path, own: str) -> str | None:
    """The name of the folder's loader file, if it has one that neither this nor a released regsurgery writes."""
    return FILE_NAME if (folder / FILE_NAME).exists() and known_loader(folder, own) is None else None


def _loader(folder: Path) -> bytes:
    path = folder / FILE_NAME
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; {folder} is not a folder that regsurgery wrote")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path}: has {path.stat().st_size} bytes, which is no loader file; patch the model again"
        )
    return path.read_bytes()


def write_folder(surgery: Surgery, folder: Path, config_name: str, source: str, **entries: Any) -> None:
    """Write the loader file, the original config plus `entries` and our own, and the weights plus register tokens."""
    (folder / FILE_NAME).write_text(source, "utf-8")
    config = {**surgery.loaded.config, **entries, "regsurgery": surgery.config_block}
    write_json(folder / config_name, config)
    dtype = weights_dtype(surgery.loaded.weights)  # open_clip runs in float32, whatever the file's dtype
    added = {name: value.to(dtype) for name, value in surgery.new_tensors().items()}
    write_weights(surgery.loaded.weights, folder, added, surgery.place)


def refusal(call: str) -> str:
    """What a folder says where transformers would load the original: `call` loads the patched model."""
    return f"this checkpoint is patched, and a stock class would ignore that; load it with {call}"


def import_modeling(folder: Path, own: str, *, trusted: bool) -> ModuleType:
    """Import a patched folder's own loader file: the only place where code of a patched folder is run.

    Args:
        own: the `loader_digest` that this version's loader for the folder's library has.
        trusted: run any file; otherwise only one that this or a released version writes.

    Raises:
        CheckpointError: the file is missing, not trusted, not Python, or fails.
    """
    path = folder / FILE_NAME
    code: str | bytes | None = _loader(folder) if trusted else known_loader(folder, own)
    if code is None:
        raise CheckpointError(f"{path}: {UNKNOWN_CODE}")
    try:  # compiled here instead of imported: an import would leave __pycache__ in the folder
        compiled = compile(code, str(path), "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{path}: not Python ({in_short(error)}); patch the model again") from error
    package = ModuleType(f"regsurgery_folder_{next(FOLDERS)}")  # of the source's own code, which the file may import
    package.__path__ = [str(folder)]
    module = ModuleType(f"{package.__name__}.{path.stem}")
    module.__file__ = str(path)
    module.__package__ = package.__name__
    sys.modules.update({each.__name__: each for each in (package, module)})  # transformers 5.0 looks there
    try:
        with replaced(sys, "dont_write_bytecode", True):
            exec(compiled, module.__dict__)  # nosec B102 # checked above
    except Exception as error:  # trusted code of others may raise anything
        del sys.modules[module.__name__]
        raise CheckpointError(f"{path}: fails with {type(error).__name__}: {in_short(error)}") from error
    return module
