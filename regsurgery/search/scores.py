"""Streaming sums of every MLP neuron's activation, at outlier patches and elsewhere, and the scores made from them.

One forward per batch, which stops after the last block that can be a cause. Each activation is reduced to one sum per
neuron as soon as it is computed. Which patches are outliers is known only at the end, so the inputs of the MLPs (a
quarter of an activation's size) are kept until then, and the activation is computed again at those few patches. Memory
does not depend on the number of images.

Shape suffixes: B batch, T tokens, N patches, M the outlier patches of a batch, H hidden units, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from regsurgery.compiler.graph import between, drop_unused, find_node, symbolic_shape
from regsurgery.compiler.located import Located
from regsurgery.compiler.match import ADDS, NORMS
from regsurgery.compiler.outliers import MIN_RATIO, robust_threshold, token_norms
from regsurgery.compiler.sites import Block
from regsurgery.compiler.trace import Traced, tensor_inputs
from regsurgery.options import PRECISIONS


class Sums:
    """Sums over images; additive, on the CPU, in float64.

    Attributes:
        everywhere_H, outliers_H: for every block, the sum of |activation| over all patches, and over outlier patches.
        alone_H: for every block, to how many outlier patches each neuron writes enough to make any patch an outlier.
        counts: the number of images, patches and outlier patches, and the sum of the images' outlier thresholds.
    """

    def __init__(self, hidden_sizes: Iterable[int]) -> None:
        self.everywhere_H = [torch.zeros(size, dtype=torch.float64) for size in hidden_sizes]
        self.outliers_H = [torch.zeros_like(sums) for sums in self.everywhere_H]
        self.alone_H = [torch.zeros_like(sums) for sums in self.everywhere_H]
        self.counts = torch.zeros(4, dtype=torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        """Every sum by name; the tensors themselves, so they can be written into."""
        named = {f"everywhere.{block}": sums for block, sums in enumerate(self.everywhere_H)}
        named |= {f"outliers.{block}": sums for block, sums in enumerate(self.outliers_H)}
        named |= {f"alone.{block}": sums for block, sums in enumerate(self.alone_H)}
        return {"counts": self.counts, **named}

    @property
    def num_images(self) -> int:
        return int(self.counts[0])

    @property
    def num_outliers(self) -> int:
        return int(self.counts[2])

    @property
    def threshold(self) -> float:
        """Mean over the images of the norm above which a patch is an outlier."""
        return float(self.counts[3] / self.counts[0])

    def mean_at_outliers(self, block: int) -> Tensor:
        """Mean |activation| at outlier patches, `[H]`: the score of the paper's Algorithm 1."""
        return self.outliers_H[block] / self.counts[2]

    def mean_elsewhere(self, block: int) -> Tensor:
        """Mean |activation| at all other patches, `[H]`."""
        return (self.everywhere_H[block] - self.outliers_H[block]) / (self.counts[1] - self.counts[2])


@dataclass(frozen=True)
class Candidate:
    """One neuron and its scores.

    Attributes:
        activation: mean |activation| at outlier patches (Algorithm 1).
        contribution: (mean |activation| at outlier patches - elsewhere) x L2 norm of what the neuron writes to the
            stream at activation 1, the layer scale included.
        alone: how many of the outlier patches this neuron would have made by itself, writing 3 median patch norms or
            more there.
    """

    block: int
    neuron: int
    activation: float
    contribution: float
    alone: int


def candidates(sums: Sums, columns_H: list[Tensor], count: int) -> list[Candidate]:
    """The `count` neurons with the largest positive contribution, best first."""
    scored = []
    for block, norms_H in enumerate(columns_H):
        activation_H = sums.mean_at_outliers(block)
        contribution_H = (activation_H - sums.mean_elsewhere(block)) * norms_H
        best = contribution_H.topk(min(count, len(contribution_H)))
        scored += [
            Candidate(block, neuron, float(activation_H[neuron]), value, int(sums.alone_H[block][neuron]))
            for value, neuron in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            if value > 0
        ]
    return sorted(scored, key=lambda c: (-c.contribution, c.block, c.neuron))[:count]


def column_norms(traced: Traced, block: Block) -> Tensor:
    """L2 norm of what each neuron of `block` adds to the stream at activation 1, `[H]`, float64 on the CPU."""
    down = find_node(traced.graph_module, block.down)
    weight = down.args[1]
    assert isinstance(weight, fx.Node)
    column_DH = _constant(traced.graph_module, weight).double()
    node = down
    while len(node.users) == 1 and (node := next(iter(node.users))).target not in ADDS | NORMS:
        for factor in node.all_input_nodes:  # layer scale
            if factor.op == "get_attr" and node.target in (torch.ops.aten.mul.Tensor, torch.ops.aten.mul_.Tensor):
                column_DH = column_DH * _constant(traced.graph_module, factor).double().reshape(-1, 1)
    return column_DH.norm(dim=0).cpu()


