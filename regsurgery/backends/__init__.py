"""One file a library or format: how its checkpoints are read, and how a patched one is written.

A library module has `load` (folder -> `Loaded`), `emit` (write the patched folder's own files),
`reload` (a patched folder -> its module, as a user would get it) and `snippets` (two ways to load the folder, for its
card: a title and a program that runs as it stands). A format without a library of its own (`pt2`, `onnx`) has `emit`,
`reload` and `snippets`, and `state`, the tensors of a folder. So has a stock host of native mode (`native_*`), and
`outputs`, which names what the host gives.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

from regsurgery.errors import UserError

Snippets = tuple[tuple[str, str], tuple[str, str]]  # title, Python code
LIBRARIES = ("transformers", "timm", "open_clip")
PROGRAMS = ("pt2", "onnx")
FORMATS = (*LIBRARIES, *PROGRAMS)
_PROGRAMS = {"pt2": "pt2", "onnx": "onnx_program"}
_MODULES = {"transformers": "hf_transformers", "timm": "timm_vit", "open_clip": "open_clip_vit", **_PROGRAMS}
_NATIVE = {"transformers": "native_transformers", "timm": "native_timm", "open_clip": "native_open_clip", **_PROGRAMS}
WEIGHTS_NAMES = {"transformers": "model.safetensors", "timm": "model.safetensors",
                 "open_clip": "open_clip_model.safetensors"}  # fmt: skip
EXTRAS = {"onnx": ("onnx", "onnxscript", "onnxruntime")}  # packages that come with `regsurgery[NAME]`


def library(name: str) -> Any:
    """The back end of a library; see the module."""
    assert name in LIBRARIES
    return backend(name)


def backend(name: str, mode: str = "shift") -> ModuleType:
    """The back end of a format in a mode."""
    modules = _NATIVE if mode == "native" else _MODULES
    return importlib.import_module(f"regsurgery.backends.{modules[name]}")


def any_size(format: str, mode: str) -> bool:
    """Whether what is written can take images of other sizes, where the model itself does.

    A program is for one size; in native mode open_clip builds timm's tower for the size in its config.
    """
    return format in LIBRARIES and not (format == "open_clip" and mode == "native")


def require(format: str) -> None:
    """Raise `UserError` where a package is not installed that the format needs."""
    missing = [name for name in EXTRAS.get(format, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"format {format}: needs {' and '.join(missing)}, not installed; install with: "
            f"pip install 'regsurgery[{format}]'"
        )
