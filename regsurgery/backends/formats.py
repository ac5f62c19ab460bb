"""The back end of each format."""

from __future__ import annotations

import importlib
from types import ModuleType

from regsurgery.formats import LIBRARIES
from regsurgery.modes import SHIFT, Mode


def backend(name: str, mode: Mode = SHIFT) -> ModuleType:
    """The back end of a format in a mode; stock hosts have their own."""
    module = f"native_{name}" if mode.stock and name in LIBRARIES else name
    return importlib.import_module(f"regsurgery.backends.{module}")