def _constant(module: nn.Module, node: fx.Node) -> Tensor:
    path, _, name = str(node.target).rpartition(".")
    return getattr(module.get_submodule(path), name).detach()


class Scorer:
    """A model up to block `last_block`, with sums instead of outputs: the original, or `patched`, made from its graph.

    The activations of a patched model are those before the shift. With `precision` `bf16` they are computed under
    autocast; summands and norms are still float32, and the sums float64.
    """

    def __init__(
        self,
        located: Located,
        last_block: int,
        patched: fx.GraphModule | None = None,
        *,
        precision: str = PRECISIONS[0],
    ) -> None:
        loaded, traced, sites = located.loaded, located.traced, located.sites
        self.loaded, self.precision = loaded, precision
        self.device = next(loaded.model.parameters()).device
        graph_module = patched or traced.graph_module
        self.blocks = sites.blocks[: last_block + 1]
        self.cones = [_cone(traced.graph_module, block) for block in self.blocks]
        self.columns_H = [column_norms(traced, block) for block in self.blocks]
        graph = copy.deepcopy(graph_module.graph)
        by_name = {node.name: node for node in graph.nodes}
        (output,) = graph.find_nodes(op="output")
        num_tokens = symbolic_shape(by_name[self.blocks[0].hidden])[1]
        self.patches, _ = sites.patched(int(num_tokens) - sites.num_tokens)
        sums, sources, medians = [], [], []
        for block, (source, _) in zip(self.blocks, self.cones, strict=True):
            for node, reduced, reduction in (
                (by_name[block.hidden], sums, patch_sums),
                (by_name[block.output], medians, median_norms),
            ):
                with graph.inserting_after(node):
                    reduced.append(graph.call_function(reduction, (node, self.patches.start, self.patches.stop)))
            sources.append(by_name[source])
        output.args = ((sums, sources, medians, by_name[self.blocks[-1].output]),)
        drop_unused(graph)
        self.graph_module = fx.GraphModule(graph_module, graph)

    def new_sums(self) -> Sums:
        return Sums(block.hidden_size for block in self.blocks)

    @torch.no_grad()
    def add(self, sums: Sums, images: Tensor) -> None:
        """Add one batch of images `[B, 3, H, W]`."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            everywhere_H, sources_BTD, medians_B, stream_BTD = self.graph_module(*tensor_inputs(self.loaded, images))
            norms_BN = token_norms(stream_BTD)[:, self.patches]
            threshold_B1 = robust_threshold(norms_BN)
            image_M, patch_M = (norms_BN > threshold_B1).nonzero(as_tuple=True)
            totals, added = [], []  # moved to the CPU together: on a GPU every transfer waits for all earlier work
            for index, (_, cone) in enumerate(self.cones):
                source_MD = sources_BTD[index][:, self.patches][image_M, patch_M]
                activation_MH = cone(source_MD[None])[0].float().abs()
                limit_M1 = MIN_RATIO * medians_B[index][image_M, None]
                written_MH = activation_MH * self.columns_H[index].to(activation_MH)
                totals += [sums.everywhere_H[index], sums.outliers_H[index], sums.alone_H[index]]
                added += [everywhere_H[index], activation_MH.double().sum(dim=0), (written_MH >= limit_M1).sum(dim=0)]
        on_cpu = torch.cat([values_H.double() for values_H in added]).cpu()
        for total_H, values_H in zip(totals, on_cpu.split([len(total_H) for total_H in totals]), strict=True):
            total_H += values_H
        counts = (len(images), norms_BN.numel(), len(image_M), float(threshold_B1.double().sum()))
        sums.counts += torch.tensor(counts, dtype=torch.float64)


def patch_sums(hidden_BTH: Tensor, start: int, stop: int) -> Tensor:
    """Sum of |activation| over the patches `[start, stop)`, `[H]`, float32."""
    return torch.linalg.vector_norm(hidden_BTH[:, start:stop], ord=1, dim=(0, 1), dtype=torch.float32)


def median_norms(stream_BTD: Tensor, start: int, stop: int) -> Tensor:
    """Median patch norm of each image, `[B]`, float32."""
    return token_norms(stream_BTD)[:, start:stop].median(dim=1).values


def _cone(graph_module: fx.GraphModule, block: Block) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The MLP's input node, and the activation as a function of it."""
    source, *others = [find_node(graph_module, up).args[0] for up in block.ups]
    assert isinstance(source, fx.Node)
    hidden = find_node(graph_module, block.hidden)
    if any(other is not source for other in others):  # projections of different tensors: keep the activation itself
        return block.hidden, lambda hidden: hidden
    return source.name, between(graph_module, source, hidden)
