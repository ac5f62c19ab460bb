"""Reading activations off a graph: taps instead of hooks, norms instead of tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, fx

OUTLIER_FACTOR = 5.0  # a patch is an outlier above this many times the median patch norm of its image


def tap(graph_module: fx.GraphModule, nodes: Mapping[str, str]) -> fx.GraphModule:
    """A graph module that returns `(outputs, taps)`, where `taps[key]` is the value of the node `nodes[key]`.

    Parameters are shared; the original graph is not touched.
    """
    graph = copy.deepcopy(graph_module.graph)
    by_name = {node.name: node for node in graph.nodes}
    (output,) = graph.find_nodes(op="output")
    output.args = ((output.args[0], {key: by_name[name] for key, name in nodes.items()}),)
    return fx.GraphModule(graph_module, graph)


def token_norms(tokens_BTD: Tensor) -> Tensor:
    """L2 norms in float32, `[B, T]`."""
    return torch.linalg.vector_norm(tokens_BTD.float(), dim=-1)


def outliers(norms_BN: Tensor) -> Tensor:
    """Which patches are outliers: above `OUTLIER_FACTOR` times the median norm of their image, bool `[B, N]`."""
    return norms_BN > OUTLIER_FACTOR * norms_BN.median(dim=1, keepdim=True).values
