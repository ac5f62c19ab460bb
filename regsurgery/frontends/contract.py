"""What a front end is: a module of this package that has these names. `frontends/libraries.py` looks them up."""

from __future__ import annotations

from typing import Protocol

from regsurgery.frontends.loaded import Checkpoint, Loaded
from regsurgery.options import LoadOptions


class FrontEnd(Protocol):
    """How checkpoints of a library are read.

    Attributes:
        UNLOADABLE: what the library raises on broken configs and weights.
    """

    UNLOADABLE: tuple[type[Exception], ...]

    def load(self, checkpoint: Checkpoint, options: LoadOptions) -> Loaded:
        """The stock model of a checkpoint whose files are checked, in eval mode, and what later stages need of it.

        Raises:
            CheckpointError: config and weights do not belong together, or the library cannot load them.
            UnsupportedModelError: the library does not know the architecture, or it takes no images.
        """
        ...

    def at_size(self, loaded: Loaded, size: tuple[int, int]) -> Loaded:
        """The same checkpoint for images of `size` (height, width).

        Raises:
            UnsupportedModelError: the model takes one size only.
        """
        ...
