"""Shift mode: register tokens, and at every target MLP activation the shift of the register neurons onto them."""

from __future__ import annotations

from regsurgery.compiler.modes.operation import Operation
from regsurgery.compiler.surgery import Surgery, perform
from regsurgery.garbage import objects_stay


def operate(operation: Operation) -> Surgery:
    """The passes, exact; nothing is fitted."""
    with objects_stay():
        return perform(operation.located, operation.recipe)
