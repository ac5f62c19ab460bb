"""Sets of neurons, shifted onto one register on a few fixed images: do the outliers disappear? Nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from regsurgery.compiler.comparison import Means, Run
from regsurgery.compiler.located import Located
from regsurgery.compiler.outliers import robust_outliers, token_norms
from regsurgery.compiler.passes.pipeline import apply_passes
from regsurgery.compiler.passes.plan import plan_surgery
from regsurgery.compiler.taps import tap
from regsurgery.compiler.trace import tensor_inputs
from regsurgery.recipe import Recipe, by_blocks
from regsurgery.search.entering import Entering, shift_only
from regsurgery.search.scores import Scorer, Sums, column_norms

Neurons = Sequence[tuple[int, int]]  # (block, neuron)


@dataclass(frozen=True)
class Glance:
    """A trial up to the last but one block; means over the images.

    Attributes:
        outliers: outlier patches per image.
        excess: norm of the patches that were outliers in the original, in median patch norms of their image.
        register_norm: norm of the register token; 0 without one.
    """

    outliers: float
    excess: float
    register_norm: float


class Trials:
    """Tries sets of neurons, in any block up to the last but one, on `images`, a few batches `[B, 3, H, W]`.

    Attributes:
        original: the glance at the original model.
        outlier_norm: mean over the images of the mean norm of the original's outliers; 0 for an image without outliers.
    """

    def __init__(self, located: Located, images: Sequence[Tensor]) -> None:
        self.located, self.sites, self.traced = located, located.sites, located.traced
        traced, sites = located.traced, located.sites
        self.inputs = [tensor_inputs(located.loaded, batch) for batch in images]
        stream = {"stream": sites.blocks[sites.probe_block].output}
        # One patched graph for all sets: a shift in each block, whose list of neurons is replaced before a run.
        everywhere = Recipe({block: (0,) for block in range(sites.probe_block + 1)})
        self.patched, _ = apply_passes(traced, plan_surgery(sites, everywhere))
        self.entering = Entering(self.patched, sites, tap(self.patched, stream, early_exit=True), self.inputs)
        streams = self._run(tap(traced.graph_module, stream, early_exit=True))
        norms = [self._patch_norms(taps["stream"]) for _, taps in streams]
        self.outliers_BN = [robust_outliers(norms_BN) for norms_BN in norms]
        means = Means()
        for norms_BN, mask_BN in zip(norms, self.outliers_BN, strict=True):
            means.add("outlier", (norms_BN * mask_BN).sum(dim=1) / mask_BN.sum(dim=1).clamp(min=1))
        self.outlier_norm = means["outlier"]
        self.original = self._glance(streams)

    @torch.no_grad()
    def glance(self, neurons: Neurons) -> Glance:
        """Shift `neurons` onto one register; start at the first block that has some, stop after the last but one."""
        listed = by_blocks(neurons)
        streams, rest = self.entering.starts(listed)
        shift_only(rest, listed)
        starts = zip(self.inputs, streams, strict=True)
        return self._glance([rest(*inputs, stream_BTD.clone()) for inputs, stream_BTD in starts])

    def scores(self, neurons: Neurons, images: Sequence[Tensor]) -> tuple[Scorer, Sums]:
        """The sums over `images` of the model in which `neurons` are shifted."""
        scorer = Scorer(self.located, self.sites.probe_block, self.patched)
        shift_only(scorer.graph_module, by_blocks(neurons))
        sums = scorer.new_sums()
        for batch in images:
            scorer.add(sums, batch)
        return scorer, sums

    @torch.no_grad()
    def activations(self, block: int) -> tuple[Tensor, Tensor]:
        """The original's MLP activations at all patches P of the images, `[P, H]`, and `column_norms`, `[H]`."""
        site = self.sites.blocks[block]
        runs = self._run(tap(self.traced.graph_module, {"hidden": site.hidden}, early_exit=True))
        patches = [taps["hidden"][:, self.sites.patches].flatten(0, 1).float() for _, taps in runs]
        activation_PH = torch.cat(patches)
        return activation_PH, column_norms(self.traced, site).to(activation_PH)

    @torch.no_grad()
    def _run(self, graph_module: fx.GraphModule) -> list[Run]:
        return [graph_module(*inputs) for inputs in self.inputs]

    def _patch_norms(self, stream_BTD: Tensor) -> Tensor:
        return self._token_norms(stream_BTD)[0]

    def _token_norms(self, stream_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Norms of patches and of registers (there may be none)."""
        norms_BT = token_norms(stream_BTD)
        patches, registers = self.sites.patched(norms_BT.shape[1] - self.sites.num_tokens)
        return norms_BT[:, patches], norms_BT[:, registers]

    def _glance(self, runs: Sequence[Run]) -> Glance:
        means = Means()
        for (_, taps), mask_BN in zip(runs, self.outliers_BN, strict=True):
            norms_BN, register_norms_BR = self._token_norms(taps["stream"])
            means.add("outliers", robust_outliers(norms_BN).sum(dim=1))
            means.add("excess", (norms_BN / norms_BN.median(dim=1, keepdim=True).values)[mask_BN])
            means.add("register", register_norms_BR)
        return Glance(means["outliers"], means.get("excess") or 0.0, means.get("register") or 0.0)
