"""What a back end is: a module of this package that has these names. `backends/formats.py` looks them up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from regsurgery.formats import Snippets

if TYPE_CHECKING:
    from torch import Tensor, nn

    from regsurgery.compiler.surgery import Surgery
    from regsurgery.frontends.loaded import Loaded


class BackEnd(Protocol):
    """How a format is written and opened again.

    Attributes:
        CONFIG_NAME: the file that holds `surgery.config_block` as its entry `regsurgery`; of a program
            and of stock code `formats.PROGRAM_CONFIG`.
    """

    CONFIG_NAME: str

    def emit(self, surgery: Surgery, folder: Path, target: Path) -> None:
        """Write the format's own files into `folder`, which becomes `target`. The same surgery gives the same bytes."""
        ...

    def reload(self, folder: Path, config: dict[str, Any], *, trusted: bool = False, **how: Any) -> nn.Module:
        """What a user would load from `folder`.

        Args:
            trusted: run whatever code the folder has; otherwise none that `foreign_code` names.
            how: of a library's format `stored` (weights stay on disk) and `image_size` (height, width).

        Raises:
            CheckpointError: a file is missing or broken, or not trusted.
        """
        ...

    def snippets(self, surgery: Surgery, folder: str) -> Snippets:
        """Two ways to load `folder` for its card: a title and a program that runs as it stands."""
        ...

    def foreign_code(self, folder: Path) -> str | None:
        """The file of `folder` whose code `reload` would run although no regsurgery writes such code; None if there is
        none.
        """
        ...


class Library(BackEnd, Protocol):
    """A library's own format in modes shift and bias: the checkpoint as it was, and a loader file."""

    def call(self, loaded: Loaded, folder: str) -> str:
        """The expression that loads the patched model of `folder`, for messages."""
        ...


class Program(BackEnd, Protocol):
    """A format that needs no library: the graph itself, for one image size."""

    def state(self, folder: Path) -> dict[str, Tensor]:
        """The tensors of a folder, by their names in the graph."""
        ...


class StockHost(BackEnd, Protocol):
    """A library, or other code, whose unmodified model holds what native mode writes."""

    def check(self, loaded: Loaded, num_registers: int) -> None:
        """Raise `UnsupportedModelError` for a model that the host's own cannot hold."""
        ...

    def outputs(self, module: nn.Module, images: Tensor, num_registers: int) -> dict[str, Tensor]:
        """What the host gives, by the kinds of `canonical.Canonical.outputs`."""
        ...


class StockCode(StockHost, Protocol):
    """Code that is not a package: `reload` builds a network of ours, which takes images of every size."""

    def stand_in(self, original: Loaded, folder: Path, config: dict[str, Any], device_map: str | None) -> Loaded:
        """The network of `folder`, ready for tracing at the size that `original` was made for.

        Raises:
            CheckpointError: as `reload`.
            UserError: there is no such device.
        """
        ...
