"""Queries on an fx graph, for matching and passes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn


def ancestor_sets(graph: fx.Graph) -> dict[fx.Node, int]:
    """For every node, the set of its ancestors, itself included, as a bit mask over node positions.

    Only values count: what is expanded to the batch size of a tensor does not descend from it.
    """
    masks: dict[fx.Node, int] = {}
    for position, node in enumerate(graph.nodes):
        mask = 1 << position
        for source in () if node.target is torch.ops.aten.sym_size.int else node.all_input_nodes:
            mask |= masks[source]
        masks[node] = mask
    return masks


def is_ancestor(masks: dict[fx.Node, int], ancestor: fx.Node, node: fx.Node) -> bool:
    own_bit = 1 << (masks[ancestor].bit_length() - 1)  # a node's own bit is its highest: inputs come before it
    return bool(masks[node] & own_bit)


def find_node(graph_module: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in graph_module.graph.nodes if node.name == name)


def symbolic_shape(node: fx.Node) -> torch.Size:
    """The shape of a node's value, with a symbolic batch; empty if the value is not a tensor."""
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else torch.Size()


def hint(size: Any) -> int:
    """The example value of a size that may be symbolic (the batch)."""
    return size if isinstance(size, int) else size.node.hint


def is_fixed(size: Any) -> bool:
    """Whether a size is a number: one that is symbolic may be found to have only one value."""
    return isinstance(size, int) or size.node.maybe_as_int() is not None


def shape_of(value: Any) -> tuple[int, ...]:
    return tuple(hint(size) for size in value.shape) if isinstance(value, Tensor) else ()


def module_path(node: fx.Node) -> str:
    """Path of the innermost module whose forward made `node`."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1] if paths else ""


def common_path(paths: list[str]) -> str:
    """The longest path that all of `paths` begin with."""
    parts = [path.split(".") for path in paths]
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def writes(node: fx.Node) -> bool:
    """Whether `node` is an operator that writes into its first argument."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def drop_unused(graph: fx.Graph) -> None:
    """Erase every node that the output does not need.

    `fx.Graph.eliminate_dead_code` alone keeps operators that draw random numbers, as dropout does even in eval mode,
    and with them all blocks after an early exit. An in-place write stays if something else reads what it wrote to.
    """

    def needed(node: fx.Node) -> bool:
        return node.op in ("placeholder", "output") or (
            writes(node) and any(len(source.users) > 1 for source in node.all_input_nodes[:1])
        )

    graph.eliminate_dead_code(needed)


def between(graph_module: fx.GraphModule, start: fx.Node, end: fx.Node) -> fx.GraphModule:
    """`end` as a function of `start` alone; everything else it needs must be parameters and constants."""
    graph = fx.Graph()
    copied = {start: graph.placeholder("start")}
    needed, work = {end}, [end]
    while work:
        node = work.pop()
        if node is not start:
            assert node.op != "placeholder", f"{end.name} needs the input {node.name} in addition to {start.name}"
            work.extend(source for source in node.all_input_nodes if source not in needed)
            needed.update(node.all_input_nodes)
    for node in graph_module.graph.nodes:
        if node in needed and node is not start:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    graph.output(copied[end])
    return fx.GraphModule(graph_module, graph)


def starting_at(graph_module: fx.GraphModule, name: str) -> fx.GraphModule:
    """`graph_module` with one more input, the last, which replaces the value of the node `name`.

    Nodes that the outputs then no longer need are removed. Parameters are shared, the graph is a copy.
    """
    graph = copy.deepcopy(graph_module.graph)
    node = next(node for node in graph.nodes if node.name == name)
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        given = graph.placeholder("entering")
    node.replace_all_uses_with(given)
    drop_unused(graph)
    return fx.GraphModule(graph_module, graph)


def set_parameter(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Set a parameter by its dotted name without touching modules that `root` shares with other graphs."""
    holder, leaf = _own_holder(root, name)
    holder.register_parameter(leaf, parameter)


def with_parameters(graph_module: fx.GraphModule, values: Mapping[str, Tensor]) -> fx.GraphModule:
    """`graph_module` with other `values` for those of its parameters that are named; gradients reach them.

    Everything else is shared, the generated code too. As `torch.func.functional_call`, which for small models spends
    most of the time on exchanging parameters at every call; but parameters tied to a named one keep their value.
    """
    own = {name for name, _ in graph_module.named_parameters(remove_duplicate=False)}
    twin = object.__new__(type(graph_module))
    _share(graph_module, twin)
    for name, value in values.items():
        if name in own:
            holder, leaf = _own_holder(twin, name)
            holder._parameters[leaf] = value  # type: ignore[assignment]
    return twin


def _own_holder(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter `name`, and its name there; modules on the way become copies of their own."""
    *path, leaf = name.split(".")
    module = root
    for part in path:
        own = nn.Module()
        _share(getattr(module, part), own)
        module._modules[part] = own
        module = own
    return module, leaf


def _share(module: nn.Module, twin: nn.Module) -> None:
    twin.__dict__.update({k: dict(v) if isinstance(v, dict) else v for k, v in module.__dict__.items()})
