"""What each library's module of this package has: how tensors are loaded by its rules, and written in its layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Target(Protocol):
    """A model that takes the tensors of a file."""

    def size(self) -> int:
        """The number of tensors of the model: a file has at least half as many."""
        ...

    def take(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Load `tensors` as the library's own loader does; the reason why they do not fit, or None if they do."""
        ...

    def write(self, folder: Path) -> None:
        """Write the library's layout of the model, with the tensors that were taken, to the existing `folder`."""
        ...
