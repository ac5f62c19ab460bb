"""The front end of each library."""

from __future__ import annotations

import importlib
from typing import Any

from regsurgery.formats import LIBRARIES


def frontend(library: str) -> Any:
    """The front end of `transformers`, `timm` or `open_clip`."""
    assert library in LIBRARIES
    return importlib.import_module(f"regsurgery.frontends.{library}")
