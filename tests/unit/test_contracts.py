"""Front ends, back ends and modes are modules; each has what its contract names, with the same parameters."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

from regsurgery.backends.contract import BackEnd, Library, Program, StockCode, StockHost
from regsurgery.backends.formats import backend
from regsurgery.cli.screen import Screen
from regsurgery.formats import FORMATS, LIBRARIES, PROGRAMS, STOCK_CODE
from regsurgery.frontends.contract import FrontEnd
from regsurgery.frontends.libraries import frontend
from regsurgery.modes import MODES
from regsurgery.progress import Progress

CASES = [
    *((frontend(name), FrontEnd) for name in LIBRARIES),
    *((backend(name), BackEnd) for name in FORMATS),
    *((backend(name, mode), BackEnd) for name in FORMATS for mode in MODES.values()),
    *((backend(name), Library) for name in LIBRARIES),
    *((backend(name), Program) for name in PROGRAMS),
    *((backend(name, MODES["native"]), StockHost) for name in LIBRARIES),
    *((backend(name), StockCode) for name in STOCK_CODE),
]


def members(contract: type[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for base in contract.__mro__:
        found |= {name: value for name, value in vars(base).items() if inspect.isfunction(value) and name[0] != "_"}
        found |= dict.fromkeys(inspect.get_annotations(base), None)
    return found


@pytest.mark.parametrize("module, contract", CASES, ids=lambda each: getattr(each, "__name__", str(each)))
def test_a_module_keeps_its_contract(module: Any, contract: type[Any]) -> None:
    assert members(contract)
    for name, wanted in members(contract).items():
        assert hasattr(module, name), f"{module.__name__} has no {name}"
        if wanted is None:
            continue
        needed = [
            one.name for one in inspect.signature(wanted).parameters.values() if one.kind is one.POSITIONAL_OR_KEYWORD
        ]
        given = inspect.signature(getattr(module, name)).parameters
        assert len([one for one in given.values() if one.default is one.empty]) == len(needed) - 1, (module, name)


@pytest.mark.parametrize("name", MODES)
def test_every_mode_has_its_file(name: str) -> None:
    module = importlib.import_module(f"regsurgery.compiler.modes.{name}")
    assert list(inspect.signature(module.operate).parameters) == ["operation"]


def test_the_screen_is_told_of_progress_as_anybody() -> None:
    for name, wanted in members(Progress).items():
        if wanted is not None:
            assert list(inspect.signature(getattr(Screen, name)).parameters) == list(
                inspect.signature(wanted).parameters
            )
