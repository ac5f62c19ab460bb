"""Settings of the cure, tried without writing anything: are the outliers gone, and how far do the outputs drift?

A trial starts at the first block that its setting changes, see `entering.py`. What enters that block depends only on
the number of registers.

Shape suffixes: B images of a batch, I images, T tokens, D width, N patches.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from regsurgery.compiler.comparison import main_output, moved, patch_cosines, probe_nodes
from regsurgery.compiler.located import Located
from regsurgery.compiler.outliers import robust_outliers, token_norms
from regsurgery.compiler.passes.pipeline import apply_passes
from regsurgery.compiler.passes.plan import plan_surgery
from regsurgery.compiler.taps import tap
from regsurgery.compiler.trace import tensor_inputs
from regsurgery.recipe import REFERENCE, Recipe, by_blocks
from regsurgery.runtime.surgery import neuron_shift
from regsurgery.search.entering import SPACE, Entering, block_of, shift_only

Neurons = tuple[tuple[int, int], ...]  # (block, neuron), ascending
KEPT = 2  # what trials with this many numbers of registers begin with stays in memory, and of more within `SPACE`
Graphs = dict[int, fx.GraphModule]  # number of registers -> the model with them, and a shift in every block
FIGURES = ("drift", "outliers", "register_norm", "cosine_output", "cosine_patches", "kl", "same_argmax")


@dataclass(frozen=True)
class Setting:
    """What `find` chooses: register neurons, how many registers, and what the patches keep; `compat` as in a recipe."""

    neurons: Neurons
    num_registers: int = 1
    fill: str = "zero"
    compat: str = "none"

    def recipe(self) -> Recipe:
        """The recipe of this setting, in mode shift."""
        return Recipe(
            by_blocks(self.neurons),
            num_registers=self.num_registers,
            scale=(1.0,) * self.num_registers,
            fill=self.fill,
            compat=self.compat,
        )

    def key(self) -> str:
        """The setting as text, to remember trials by."""
        neurons = " ".join(f"{block}:{neuron}" for block, neuron in self.neurons)
        compat = "" if self.compat == "none" else f"{self.compat} "
        return f"{self.num_registers} {self.fill} {compat}{neurons}"


@dataclass(frozen=True, eq=False)
class Tried:
    """What a setting does, one number per image, `[I]`, float64 on the CPU.

    Attributes:
        drift: KL divergence from the original's classes in nats if the model has logits; otherwise (1 - cosine) of the
            main output plus that of the patches that were not outliers.
        outliers: outlier patches after the last but one block.
        register_norm: mean norm of the register tokens there.
        cosine_output, cosine_patches: original to patched; for the patches after the last block, without the original's
            outliers.
        kl, same_argmax: None for models without logits.
    """

    drift: Tensor
    outliers: Tensor
    register_norm: Tensor
    cosine_output: Tensor
    cosine_patches: Tensor
    kl: Tensor | None = None
    same_argmax: Tensor | None = None

    def means(self) -> dict[str, float | None]:
        """The mean over the images of every figure, by name."""
        values = {name: getattr(self, name) for name in FIGURES}
        return {name: None if value is None else float(value.mean()) for name, value in values.items()}

    def worse_than(self, other: Tried) -> tuple[float, float]:
        """How much more this one drifts, as a mean over the same images, and the standard error of that mean."""
        difference_I = self.drift - other.drift
        return float(difference_I.mean()), float(difference_I.std() / len(difference_I) ** 0.5)

    def as_lists(self) -> dict[str, list[float]]:
        """Plain data, from which `from_lists` makes the same."""
        values = {name: getattr(self, name) for name in FIGURES}
        return {name: value.tolist() for name, value in values.items() if value is not None}

    @classmethod
    def from_lists(cls, lists: dict[str, list[float]]) -> Tried:
        """What `as_lists` was made of."""
        return cls(**{name: torch.tensor(values, dtype=torch.float64) for name, values in lists.items()})


class DriftTrials:
    """Tries settings on `images`, batches `[B, 3, H, W]`.

    Args:
        memo: remembers trials by text; plain data, so it can be kept in a file.
        graphs: keeps the graphs, shared with other trials of `traced`.
        done: called after every trial that is run.

    Attributes:
        num_images: I.
    """

    def __init__(
        self,
        located: Located,
        images: Sequence[Tensor],
        *,
        memo: MutableMapping[str, Any] | None = None,
        graphs: Graphs | None = None,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        traced, sites = located.traced, located.sites
        self.traced, self.sites, self.done = traced, sites, done
        self.inputs = [tensor_inputs(located.loaded, batch) for batch in images]
        self.num_images = sum(map(len, images))
        self.main = main_output(traced.output_names)
        self.memo: MutableMapping[str, Any] = {} if memo is None else memo
        self.graphs: Graphs = {} if graphs is None else graphs
        self._enterings: OrderedDict[int, Entering] = OrderedDict()

    def __call__(self, setting: Setting) -> Tried:
        """Try `setting`, or remember what it did."""
        key = setting.key()
        if key not in self.memo:
            self.memo[key] = self._run(setting).as_lists()
            self.done()
        return Tried.from_lists(self.memo[key])

    @cached_property
    def originals(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For every batch: the original's main output, its patches after the last block, and which were outliers."""
        whole = tap(self.traced.graph_module, probe_nodes(self.sites), outputs=(self.main,))
        kept = []
        for inputs in self.inputs:
            with torch.no_grad():
                outputs, taps = whole(*inputs)
            patches = self.sites.patches
            norms_BN = token_norms(taps["probe"])[:, patches]
            kept.append((outputs[self.main], taps["last"][:, patches].clone(), robust_outliers(norms_BN)))
        return kept

    @property
    def original_outliers(self) -> float:
        """Outlier patches per image of the original."""
        return sum(float(outlier_BN.sum()) for _, _, outlier_BN in self.originals) / self.num_images

    @torch.no_grad()
    def _run(self, setting: Setting) -> Tried:
        neurons = by_blocks(setting.neurons)
        streams, graph_module = self._entering(setting.num_registers).starts(neurons)
        shared = set(neurons) if setting.compat == REFERENCE else set()  # of no neurons there is no extreme
        graph_module = _shifting(graph_module, setting.fill, shared)
        shift_only(graph_module, neurons)
        figures: dict[str, list[Tensor]] = {}
        for stream_BTD, inputs, original in zip(streams, self.inputs, self.originals, strict=True):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "std", UserWarning)  # from the fill `outliers` over no neurons
                outputs, taps = graph_module(*inputs, stream_BTD.clone())  # a graph may write into its inputs
            for name, values_B in self._figures(original, outputs[self.main], taps).items():
                figures.setdefault(name, []).append(values_B.double().cpu())
        return Tried(**{name: torch.cat(values) for name, values in figures.items()})

    def _figures(
        self, original: tuple[Tensor, Tensor, Tensor], output: Tensor, taps: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        was, last_BND, outlier_BN = original
        patches, registers = self.sites.patched(taps["probe"].shape[1] - self.sites.num_tokens)
        norms_BT = token_norms(taps["probe"])
        cosine_BN = patch_cosines(last_BND, taps["last"][:, patches])
        drift = moved(self.main, was, output, cosine_BN, ~outlier_BN)
        figures = {
            "outliers": robust_outliers(norms_BT[:, patches]).sum(dim=1),
            "register_norm": norms_BT[:, registers].mean(dim=1),
            "cosine_output": drift.cosine_output,
            "cosine_patches": drift.mean_cosine_patches,
            "drift": drift.value,
        }
        if drift.kl is not None and drift.same is not None:
            figures |= {"kl": drift.kl, "same_argmax": drift.same}
        return figures

    def _entering(self, num_registers: int) -> Entering:
        """Where the trials with `num_registers` registers begin."""
        if num_registers not in self._enterings:
            patched = self._with_registers(num_registers)
            tapped = tap(patched, probe_nodes(self.sites), outputs=(self.main,))
            while len(self._enterings) >= KEPT and sum(one.num_bytes for one in self._enterings.values()) > SPACE // 2:
                self._enterings.popitem(last=False)
            self._enterings[num_registers] = Entering(patched, self.sites, tapped, self.inputs)
        self._enterings.move_to_end(num_registers)
        return self._enterings[num_registers]

    def _with_registers(self, num_registers: int) -> fx.GraphModule:
        if num_registers not in self.graphs:
            everywhere = {block: (0,) for block in range(self.sites.probe_block + 1)}
            recipe = replace(Setting((), num_registers).recipe(), register_neurons=everywhere)
            self.graphs[num_registers], _ = apply_passes(self.traced, plan_surgery(self.sites, recipe))
        return self.graphs[num_registers]


def _shifting(graph_module: fx.GraphModule, fill: str, shared: Collection[int]) -> fx.GraphModule:
    """`graph_module`, or a copy whose shifts fill patches differently, and in the blocks `shared` share an extreme."""
    shifts = graph_module.graph.find_nodes(op="call_function", target=neuron_shift)
    how = [{"fill": fill, "one_peak": block_of(str(shift.args[1])) in shared} for shift in shifts]
    if all(shift.kwargs | own == shift.kwargs for shift, own in zip(shifts, how, strict=True)):
        return graph_module
    other = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    copied = other.graph.find_nodes(op="call_function", target=neuron_shift)
    for shift, own in zip(copied, how, strict=True):
        shift.kwargs = {**shift.kwargs, **own}
    other.recompile()
    return other
