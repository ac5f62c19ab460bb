"""The rows of an MLP's up projections that form one hidden unit, plain or gated, as parameters of the graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from regsurgery.compiler.graph import find_node
from regsurgery.compiler.ops import NONLINEAR
from regsurgery.compiler.sites import Block
from regsurgery.compiler.trace import Traced


@dataclass(frozen=True)
class Projection:
    """A linear: names of its weight `[out, in]` and bias `[out]` (or None), and the first row of the hidden units.

    A gated MLP may have gate and value in one linear, the gate first; then both have the same names.
    """

    node: str
    weight: str
    bias: str | None
    offset: int = 0


@dataclass(frozen=True)
class Mlp:
    """Names of the parameters that produce the hidden units of one block.

    Attributes:
        source: node of the MLP's input `[B, T, D]`.
        gate: the input of the nonlinearity.
        value: multiplied by the gate; None for a plain MLP.
        down: name of the down projection's weight `[D, H]`.
    """

    source: str
    gate: Projection
    value: Projection | None
    down: str


def mlp_of(traced: Traced, block: Block) -> Mlp:
    """The MLP of `block`."""
    ups = [find_node(traced.graph_module, name) for name in block.ups]
    gate = next((up for up in ups if any(user.target in NONLINEAR for user in up.users)), ups[0])
    others = [up for up in ups if up is not gate]
    source, down = gate.args[0], find_node(traced.graph_module, block.down)
    assert isinstance(source, fx.Node) and len(others) <= 1
    first = _projection(gate)
    value = _projection(others[0]) if others else None
    if value is None and len(traced.graph_module.get_parameter(first.weight)) == 2 * block.hidden_size:
        value = Projection(first.node, first.weight, first.bias, block.hidden_size)
    return Mlp(source.name, first, value, _target(down, 1) or "")


def _projection(linear: fx.Node) -> Projection:
    weight = _target(linear, 1)
    assert weight is not None
    return Projection(linear.name, weight, _target(linear, 2))


def _target(linear: fx.Node, argument: int) -> str | None:
    node = linear.args[argument] if len(linear.args) > argument else None
    return str(node.target) if isinstance(node, fx.Node) else None
