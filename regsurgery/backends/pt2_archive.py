"""What loading a `.pt2` would run besides its operators.

torch unpickles parts of an archive, evaluates its size expressions, and makes Python source of its graph. A program
that regsurgery writes needs no more than what is listed here, so one with anything else is unknown code.
"""

from __future__ import annotations

import io
import json
import pickle  # nosec B403 # its error
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regsurgery.checkpoints.limits import BROKEN

PARTS = re.compile(
    r"[^/]+/(archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json"
    r"|data/(weights/weight|constants/tensor)_\d+|data/(weights/model_weights|constants/model_constants)_config\.json"
    r"|data/sample_inputs/model\.pt)"
)
OPERATORS = re.compile(r"torch\.ops\.aten\.\w+\.\w+|_operator\.(add|sub|mul|floordiv|mod|neg|eq|ne|ge|gt|le|lt)")
NAME = re.compile(r"[\w.]*")
TEXT = re.compile(r"[\w.,:;/<>\[\]@+ -]*")  # nothing is called or assigned without brackets, quotes or "="
SIZES = re.compile(
    r"(Symbol\('[su]\d+'(, (positive|integer|nonnegative)=(True|False))*\)|Integer\(-?\d{1,18}\)"
    r"|(Add|Mul|Max|Min|Mod|FloorDiv)\(|s\d{1,9}|-?\d{1,18}|, |[ ()+*-])*+"
)
TREES = ("in_spec", "out_spec", "context")  # JSON in a string: how inputs and outputs are nested
MAX_GRAPH_BYTES = 256 << 20


def foreign_part(path: Path) -> str | None:
    """What in the archive is none of the above, in words; None if there is nothing of the kind."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _foreign_part(archive)
    except (zipfile.BadZipFile, pickle.UnpicklingError, NotImplementedError, RecursionError, *BROKEN) as error:
        return f"a part that cannot be read ({str(error)[:100]})"


def _foreign_part(archive: zipfile.ZipFile) -> str | None:
    import torch

    for entry in archive.infolist():
        if not PARTS.fullmatch(entry.filename) or entry.compress_type != zipfile.ZIP_STORED:
            return f"the part {entry.filename[:100]!r}"
        name = entry.filename.partition("/")[2]
        if name.startswith("data/sample_inputs"):
            torch.load(io.BytesIO(archive.read(entry)), weights_only=True)  # torch itself falls back to any pickle
        if not name.endswith(".json"):
            continue
        if entry.file_size > MAX_GRAPH_BYTES:
            return f"{entry.file_size} bytes of {name}"
        content = json.loads(archive.read(entry))
        if name.startswith("models"):
            foreign = next(_foreign_in_graph(content), None)
        else:
            foreign = next(
                (f"a pickle, {key[:100]!r}" for key in content["config"] if _pickled(content["config"][key])), None
            )
        if foreign is not None:
            return foreign
    return None


def _pickled(payload: dict[str, Any]) -> bool:
    return payload["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"])


def _foreign_in_graph(tree: Any, key: str = "") -> Iterator[str]:
    """The strings of a graph that are more than names."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if not TEXT.fullmatch(name):
                yield f"the name {name[:100]!r}"
            elif name == "guards_code" and value:
                yield "guards, which are source code"
            else:
                yield from _foreign_in_graph(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from _foreign_in_graph(value, key)
    elif isinstance(tree, str) and key in TREES:
        yield from _foreign_in_graph(json.loads(tree))
    elif isinstance(tree, str):
        allowed = {"expr_str": SIZES, "target": OPERATORS, "name": NAME}.get(key, TEXT)
        if not allowed.fullmatch(tree):
            yield f"{key} {tree[:100]!r}"
