"""The modes of a surgery: data. What each one does to a graph is in `compiler/modes`, one file per mode."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mode:
    """What other stages need to know about a mode.

    Attributes:
        title: its name in model cards.
        stock: written for an unmodified model of a library: there is no loader file, and weights are edited, so the
            original cannot be restored.
        fitted: its weights are fitted on images.
        constants: attentions get a constant key and value; there are no register tokens.
        follows_size: the number of registers may follow the number of patches.
    """

    name: str
    title: str
    stock: bool = False
    fitted: bool = False
    constants: bool = False
    follows_size: bool = False


SHIFT = Mode("shift", "neuron shift", follows_size=True)
NATIVE = Mode("native", "native registers", stock=True, fitted=True)
BIAS = Mode("bias", "attention bias", fitted=True, constants=True)
MODES = {mode.name: mode for mode in (SHIFT, NATIVE, BIAS)}
