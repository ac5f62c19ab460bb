"""Drills: what is promised of a run that goes wrong, tried on real processes.

    python -m tests.drills                      # all of them; prints a table
    python -m tests.drills killed-while-writing # one
    REGSURGERY_KILLS=100 python -m tests.drills killed-while-writing

Each drill tries what it is about often here, and less often in the tests (`tries`).

A drill is a function marked `@drill` in a file of this package, a file a subject: it gets an empty folder, tries what
its name says, and returns the row that it adds to the table. It raises where a promise is broken. Its name is the
function's, with hyphens, and the first line of its docstring is the promise. `tests/e2e/test_drills.py` runs each one
(tier `slow`).
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """What a drill saw: how often it tried, and how often each outcome was, in words."""

    tries: int
    outcome: str


OFTEN = "REGSURGERY_DRILLS_OFTEN"  # set by `python -m tests.drills`
Drill = Callable[[Path], Row]
_DRILLS: dict[str, Drill] = {}


def drill(function: Drill) -> Drill:
    """Register `function` as a drill."""
    name = function.__name__.replace("_", "-")
    assert name not in _DRILLS, f"two drills are called {name}"
    _DRILLS[name] = function
    return function


def drills() -> dict[str, Drill]:
    """All drills by name, in name order."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    return dict(sorted(_DRILLS.items()))


def tries(few: int, many: int) -> int:
    """How often to try: `few` times as a test, `many` times from the command line."""
    return many if OFTEN in os.environ else few


def promise(function: Drill) -> str:
    """What a drill holds the package to, in a line."""
    return (function.__doc__ or "").strip().splitlines()[0]
