"""What the live page runs: a model from pixels to the figures that the page shows, as a `.onnx` file.

The network ends in the attention of its last block: nothing after that is shown. Shape suffixes: B images, N patches.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from regsurgery.backends.onnx import Session, exported, with_reshapes
from regsurgery.compiler.outliers import token_norms
from regsurgery.compiler.trace import tensor_inputs
from regsurgery.errors import UnsupportedModelError, UserError, VerificationError
from regsurgery.verification.observing import Observation, Observer

if TYPE_CHECKING:
    from regsurgery.verification.observing import Subject

PIXELS = "pixels"  # the input's name
MAX_BYTES = 100_000_000  # of a network's weights
TOLERANCE = 1e-3  # of the largest value: onnxruntime's kernels differ by 1e-6, a wrong graph by far more than this


class ShownNetwork(nn.Module):
    """Pixels `[B, 3, H, W]`, preprocessed -> by name: `norms` of the patches after the block `probe`, `[B, N]`.

    With `attention` also that of the class token in the last block, mean over its heads, to the patches (`attention`,
    `[B, N]`), and to all registers if there are any (`registers`, `[B]`).

    Raises:
        UnsupportedModelError: attention was asked for, and the graph computes it in an unknown way.
    """

    def __init__(self, subject: Subject, probe: int, *, attention: bool) -> None:
        super().__init__()
        self.subject, self.probe = subject, probe
        self.last = subject.num_blocks - 1 if attention else None
        blocks = [] if self.last is None else [self.last]
        observer = Observer(subject, blocks=blocks, what=("attention",), streams=(probe,))
        self.sites, self.network = observer.sites, with_reshapes(observer.tapped)

    @property
    def num_bytes(self) -> int:
        """Of the weights that the network reads."""
        return sum(value.numel() * value.element_size() for value in (*self.parameters(), *self.buffers()))

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what `forward` gives, in order."""
        if self.last is None:
            return ("norms",)
        return ("norms", "attention", "registers") if self._has_registers else ("norms", "attention")

    @property
    def _has_registers(self) -> bool:
        return self.subject.attended_registers.stop > self.subject.attended_registers.start

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        _, taps = self.network(*tensor_inputs(self.subject.side.loaded, pixels))
        seen = Observation(self.subject, {}, taps, self.sites)
        shown = {"norms": token_norms(seen.patches(self.probe))}
        if self.last is not None:
            given_BT = seen.attention(self.last)[:, :, 0].mean(dim=1)
            shown["attention"] = given_BT[:, self.subject.attended_patches]
            if self._has_registers:
                shown["registers"] = given_BT[:, self.subject.attended_registers].sum(dim=-1)
        return shown


def shown_network(subject: Subject, probe: int, *, attention: bool) -> ShownNetwork:
    """The network of one side, checked: whether a browser can run it.

    Raises:
        UserError: its weights are too large for a page, or stay on disk.
        UnsupportedModelError: it is not in float32, or does not take RGB images.
    """
    loaded = subject.side.loaded
    if loaded.stored:
        raise UserError("--live: needs the weights in memory; give a larger --max-memory, or leave out --live")
    parameter = next(loaded.model.parameters())
    if parameter.dtype != torch.float32:
        raise UnsupportedModelError(
            f"--live: {loaded.source.name} is in {str(parameter.dtype).removeprefix('torch.')}, and the page runs "
            "float32 alone; save it in float32 and patch that, or leave out --live"
        )
    if loaded.channels != 3:
        raise UnsupportedModelError(
            f"--live: {loaded.source.name} takes images of {loaded.channels} channels, and the page makes RGB images; "
            "leave out --live"
        )
    network = ShownNetwork(subject, probe, attention=attention).eval()
    if network.num_bytes > MAX_BYTES:
        raise UserError(
            f"--live: {loaded.source.name} has {network.num_bytes / 1e6:.0f} MB of weights, more than the limit of "
            f"{MAX_BYTES / 1e6:.0f} MB for a page; leave out --live"
        )
    return network


def write_network(network: ShownNetwork, path: Path, pixels: Tensor) -> None:
    """Write a network as `.onnx`, and compare what onnxruntime makes of it with what torch makes.

    Args:
        pixels: preprocessed, `[B, 3, H, W]`.

    Raises:
        UnsupportedModelError: the exporter cannot translate a node of the graph, or onnxruntime not run it.
        VerificationError: they differ.
    """
    from onnxscript import ir

    called = f"--live: {network.subject.side.loaded.source.name}"
    ir.save(exported(network, [pixels], [PIXELS], network.outputs, called), path)
    with torch.no_grad():
        expected, found = network(pixels), Session(path)(pixels)
    for name, value in expected.items():
        difference, largest = float((found[name] - value.cpu()).abs().max()), float(value.abs().max())
        if not difference <= TOLERANCE * largest:
            raise VerificationError(
                f"--live: in onnxruntime, {name} of {path.stem} differ by {difference:.3g}, the largest being "
                f"{largest:.3g}; nothing was written; please report this"
            )
