"""Shift mode: register tokens, and a shift of the register neurons onto them at every target MLP activation."""

from __future__ import annotations

from regsurgery.compiler.modes.operation import Operation
from regsurgery.compiler.surgery import Surgery, perform
from regsurgery.garbage import objects_stay


def operate(operation: Operation) -> Surgery:
    """Run the passes; the result is exact, nothing is fitted."""
    with objects_stay():
        return perform(operation.located, operation.recipe)
