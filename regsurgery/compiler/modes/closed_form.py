"""Native mode: edited weights that do what the shift does, in a stock model that has register tokens.

The input row of every register neuron becomes a detector: a linear discriminant between the register tokens and all
other tokens at the MLP's input. It fires only on the register tokens, with the constant that the shift would have given
them, in full on every register; the output column stays. The register tokens are a marker along the discriminant. Its
norm is a trade-off: a small marker is hard to tell apart, a large one disturbs the blocks before the edit, and with
several registers does so several times. So the norm is chosen by the drift of the outputs. Blocks are edited in order,
each one seeing the edits of earlier ones.

Shape suffixes: B batch, T tokens, R registers, D width, H hidden units, K register neurons of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from regsurgery.checkpoints.stored import NotInMemory
from regsurgery.checkpoints.turns import in_turns
from regsurgery.compiler.graph import between, find_node, starting_at, with_parameters
from regsurgery.compiler.located import Located
from regsurgery.compiler.mlp import Mlp, mlp_of
from regsurgery.compiler.ops import NORMS
from regsurgery.compiler.outliers import token_norms
from regsurgery.compiler.passes.pipeline import apply_passes
from regsurgery.compiler.passes.plan import plan_surgery
from regsurgery.compiler.sites import Block
from regsurgery.compiler.taps import tap
from regsurgery.compiler.together import num_at_once, run_together
from regsurgery.compiler.trace import Traced, tensor_inputs
from regsurgery.errors import UnsupportedModelError
from regsurgery.recipe import Recipe

SHRINKAGE = 0.05  # of the pooled covariance towards a multiple of the identity
# Norms of the register tokens to try, in mean token norms. ViT-Ti, two neurons, 88 photos, KL at 0, 1, 2, 4, 8:
# one register 0.046, 0.044, 0.027, 0.030, 0.035; three 0.039, 0.033, 0.007, 0.013, 0.081.
MARKER_NORMS = (0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
# On the images of the fit and on those held out from it. ViT-Ti, closed form, KL on 175 other photos, at 0.4 and 0.5:
# fitted on 27 photos, timm 0.023, 0.006, open_clip 0.051, 0.015; on 146, timm 0.009, 0.011.
ENOUGH_MARGIN = 0.5
MIN_MARGIN = 0.05
CHUNK = 1 << 14  # tokens converted to float64 at a time
FLAT = 8.0  # a detector is at least this far below zero, where activations are flat, on every other token


@dataclass(frozen=True)
class Native:
    """What native mode changes in a model that has registers.

    Attributes:
        parameters: name in the graph -> its complete new value, including the register tokens `[1, R, D]`.
        margin: the smallest over the blocks of (lowest register - highest other token) / (mean register - mean other
            token), for the detectors' values on the images that they were made from and on the held-out ones.
        marker_norm: norm of a register token.
        activations: block -> its register neurons' activations on a register token, `[K]`.
    """

    parameters: dict[str, Tensor]
    margin: float
    marker_norm: float
    activations: dict[int, Tensor]


# Changed parameters, and the batches to run them on: images `[B, 3, H, W]`, and further inputs that the graph has.
Job = tuple[Mapping[str, Tensor], Sequence[Sequence[Tensor]]]


class Changed(NamedTuple):
    """Changed parameters, and what enters the last edited block for each batch of some images; see `_edited`."""

    parameters: Mapping[str, Tensor]
    entering: Sequence[tuple[Tensor, ...]]


class MlpInput(NamedTuple):
    """What an MLP reads for a batch: registers and all other tokens, `[N, D]` each; and what enters its block, if there
    are blocks before it.
    """

    registers_ND: Tensor
    others_ND: Tensor
    entering: tuple[Tensor, ...]


class NativeModel:
    """The model of `traced` with register tokens and no shift, as every host of native mode computes it.

    In a host the registers may be elsewhere: attention in hosts does not depend on the order of tokens.
    """

    def __init__(self, located: Located, recipe: Recipe) -> None:
        self.loaded, self.traced, self.sites, self.recipe = located.loaded, located.traced, located.sites, recipe
        traced, sites = located.traced, located.sites
        self.hidden_of = {block: _activation_of(traced, sites.blocks[block]) for block in recipe.register_neurons}
        self.mlps = {block: _editable(traced, sites.blocks[block], cone) for block, cone in self.hidden_of.items()}
        registers_only = Recipe({}, num_registers=recipe.num_registers, scale=recipe.scale)
        plan = plan_surgery(sites, registers_only)
        self.graph_module, _ = apply_passes(traced, plan)
        self.register_name = plan.register_name

    @cached_property
    def stretches(self) -> dict[int, fx.GraphModule]:
        """Edited block -> the graph from the previous edited block, or from the images, to the input of its MLP."""
        blocks = sorted(self.mlps)
        return {block: self._stretch(block, start) for block, start in zip(blocks, (0, *blocks), strict=False)}

    def _stretch(self, block: int, start: int) -> fx.GraphModule:
        """From what enters block `start`, or from the images if that is 0, to the input of the MLP of `block`."""
        blocks = self.sites.blocks
        nodes = {"mlp": self.mlps[block].source} | ({"entering": blocks[block - 1].output} if block else {})
        tapped = tap(self.graph_module, nodes, early_exit=True)
        return starting_at(tapped, blocks[start - 1].output) if start else tapped

    def parameter(self, parameters: Mapping[str, Tensor], name: str) -> Tensor:
        """The value of a parameter under the changes `parameters`."""
        return parameters.get(name, self.graph_module.get_parameter(name)).detach()

    def mlp_weights(self, block: int) -> dict[str, Tensor]:
        """The parameters of the MLP of `block` that an edit changes, in memory; not to be written to."""
        mlp = self.mlps[block]
        projections = [projection for projection in (mlp.gate, mlp.value) if projection is not None]
        names = {name for p in projections for name in (p.weight, p.bias) if name is not None} | {mlp.down}
        values = {name: self.parameter({}, name) for name in names}
        return {name: value.read() if isinstance(value, NotInMemory) else value for name, value in values.items()}

    def side_by_side(self, calls: Sequence[Callable[[], Any]], num_images: int) -> list[Any]:
        """What each of `calls` returns, all about the same images; they read weights on disk together, where the free
        memory has room for the images in each of them.
        """
        room = num_at_once(self.sites, self.recipe.num_registers) if self.loaded.stored else 0
        return in_turns(calls) if len(calls) * num_images <= room else [call() for call in calls]

    def run(
        self, tapped: fx.GraphModule, parameters: Mapping[str, Tensor], images: Tensor, *more: Tensor
    ) -> tuple[dict, dict]:
        """Run `tapped`, a tap of `graph_module`, with the changed `parameters` on images `[B, 3, H, W]`.

        Args:
            more: inputs of `tapped` in addition to the model's.
        """
        return with_parameters(tapped, parameters)(*tensor_inputs(self.loaded, images), *more)

    def run_all(self, tapped: fx.GraphModule, jobs: Sequence[Job]) -> list[list[tuple[dict, dict]]]:
        """Run `tapped` for each of `jobs` on each of its batches."""
        inputs = [[(*tensor_inputs(self.loaded, images), *more) for images, *more in batches] for _, batches in jobs]
        changes = [parameters for parameters, _ in jobs]
        if not self.loaded.stored:
            changed = (with_parameters(tapped, parameters) for parameters in changes)
            return [[module(*one) for one in own] for module, own in zip(changed, inputs, strict=True)]
        calls = [(parameters, one) for parameters, own in zip(changes, inputs, strict=True) for one in own]
        given = iter(run_together(tapped, calls))
        return [[next(given) for _ in own] for own in inputs]

    def mlp_inputs(self, block: int, jobs: Sequence[Job]) -> list[list[MlpInput]]:
        """Inputs of the MLP of `block`, for every one of `jobs` and each of its batches.

        Args:
            jobs: batches hold images, and what enters the previous edited block, if there are blocks before that.
        """
        return [
            [self._divided(taps["mlp"].float(), taps.get("entering")) for _, taps in runs]
            for runs in self.run_all(self.stretches[block], jobs)
        ]

    def _divided(self, tokens_BTD: Tensor, entering: Tensor | None) -> MlpInput:
        _, registers = self.sites.patched(self.recipe.num_registers)
        is_register_T = torch.zeros(tokens_BTD.shape[1], dtype=torch.bool)
        is_register_T[registers] = True
        return MlpInput(
            tokens_BTD[:, is_register_T].flatten(0, 1),
            tokens_BTD[:, ~is_register_T].flatten(0, 1),
            () if entering is None else (entering,),
        )


def _activation_of(traced: Traced, block: Block) -> fx.GraphModule:
    """The hidden units `[B, T, H]` of `block` as a function of its MLP's input."""
    graph_module = traced.graph_module
    source = find_node(graph_module, mlp_of(traced, block).source)
    return between(graph_module, source, find_node(graph_module, block.hidden))


