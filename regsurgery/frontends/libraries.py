"""The front end of each library."""

from __future__ import annotations

import importlib
from typing import cast

from regsurgery.formats import LIBRARIES
from regsurgery.frontends.contract import FrontEnd


def frontend(library: str) -> FrontEnd:
    """The front end of `transformers`, `timm` or `open_clip`."""
    assert library in LIBRARIES
    return cast(FrontEnd, importlib.import_module(f"regsurgery.frontends.{library}"))
