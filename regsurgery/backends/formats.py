"""The back end of each format."""

from __future__ import annotations

import importlib
from typing import Any

from regsurgery.formats import LIBRARIES
from regsurgery.modes import SHIFT, Mode


def backend(name: str, mode: Mode = SHIFT) -> Any:
    """The back end of a format in a mode: a `contract.BackEnd`, in native mode a `contract.StockHost` of a library."""
    module = f"native_{name}" if mode.stock and name in LIBRARIES else name
    return importlib.import_module(f"regsurgery.backends.{module}")