def _editable(traced: Traced, block: Block, hidden_of: fx.GraphModule) -> Mlp:
    """The MLP of `block`, if a constant input can give each of its hidden units any value."""
    mlp = mlp_of(traced, block)
    if any(node.target in NORMS for node in hidden_of.graph.nodes):
        raise UnsupportedModelError(
            f"block {block.index}: its MLP normalises the activation, so native mode cannot edit it; use mode shift"
        )
    for projection in (mlp.gate, mlp.value):
        if projection is not None and projection.bias is None:
            raise UnsupportedModelError(
                f"block {block.index}: its MLP has no bias ({projection.weight}), which native mode needs; "
                "use mode shift"
            )
    return mlp


class FirstLook(NamedTuple):
    """What the edit needs to know of the model before it is edited.

    Attributes:
        constants: block -> what the shift writes to a register, averaged over images and registers, `[K]`.
        direction_D: from all other tokens to register tokens of zeros, at the MLP of the first edited block.
        unit: the mean norm of the tokens that enter block 0.
    """

    constants: dict[int, Tensor]
    direction_D: Tensor
    unit: float

    @classmethod
    def calls(cls, model: NativeModel, batches: Sequence[Tensor]) -> list[Callable[[], Any]]:
        """One for each attribute, in this order; they read the same weights, see `NativeModel.side_by_side`."""
        return [partial(each, model, batches) for each in (register_constants, _first_direction, _mean_token_norm)]


