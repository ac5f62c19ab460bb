"""Reading activations off a graph: taps instead of hooks, norms instead of tensors."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx

from regsurgery.graph import drop_unused

OUTLIER_FACTOR = 5.0  # a patch is an outlier above this many times the median patch norm of its image
ROBUST_DEVIATIONS = 10.0
MIN_RATIO = 3.0
POSITIONAL_SHARE = 0.8  # of all outliers at the few places where they sit most often


def tap(
    graph_module: fx.GraphModule,
    nodes: Mapping[str, str],
    *,
    early_exit: bool = False,
    outputs: Collection[str] | None = None,
) -> fx.GraphModule:
    """A graph module that returns `(outputs, taps)`, where `taps[key]` is the value of the node `nodes[key]`.

    With `outputs` there are only those; with `early_exit` none, and nothing is computed that no tap needs. Parameters
    are shared; the original graph is not touched.
    """
    graph = copy.deepcopy(graph_module.graph)
    by_name = {node.name: node for node in graph.nodes}
    (output,) = graph.find_nodes(op="output")
    kept = {
        name: node for name, node in output.args[0].items() if not early_exit and (outputs is None or name in outputs)
    }
    output.args = ((kept, {key: by_name[name] for key, name in nodes.items()}),)
    if early_exit:
        drop_unused(graph)
    return fx.GraphModule(graph_module, graph)


def token_norms(tokens_BTD: Tensor) -> Tensor:
    """L2 norms in float32, `[B, T]`."""
    return torch.linalg.vector_norm(tokens_BTD.float(), dim=-1)


def outliers(norms_BN: Tensor) -> Tensor:
    """Which patches are outliers: above `OUTLIER_FACTOR` times the median norm of their image, bool `[B, N]`."""
    return norms_BN > OUTLIER_FACTOR * norms_BN.median(dim=1, keepdim=True).values


def robust_threshold(norms_BN: Tensor) -> Tensor:
    """The norm above which a patch is an outlier by `robust_outliers`, `[B, 1]`."""
    median_B1 = norms_BN.median(dim=1, keepdim=True).values
    deviation_B1 = 1.4826 * (norms_BN - median_B1).abs().median(dim=1, keepdim=True).values
    return torch.maximum(median_B1 + ROBUST_DEVIATIONS * deviation_B1, MIN_RATIO * median_B1)


def robust_outliers(norms_BN: Tensor) -> Tensor:
    """Which patches are outliers where no factor is given, bool `[B, N]`.

    Their norm exceeds both median + 10 robust standard deviations and 3 times the median of their image and block. The
    first bound adapts to how narrow the bulk is (1.4826 x the median absolute deviation); the second keeps a skewed but
    one-peaked distribution from being called bimodal.
    """
    return norms_BN > robust_threshold(norms_BN)


def share_at_common_places(hits_N: Tensor, usual: float) -> float:
    """Share of all outliers that sit at the k most frequent places, where an image has k of them on average.

    Args:
        hits_N: of how many images each patch is an outlier, `[N]`; not all zero.
    """
    return float(hits_N.topk(max(1, round(usual))).values.sum() / hits_N.sum())
