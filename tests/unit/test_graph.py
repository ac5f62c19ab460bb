"""Graphs that share parameters with others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils import _pytree as pytree

from regsurgery.compiler.graph import drop_unused, set_parameter, with_parameters
from regsurgery.compiler.taps import tap
from regsurgery.frontends.transformers import name_outputs


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.first.weight), self.second.weight)  # as in exported graphs: no module calls


def traced() -> fx.GraphModule:
    return fx.symbolic_trace(Two())


def test_other_values_reach_the_output_and_gradients_reach_them() -> None:
    module, x = traced(), torch.ones(1, 2)
    before = module(x)
    value = torch.eye(2, requires_grad=True)
    changed = with_parameters(module, {"first.weight": value, "third.weight": value})
    expected = F.linear(x, module.get_parameter("second.weight"))
    assert torch.equal(changed(x), expected)
    changed(x).sum().backward()
    assert value.grad is not None and float(value.grad.abs().sum()) > 0
    assert torch.equal(module(x), before), "the graph itself keeps its values"


def test_all_else_is_shared() -> None:
    module = traced()
    changed = with_parameters(module, {"first.weight": torch.eye(2)})
    assert changed.get_parameter("second.weight") is module.get_parameter("second.weight")
    assert type(changed) is type(module), "nothing is compiled"


def test_a_parameter_is_set_in_one_graph_alone() -> None:
    module = traced()
    other = fx.GraphModule(module, module.graph)
    set_parameter(other, "first.weight", nn.Parameter(torch.eye(2)))
    assert torch.equal(other.get_parameter("first.weight"), torch.eye(2))
    assert not torch.equal(module.get_parameter("first.weight"), torch.eye(2))


def test_a_tap_is_not_written_into_by_later_operators() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    stream = graph.call_function(torch.ops.aten.mul.Tensor, (x, 2.0))
    stream.name = "stream"
    later = graph.call_function(torch.ops.aten.add_.Tensor, (stream, 1.0))
    graph.output({"y": later})
    module = fx.GraphModule(nn.Module(), graph)
    x = torch.ones(1)
    outputs, taps = tap(module, {"tapped": "stream"})(x)
    assert (float(outputs["y"]), float(taps["tapped"])) == (3.0, 2.0)
    _, taps = tap(module, {"tapped": "stream"}, early_exit=True)(x)
    assert float(taps["tapped"]) == 2.0


def test_a_write_into_a_view_is_a_write_into_its_base() -> None:
    """As in MAE's mask: `mask[:, :1] = 0`, whose view nobody reads."""
    graph = fx.Graph()
    base = graph.call_function(torch.ops.aten.mul.Tensor, (graph.placeholder("x"), 2.0))
    base.name = "base"
    view = graph.call_function(torch.ops.aten.slice.Tensor, (base, 0, 0, 1))
    graph.call_function(torch.ops.aten.fill_.Scalar, (view, 0.0))
    graph.output({"y": graph.call_function(torch.ops.aten.add.Tensor, (base, 1.0))})
    drop_unused(graph)
    module = fx.GraphModule(nn.Module(), graph)
    outputs, taps = tap(module, {"tapped": "base"})(torch.ones(2))
    assert outputs["y"].tolist() == [1.0, 3.0]
    assert taps["tapped"].tolist() == [2.0, 2.0]


def test_outputs_are_named_where_pytree_knows_no_keys() -> None:
    """As of transformers 5.0, which registers its outputs without them."""

    class Output(dict):
        pass

    pytree.register_pytree_node(
        Output,
        lambda output: (list(output.values()), list(output)),
        lambda values, keys: Output(zip(keys, values, strict=True)),
    )
    first, second, third = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    named = name_outputs(Output(logits=first, hidden_states=(second, Output(pooled=third)), loss=None))
    assert list(named) == ["logits", "hidden_states.0", "hidden_states.1.pooled"]
    assert [tensor.numel() for tensor in named.values()] == [1, 2, 3]
    assert list(name_outputs(first)) == ["output"]