@torch.no_grad()
def closed_form(
    model: NativeModel,
    batches: Sequence[Tensor],
    held_out: Sequence[Tensor],
    look: FirstLook,
    drift: Callable[[Sequence[Changed]], list[float]],
    progress: Callable[[int], None] = lambda markers: None,
) -> Native:
    """The edit for `model.recipe`, made from `batches` of images `[B, 3, H, W]`.

    Among the markers with a margin of at least `ENOUGH_MARGIN`, the one with the least drift is taken; if there are
    none, the one with the largest margin.

    Args:
        held_out: batches of other images, on which detectors must also tell registers apart.
        look: at the model, on `batches`.
        drift: edits -> distances of the outputs from the original's on `held_out`.
        progress: called with the number of markers just tried, `len(MARKER_NORMS)` in total.

    Raises:
        UnsupportedModelError: no marker separates the registers from all other tokens.
    """
    zeros_1RD = _zero_registers(model)
    markers = [(factor * look.unit * look.direction_D).to(zeros_1RD).expand_as(zeros_1RD) for factor in MARKER_NORMS]
    size = _num_together(model, sum(map(len, (*batches, *held_out))))
    best, least = None, float("inf")
    for start in range(0, len(markers), size):
        trials = _edited(model, look.constants, markers[start : start + size], batches, held_out)
        losses = iter(
            drift([Changed(trial.parameters, states) for trial, states in trials if trial.margin >= ENOUGH_MARGIN])
        )
        progress(len(trials))
        for trial, _ in trials:
            lost = next(losses) if trial.margin >= ENOUGH_MARGIN else float("inf")
            if best is None or lost < least or (least == float("inf") and trial.margin > best.margin):
                best, least = trial, lost
    assert best is not None
    _check_margin(model, best)
    return best


