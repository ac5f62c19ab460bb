"""A graph run over many inputs at once, operator by operator: weights that stay on disk are read once for all of them.

Batch after batch, every batch reads every weight. Here an operator is applied to all batches before the next one, so a
run costs one reading, and memory for what the widest operator gives for all inputs together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from regsurgery.checkpoints.stored import ARRANGING, NotInMemory
from regsurgery.compiler.sites import Sites

SHARE = 1 / 4  # of the free memory, for activations of what is run together
Call = tuple[Mapping[str, Tensor], Sequence[Any]]  # parameters that differ from the module's, by name; inputs


def num_at_once(sites: Sites, num_registers: int) -> int:
    """How many images the free memory has room for in one model, at least one.

    The widest moment is an activation of an MLP, before and after, beside what enters two blocks.
    """
    import psutil

    width = max(block.hidden_size for block in sites.blocks) + sites.width
    size = 2 * (sites.num_tokens + num_registers) * width * torch.float32.itemsize
    return max(1, int(SHARE * psutil.virtual_memory().available / size))


@torch.no_grad()
def run_together(graph_module: fx.GraphModule, calls: Sequence[Call]) -> list[Any]:
    """What `graph_module` returns for each of `calls`, as if it were called with one after another."""
    graph = graph_module.graph
    last_use = {source: node for node in graph.nodes for source in node.all_input_nodes}
    values: dict[fx.Node, list[Any]] = {}  # one for each call, or a single one that all share
    position = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = [inputs[position] for _, inputs in calls]
            position += 1
        elif node.op == "get_attr":
            values[node] = _parameter(graph_module, node, calls)
        elif node.op == "call_function":
            values[node] = _applied(node, values, len(calls))
        elif node.op == "output":
            return [
                fx.map_arg(node.args[0], lambda one, number=n: _pick(values[one], number)) for n in range(len(calls))
            ]
        for source in node.all_input_nodes:
            if last_use[source] is node:
                values.pop(source, None)
    raise AssertionError("a graph has an output")


def _parameter(graph_module: fx.GraphModule, node: fx.Node, calls: Sequence[Call]) -> list[Any]:
    name = str(node.target)
    path, _, attribute = name.rpartition(".")
    own = getattr(graph_module.get_submodule(path), attribute)
    given = [parameters.get(name, own) for parameters, _ in calls]
    return given[:1] if all(value is given[0] for value in given) else given


def _applied(node: fx.Node, values: Mapping[fx.Node, list[Any]], count: int) -> list[Any]:
    """The results of one operator; weights on disk are read before it and freed after it."""
    sources = node.all_input_nodes
    shared = all(len(values[source]) == 1 for source in sources)
    arranges = shared and node.target in ARRANGING
    read = {
        source: values[source] if arranges else [_in_memory(value) for value in values[source]] for source in sources
    }
    results = []
    for number in range(1 if shared else count):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one, number=number: _pick(read[one], number))
        results.append(node.target(*args, **kwargs))  # type: ignore[operator]
    return results


def _in_memory(value: Any) -> Any:
    return pytree.tree_map_only(NotInMemory, lambda tensor: tensor.read(), value)


def _pick(values: list[Any], number: int) -> Any:
    return values[0] if len(values) == 1 else values[number]
