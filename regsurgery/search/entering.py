"""Trials start at their first block: what enters a block does not depend on what is shifted in it or after it, so it is
computed once.

Shape suffixes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from regsurgery.compiler.graph import starting_at
from regsurgery.compiler.sites import Sites
from regsurgery.compiler.taps import tap
from regsurgery.runtime.surgery import insert_registers

KEPT = 3  # the streams that enter this many blocks stay in memory,
SPACE = 64 << 20  # and those of more blocks as far as all of them together take no more bytes than this


class Entering:
    """Where trials of a model with registers, and a shift in every block that may have one, begin.

    Args:
        patched: the model.
        tapped: the same with what a trial wants of it as outputs.
        inputs: of the batches.
    """

    def __init__(
        self, patched: fx.GraphModule, sites: Sites, tapped: fx.GraphModule, inputs: Sequence[list[Tensor]]
    ) -> None:
        self.patched, self.sites, self.tapped, self.inputs = patched, sites, tapped, inputs
        self._kept: OrderedDict[int, tuple[list[Tensor], fx.GraphModule]] = OrderedDict()

    def starts(self, neurons: Mapping[int, Sequence[int]]) -> tuple[list[Tensor], fx.GraphModule]:
        """The streams `[B, T, D]` that enter the first block of `neurons`, one a batch, and `tapped` from there on.

        The latter takes a stream as its last input, and may write into it.
        """
        block = min(neurons, default=max(self._kept, default=0))  # where nothing is shifted, any will do
        if block not in self._kept:
            started = self._streams(block), starting_at(self.tapped, self._node(block))
            while len(self._kept) >= KEPT and self.num_bytes + _num_bytes(started[0]) > SPACE:
                self._kept.popitem(last=False)
            self._kept[block] = started
        self._kept.move_to_end(block)
        return self._kept[block]

    @property
    def num_bytes(self) -> int:
        """What the streams take that stay in memory."""
        return sum(_num_bytes(streams) for streams, _ in self._kept.values())

    @torch.no_grad()
    def _streams(self, block: int) -> list[Tensor]:
        """What enters `block`, from what enters the nearest earlier block that is known."""
        before = tap(self.patched, {"stream": self._node(block)}, early_exit=True)
        earlier = max((at for at in self._kept if at < block), default=None)
        known: list[list[Tensor]] = [[] for _ in self.inputs]
        if earlier is not None:
            before = starting_at(before, self._node(earlier))
            known = [[stream_BTD.clone()] for stream_BTD in self._kept[earlier][0]]
        shift_only(before, {})
        return [before(*inputs, *stream)[1]["stream"] for inputs, stream in zip(self.inputs, known, strict=True)]

    def _node(self, block: int) -> str:
        """The node whose value enters `block`."""
        if block:
            return self.sites.blocks[block - 1].output
        (joined,) = self.patched.graph.find_nodes(op="call_function", target=insert_registers)
        return joined.name


def _num_bytes(streams: Sequence[Tensor]) -> int:
    return sum(stream_BTD.nbytes for stream_BTD in streams)


def shift_only(graph_module: fx.GraphModule, neurons: Mapping[int, Sequence[int]]) -> None:
    """Set the neurons, by block, that the shifts of `graph_module` take: those of the blocks that it has."""
    for name, listed in graph_module.named_buffers():
        block = block_of(name)
        if block is not None:
            chosen = torch.tensor(neurons.get(block, ()), dtype=torch.int64, device=listed.device)
            setattr(graph_module, name, chosen)


def block_of(name: str) -> int | None:
    """The block whose neurons are in the buffer of that name, or the node that gets it."""
    prefix, _, block = name.rpartition("_")
    return int(block) if prefix == "register_neurons" else None