def _num_together(model: NativeModel, num_images: int) -> int:
    """How many markers are tried together: one reading of weights on disk serves as many as memory has room for."""
    if not model.loaded.stored:
        return 1
    room = num_at_once(model.sites, model.recipe.num_registers)
    return min(len(MARKER_NORMS), max(1, room // num_images))


def _check_margin(model: NativeModel, best: Native) -> None:
    if best.margin < MIN_MARGIN:
        raise UnsupportedModelError(
            f"native mode: at the MLP of a target block, no linear discriminant separates the register from all other "
            f"tokens (margin {best.margin:.3f}, at least {MIN_MARGIN} is needed; smallest of blocks "
            f"{', '.join(map(str, model.recipe.register_neurons))}); give more images, or use mode shift or bias"
        )


def without_states(batches: Sequence[Tensor]) -> list[tuple[Tensor]]:
    """Batches of images without further inputs."""
    return [(batch,) for batch in batches]


def _joined(inputs: Sequence[MlpInput]) -> tuple[Tensor, Tensor]:
    """Registers and other tokens of several batches, `[N, D]` each."""
    return torch.cat([each.registers_ND for each in inputs]), torch.cat([each.others_ND for each in inputs])


def _zero_registers(model: NativeModel) -> Tensor:
    """Register tokens `[1, R, D]`."""
    return torch.zeros_like(model.graph_module.get_parameter(model.register_name))


@torch.no_grad()
def _first_direction(model: NativeModel, batches: Sequence[Tensor]) -> Tensor:
    """See `FirstLook`."""
    first, zeros_1RD = min(model.recipe.register_neurons), _zero_registers(model)
    (tokens,) = model.mlp_inputs(first, [({model.register_name: zeros_1RD}, without_states(batches))])
    return _discriminant(*_joined(tokens))


@torch.no_grad()
def register_constants(model: NativeModel, batches: Sequence[Tensor]) -> dict[int, Tensor]:
    """See `FirstLook`."""
    recipe = model.recipe
    shifted, results = apply_passes(model.traced, plan_surgery(model.sites, replace(recipe, mode="shift")))
    nodes = next(result.changed for result in results if "shift" in result.due)
    tapped = tap(shifted, dict(zip(map(str, recipe.register_neurons), nodes, strict=True)), early_exit=True)
    _, registers = model.sites.patched(recipe.num_registers)
    sums: dict[int, Tensor] = {}
    num_images = 0
    (runs,) = model.run_all(tapped, [({}, without_states(batches))])
    for batch, (_, taps) in zip(batches, runs, strict=True):
        num_images += len(batch)
        for block, neurons in recipe.register_neurons.items():
            values_K = taps[str(block)][:, registers][..., list(neurons)].double().mean(dim=1).sum(dim=0)
            sums[block] = sums.get(block, 0) + values_K
    return {block: values_K / num_images for block, values_K in sums.items()}


def _discriminant(registers_ND: Tensor, others_ND: Tensor) -> Tensor:
    """Unit normal of Fisher's linear discriminant between two sets of tokens, float64 `[D]`.

    The covariance is the mean of the two classes', shrunk.
    """
    means, covariances = [], []
    for tokens_ND in (registers_ND, others_ND):
        mean_D = tokens_ND.double().mean(dim=0)
        means.append(mean_D)
        chunks = tokens_ND.split(CHUNK)
        covariances.append(sum((chunk.double() - mean_D).T @ (chunk.double() - mean_D) for chunk in chunks))
    pooled_DD = (covariances[0] / len(registers_ND) + covariances[1] / len(others_ND)) / 2
    pooled_DD.diagonal().add_(SHRINKAGE * float(pooled_DD.diagonal().mean()))
    normal_D = torch.linalg.solve(pooled_DD, means[0] - means[1])
    return normal_D / normal_D.norm()


def _edited(
    model: NativeModel,
    constants: Mapping[int, Tensor],
    markers: Sequence[Tensor],
    batches: Sequence[Tensor],
    held_out: Sequence[Tensor],
) -> list[tuple[Native, list[tuple[Tensor, ...]]]]:
    """The edit with each of `markers`, register tokens `[1, R, D]`, and what then enters the last edited block for each
    batch of `held_out` (nothing if that is block 0).
    """
    changes = [{model.register_name: marker.contiguous()} for marker in markers]
    margins: list[list[float]] = [[] for _ in markers]
    activations: list[dict[int, Tensor]] = [{} for _ in markers]
    every = [*batches, *held_out]
    entering: list[list[tuple[Tensor, ...]]] = [[() for _ in every] for _ in markers]
    for block in sorted(model.mlps):
        jobs = [
            (change, [(batch, *state) for batch, state in zip(every, states, strict=True)])
            for change, states in zip(changes, entering, strict=True)
        ]
        weights = model.mlp_weights(block)
        for number, tokens in enumerate(model.mlp_inputs(block, jobs)):
            entering[number] = [each.entering for each in tokens]
            registers_ND, others_ND = _joined(tokens[: len(batches)])
            normal_D = _discriminant(registers_ND, others_ND)
            registers_N, others_N = _projected(registers_ND, normal_D), _projected(others_ND, normal_D)
            margin, lowest, highest = separation(registers_N, others_N)
            unseen = [_projected(tokens_ND, normal_D) for tokens_ND in _joined(tokens[len(batches) :])]
            margins[number] += [margin, separation(*unseen)[0]]
            line = _Line(normal_D, (lowest + highest) / 2, float(registers_N.mean()), highest)
            own = {name: changes[number].get(name, value) for name, value in weights.items()}
            edit, reached_K = _detectors(model, block, own, constants[block], line)
            activations[number][block] = reached_K
            changes[number] = changes[number] | edit
    norms = [float(token_norms(marker).mean()) for marker in markers]
    edits = [Native(*each) for each in zip(changes, map(min, margins), norms, activations, strict=True)]
    return [(edit, states[len(batches) :]) for edit, states in zip(edits, entering, strict=True)]


def _projected(tokens_ND: Tensor, normal_D: Tensor) -> Tensor:
    """The tokens projected onto a direction, float64 `[N]`."""
    return torch.cat([chunk.double() @ normal_D for chunk in tokens_ND.split(CHUNK)])


def separation(registers_N: Tensor, others_N: Tensor) -> tuple[float, float, float]:
    """The margin between a detector's values on registers and on other tokens; the lowest register, the highest other.

    The margin is (lowest register - highest other) / (mean register - mean other): it does not depend on the detector's
    scale and offset, and is negative if the two overlap.
    """
    lowest, highest = float(registers_N.min()), float(others_N.max())
    return (lowest - highest) / float(registers_N.mean() - others_N.mean()), lowest, highest


@dataclass(frozen=True)
class _Line:
    """The positions of registers and other tokens along a discriminant.

    Attributes:
        normal_D: its direction.
        threshold: between the two; `mean`: of the registers; `highest`: of the other tokens.
    """

    normal_D: Tensor
    threshold: float
    mean: float
    highest: float


def _detectors(
    model: NativeModel,
    block: int,
    weights: Mapping[str, Tensor],
    constants_K: Tensor,
    line: _Line,
) -> tuple[dict[str, Tensor], Tensor]:
    """New values of `weights`, those of the MLP of `block`, and its register neurons' activations with them, `[K]`."""
    mlp, threshold, mean = model.mlps[block], line.threshold, line.mean
    neurons = torch.tensor(model.recipe.register_neurons[block], device=constants_K.device)
    new = {name: value.clone() for name, value in weights.items()}
    gate, value = mlp.gate, mlp.value
    assert gate.bias is not None
    if value is not None:
        assert value.bias is not None
        new[value.weight][value.offset + neurons] = 0
        new[value.bias][value.offset + neurons] = 1
    reach_K = _inverse(model, block, mlp, new, constants_K.abs())
    slope_K = torch.maximum(
        reach_K / (mean - threshold), torch.full_like(reach_K, FLAT / max(threshold - line.highest, 1e-6 * abs(mean)))
    )
    weight, bias = new[gate.weight], new[gate.bias]
    weight[gate.offset + neurons] = (slope_K[:, None] * line.normal_D).to(weight)
    bias[gate.offset + neurons] = (-slope_K * threshold).to(bias)
    reached_K = _activation(model, block, mlp, new, slope_K * (mean - threshold))
    new[mlp.down][:, neurons] *= (constants_K / reached_K).to(new[mlp.down])
    return new, reached_K


def _activation(model: NativeModel, block: int, mlp: Mlp, new: Mapping[str, Tensor], values_K: Tensor) -> Tensor:
    """The hidden units' activations if their gates' linears give `values_K`, `[K]`."""
    neurons = torch.tensor(model.recipe.register_neurons[block], device=values_K.device)
    assert mlp.gate.bias is not None
    changed = {
        **new,
        mlp.gate.bias: new[mlp.gate.bias].index_copy(0, mlp.gate.offset + neurons, values_K.to(new[mlp.gate.bias])),
    }
    zeros_11D = torch.zeros(1, 1, model.sites.width, dtype=new[mlp.gate.bias].dtype, device=values_K.device)
    hidden_11H = with_parameters(model.hidden_of[block], changed)(zeros_11D)
    return hidden_11H[0, 0, neurons].double()


def _inverse(model: NativeModel, block: int, mlp: Mlp, new: Mapping[str, Tensor], targets_K: Tensor) -> Tensor:
    """The gate values for the activations `targets_K` > 0, by bisection; every supported activation increases there."""
    low_K, high_K = torch.zeros_like(targets_K), 2 * targets_K + FLAT
    for _ in range(40):
        middle_K = (low_K + high_K) / 2
        below_K = _activation(model, block, mlp, new, middle_K) < targets_K
        low_K, high_K = torch.where(below_K, middle_K, low_K), torch.where(below_K, high_K, middle_K)
    return (low_K + high_K) / 2


@torch.no_grad()
def _mean_token_norm(model: NativeModel, batches: Sequence[Tensor]) -> float:
    """See `FirstLook`."""
    tapped = tap(model.traced.graph_module, {"tokens": model.sites.tokens}, early_exit=True)
    (runs,) = model.run_all(tapped, [({}, without_states(batches))])
    norms = [token_norms(taps["tokens"]).flatten() for _, taps in runs]
    return float(torch.cat(norms).mean())
