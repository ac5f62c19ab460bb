"""A located model and a recipe -> the surgery, in the recipe's mode.

Each mode is one file here with `operate(operation) -> Surgery`; what other stages need to know about it is in
`regsurgery.modes`.
"""

from __future__ import annotations

import importlib

from regsurgery.compiler.modes.operation import Operation
from regsurgery.compiler.surgery import Surgery


def operate(operation: Operation) -> Surgery:
    """The surgery of `operation.recipe`.

    Raises:
        RecipeError: a block or neuron of the recipe does not exist in the model.
        UnsupportedModelError: the mode is not possible for the model.
    """
    return importlib.import_module(f"regsurgery.compiler.modes.{operation.recipe.mode}").operate(operation)
