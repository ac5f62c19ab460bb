"""The formats that patched checkpoints are written in: data."""

from __future__ import annotations

import importlib
import importlib.util

from regsurgery.errors import UserError
from regsurgery.modes import Mode

Snippets = tuple[tuple[str, str], tuple[str, str]]  # title, Python code
LIBRARIES = ("transformers", "timm", "open_clip")
STOCK_CODE = ("dinov2",)  # of native mode alone: unmodified code that is not a package and has no config file
PROGRAMS = ("pt2", "onnx")
FORMATS = (*LIBRARIES, *STOCK_CODE, *PROGRAMS)
PROGRAM_CONFIG = "regsurgery.json"  # describes what is in a folder that is not of a library
WEIGHTS_NAMES = {"transformers": "model.safetensors", "timm": "model.safetensors",
                 "open_clip": "open_clip_model.safetensors"}  # fmt: skip
EXTRAS = {"onnx": ("onnx", "onnxscript", "onnxruntime")}  # packages that come with `regsurgery[NAME]`


def has_host(format: str, mode: Mode) -> bool:
    """Whether what is written is weights for an unmodified model: its back end is a `contract.StockHost`."""
    return format in STOCK_CODE or (mode.stock and format in LIBRARIES)


def any_size(format: str, mode: Mode) -> bool:
    """Whether the output can take images of other sizes, if the model itself can.

    A program is for one size; in native mode open_clip builds timm's tower for the size in its config.
    """
    return format not in PROGRAMS and not (format == "open_clip" and mode.stock)


def require(format: str, what: str | None = None) -> None:
    """Raise `UserError` if a package is not installed that the format, or `what` is made with it, needs."""
    missing = [name for name in EXTRAS.get(format, ()) if importlib.util.find_spec(name) is None]
    if missing:
        what = what or f"format {format}"
        raise UserError(f"{what}: needs {' and '.join(missing)}; install with: pip install 'regsurgery[{format}]'")
