"""Sets of neurons, tried on a few fixed images without writing anything: do the outliers go, and what does it cost?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from regsurgery.comparison import Means, Run, compare, main_output, probe_nodes
from regsurgery.loading import Loaded
from regsurgery.passes import apply_passes
from regsurgery.passes.plan import plan_surgery
from regsurgery.recipe import Recipe
from regsurgery.scores import Scorer, Sums, column_norms
from regsurgery.sites import Sites
from regsurgery.statistics import robust_outliers, tap, token_norms
from regsurgery.trace import Traced, tensor_inputs

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


@dataclass(frozen=True)
class Trial:
    """A trial of the whole model; norms after the last but one block, means over the images.

    Attributes:
        max_over_median: each image's largest patch norm over its median.
        cosine_patches: original to patched, of the patches that were no outliers, after the last block.
        cosine_output, kl: drift of the model's main output; `kl` in nats, None without logits.
    """

    outliers_per_image: float
    max_over_median: float
    register_norm: float | None
    cosine_patches: float
    cosine_output: float
    kl: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Trials:
    """Tries sets of neurons, in any block up to the last but one, on `images`, a few batches `[B, 3, H, W]`.

    Attributes:
        original: the glance at the original model.
        outlier_norm: mean over the images of the mean norm of the original's outliers, 0 for an image without.
    """

    def __init__(self, loaded: Loaded, traced: Traced, sites: Sites, images: Sequence[Tensor]) -> None:
        self.loaded, self.sites, self.traced = loaded, sites, traced
        self.inputs = [tensor_inputs(loaded, batch) for batch in images]
        self.main = main_output(traced.output_names)
        stream = {"stream": sites.blocks[sites.probe_block].output}
        # One patched graph for every set: a shift in each block, whose list of neurons is exchanged before a run.
        everywhere = Recipe({block: (0,) for block in range(sites.probe_block + 1)})
        self.patched, _ = apply_passes(traced, plan_surgery(sites, everywhere))
        self.glancing = tap(self.patched, stream, early_exit=True)
        self.whole = tap(self.patched, probe_nodes(sites))
        streams = self._run(tap(traced.graph_module, stream, early_exit=True))
        norms = [self._patch_norms(taps["stream"]) for _, taps in streams]
        self.outliers_BN = [robust_outliers(norms_BN) for norms_BN in norms]
        means = Means()
        for norms_BN, mask_BN in zip(norms, self.outliers_BN, strict=True):
            means.add("outlier", (norms_BN * mask_BN).sum(dim=1) / mask_BN.sum(dim=1).clamp(min=1))
        self.outlier_norm = means["outlier"]
        self.original = self._glance(streams)

    @cached_property
    def originals(self) -> list[Run]:
        """Outputs and taps of the whole original model."""
        return self._run(tap(self.traced.graph_module, probe_nodes(self.sites)))

    def glance(self, neurons: Neurons) -> Glance:
        """Shift `neurons` onto one register; stop after the last but one block."""
        self._shift(self.glancing, neurons)
        return self._glance(self._run(self.glancing))

    def whole_model(self, neurons: Neurons) -> Trial:
        """Shift `neurons` onto one register, through the whole model."""
        self._shift(self.whole, neurons)
        return self._compare(self._run(self.whole))

    def zeroed(self, neurons: Neurons) -> Trial:
        """The control: `neurons` cleared on all tokens, with no register to take their place."""
        by_block = by_blocks(neurons)
        no_register = Recipe(by_block, num_registers=0, scale=(), fill="zero", prefix="fill")
        patched, _ = apply_passes(self.traced, plan_surgery(self.sites, no_register))
        return self._compare(self._run(tap(patched, probe_nodes(self.sites))))

    def scores(self, neurons: Neurons, images: Sequence[Tensor]) -> tuple[Scorer, Sums]:
        """The sums over `images` of the model in which `neurons` are shifted."""
        scorer = Scorer(self.loaded, self.traced, self.sites, self.sites.probe_block, self.patched)
        self._shift(scorer.graph_module, neurons)
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

    def _shift(self, patched: fx.GraphModule, neurons: Neurons) -> None:
        listed = by_blocks(neurons)
        for block in range(self.sites.probe_block + 1):
            name = f"register_neurons_{block}"
            device = getattr(patched, name).device
            setattr(patched, name, torch.tensor(listed.get(block, ()), dtype=torch.int64, device=device))

    @torch.no_grad()
    def _run(self, graph_module: fx.GraphModule) -> list[Run]:
        return [graph_module(*inputs) for inputs in self.inputs]

    def _patch_norms(self, stream_BTD: Tensor) -> Tensor:
        return self._token_norms(stream_BTD)[0]

    def _token_norms(self, stream_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Norms of patches and of registers, of which there may be none."""
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

    def _compare(self, runs: Sequence[Run]) -> Trial:
        means = Means()
        for original, patched in zip(self.originals, runs, strict=True):
            compare(means, self.sites, self.main, original, patched, robust_outliers)
        return Trial(
            outliers_per_image=means["patched outliers"],
            max_over_median=means["patched ratio"],
            register_norm=means.get("register"),
            cosine_patches=means["cosine patches"],
            cosine_output=means["cosine output"],
            kl=means.get("kl"),
        )


def by_blocks(neurons: Neurons) -> dict[int, tuple[int, ...]]:
    """Block -> ascending neurons, blocks ascending, as a recipe has them."""
    found: dict[int, list[int]] = {}
    for block, neuron in sorted(neurons):
        found.setdefault(block, []).append(neuron)
    return {block: tuple(listed) for block, listed in found.items()}
