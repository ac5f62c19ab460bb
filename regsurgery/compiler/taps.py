"""Reading activations from a graph: taps instead of hooks."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import torch
from torch import fx

from regsurgery.compiler.graph import drop_unused, written_later


def tap(
    graph_module: fx.GraphModule,
    nodes: Mapping[str, str],
    *,
    early_exit: bool = False,
    outputs: Collection[str] | None = None,
) -> fx.GraphModule:
    """A graph module that returns `(outputs, taps)`, where `taps[key]` is the value of the node `nodes[key]`.

    With `outputs`, only those are returned as outputs; with `early_exit` none, and only what the taps need is computed.
    A value that a later operator writes into is copied where it is made. Parameters are shared; the original graph is
    not touched.
    """
    graph = copy.deepcopy(graph_module.graph)
    by_name = {node.name: node for node in graph.nodes}
    (output,) = graph.find_nodes(op="output")
    kept = {
        name: node for name, node in output.args[0].items() if not early_exit and (outputs is None or name in outputs)
    }
    tapped = {key: by_name[name] for key, name in nodes.items()}
    for key, node in tapped.items():
        if written_later(node):
            with graph.inserting_after(node):
                tapped[key] = graph.call_function(torch.ops.aten.clone.default, (node,))
    output.args = ((kept, tapped),)
    if early_exit:
        drop_unused(graph)
    return fx.GraphModule(graph_module, graph)
