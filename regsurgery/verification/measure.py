"""Original against patched -> `Verdict`: figures over images, and whether the surgery did what it must.

Norms are read from the two graphs; the written artefact (the module form, a program) is run on the same images, and
its outputs must equal the patched graph's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from regsurgery.checkpoints.turns import in_turns
from regsurgery.compiler.comparison import Drift, Means, compare, kl_divergence, main_output, output_cosine, probe_nodes
from regsurgery.compiler.modes.closed_form import separation
from regsurgery.compiler.outliers import POSITIONAL_SHARE, outliers, share_at_common_places, token_norms
from regsurgery.compiler.taps import tap
from regsurgery.compiler.together import num_at_once
from regsurgery.compiler.trace import tensor_inputs
from regsurgery.images.image_set import ImageSet
from regsurgery.interval import Estimate, Figures, Values
from regsurgery.verification.side import Side
from regsurgery.verification.verdict import BeforeAfter, NormMaps, UnusedRegister, Verdict, warnings_of

# What it takes to pass. Outliers: fewer than one in twenty images, or a tenth of the original's. Fidelity: the output
# keeps its direction; the real ViT-Ti keeps 0.94 (image features) to 0.96 (logits). Parity: only rounding.
MAX_OUTLIERS = 0.05
MAX_OUTLIERS_SHARE = 0.1
MIN_COSINE_OUTPUT = 0.8
MIN_IMAGES_POSITIONAL = 4  # with fewer, equal places say little
MODELS = 4  # that see a batch: original, patched graph, artefact, and the original with unused registers
MAX_TOGETHER = 8  # batches, each of which every model runs in a thread of its own
NUM_EXAMPLES = 4  # images whose norms are kept for a picture
UNUSED_IMAGES = 32  # at most this many, evenly spread, go through the original with unused registers
PARITY = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # other dtypes: 0


def rounding(output: Tensor) -> float:
    """The largest difference from `output` that rounding explains."""
    return PARITY.get(output.dtype, 0.0) * max(1.0, float(output.abs().max()))


class _Places:
    """Where the original's outliers sit, and the first images' norms of both models, by patch."""

    def __init__(self) -> None:
        self.hits_N: Tensor | None = None
        self.num_images, self.kept = 0, 0
        self.examples: list[tuple[Tensor, Tensor]] = []
        self.image_size = (0, 0)

    def add(self, original_BN: Tensor, patched_BN: Tensor, image_size: tuple[int, int]) -> None:
        hits_N = outliers(original_BN).sum(dim=0).cpu()
        self.hits_N = hits_N if self.hits_N is None else self.hits_N + hits_N
        self.num_images += len(original_BN)
        wanted = NUM_EXAMPLES - self.kept
        if wanted > 0:
            self.examples.append((original_BN[:wanted].cpu(), patched_BN[:wanted].cpu()))
            self.kept += len(original_BN[:wanted])
            self.image_size = image_size

    def positional(self) -> bool | None:
        if self.hits_N is None or self.num_images < MIN_IMAGES_POSITIONAL or not self.hits_N.any():
            return None
        usual = float(self.hits_N.sum()) / self.num_images
        return share_at_common_places(self.hits_N, usual) >= POSITIONAL_SHARE

    def norm_maps(self) -> NormMaps | None:
        if not self.examples:
            return None
        height, width = self.image_size
        original_EN, patched_EN = (torch.cat(group) for group in zip(*self.examples, strict=True))
        num_patches = original_EN.shape[1]
        rows = round((num_patches * height / width) ** 0.5)
        if rows < 1 or num_patches % rows or patched_EN.shape[1] != num_patches:
            return None
        return NormMaps(original_EN.reshape(-1, rows, num_patches // rows),
                        patched_EN.reshape(-1, rows, num_patches // rows))  # fmt: skip


class _Margins:
    """Extremes and sums of the detectors' values on registers and on all other tokens."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.values: list[list[tuple[Tensor, Tensor]]] = [[] for _ in side.detectors]

    def nodes(self) -> dict[str, str]:
        return {f"detector {index}": node for index, (node, _) in enumerate(self.side.detectors)}

    def add(self, taps: Mapping[str, Tensor]) -> None:
        for index, (_, unit) in enumerate(self.side.detectors):
            values_BT = taps[f"detector {index}"][..., unit].double()
            is_register_T = torch.zeros(values_BT.shape[1], dtype=torch.bool, device=values_BT.device)
            is_register_T[self.side.registers] = True
            self.values[index].append((values_BT[:, is_register_T].flatten(), values_BT[:, ~is_register_T].flatten()))

    def smallest(self) -> float | None:
        margins = []
        for kept in self.values:
            registers_N, others_N = (torch.cat(group) for group in zip(*kept, strict=True))
            margins.append(separation(registers_N, others_N)[0])
        return min(margins, default=None)


class _Unused:
    """The effect of unused registers, on a part of the images."""

    def __init__(self, graph_module: fx.GraphModule, num_batches: int, batch_size: int) -> None:
        self.graph_module = graph_module
        self.every = max(1, num_batches // max(1, UNUSED_IMAGES // batch_size))
        self.num_images = 0
        self.means, self.figures = Means(), Figures()

    def wants(self, number: int, num_images: int) -> bool:
        """Whether batch `number`, of so many images, is used; it then counts as used."""
        if number % self.every or self.num_images + num_images > max(UNUSED_IMAGES, num_images):
            return False
        self.num_images += num_images
        return True

    def add(self, output: Tensor, new_output: Tensor, patched: Drift) -> None:
        """Use a batch: the outputs of the original and with unused registers, and the drift of the patched model."""
        cosine_B = output_cosine(output, new_output)
        self.means.add("cosine output", cosine_B)
        drift_B, patched_B = 1 - cosine_B, 1 - patched.cosine_output
        if patched.kl is not None:
            drift_B, patched_B = kl_divergence(output, new_output), patched.kl
            self.means.add("kl", drift_B)
            self.means.add("argmax", output.argmax(-1) == new_output.argmax(-1))
        ratio = Values(None, _known(patched_B), out_of=drift_B.clamp_min(0.0))
        self.figures.add(len(output), {"times": ratio})

    def result(self) -> UnusedRegister | None:
        if not self.num_images:
            return None
        same, times = self.means.get("argmax"), self.figures.rows()[0].patched
        return UnusedRegister(
            num_images=self.num_images,
            kl=self.means.get("kl"),
            num_same=None if same is None else round(same * self.num_images),
            cosine_output=self.means["cosine output"],
            times=None if times is None else times.value,
            times_interval=None if times is None else _ends(times),
        )


def _known(values_B: Tensor) -> Tensor:
    """`values_B` with NaN, which `Figures` leaves out, for what is not finite."""
    return values_B.double().masked_fill(~values_B.isfinite(), float("nan"))


def _ends(estimate: Estimate | None) -> tuple[float, float] | None:
    if estimate is None or estimate.low is None or estimate.high is None:
        return None
    return estimate.low, estimate.high


def _values(drift: Drift) -> dict[str, Values]:
    """The figures of a batch that have intervals, by their names in `Verdict`."""
    found = {
        "cosine_output": Values(None, _known(drift.cosine_output)),
        "cosine_patches": Values(None, _known(drift.cosine_patches), out_of=drift.num_patches),
    }
    if drift.kl is not None and drift.same is not None:
        found["kl"] = Values(None, _known(drift.kl))
        found["same_argmax"] = Values(None, drift.same, is_share=True)
    return found


@dataclass(frozen=True)
class Artefact:
    """The outputs of a written model.

    Attributes:
        outputs: by the names of the original's outputs; a host of native mode may lack some.
        as_graph: the values that must equal the patched graph's outputs of those names.
    """

    outputs: Mapping[str, Tensor]
    as_graph: Mapping[str, Tensor]


@dataclass(frozen=True)
class Parity:
    """How far the artefact may be from the patched graph.

    Attributes:
        found: a difference that was measured earlier; `limit` is its limit.
        factor: how many times rounding outputs may differ.
    """

    found: float = 0.0
    limit: float = 0.0
    factor: float = 1.0


def measure(
    sides: tuple[Side, Side],
    run_artefact: Callable[[Tensor], Artefact],
    images: ImageSet,
    *,
    unused: fx.GraphModule | None = None,
    parity: Parity = Parity(),
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda done: None,
) -> Verdict:
    """Compare the original graph, the patched graph and the artefact over `images`.

    Args:
        sides: the original's and the patched model's.
        run_artefact: images `[B, 3, H, W]` -> the artefact's outputs.
        unused: the original with as many registers as the patched model and no neuron shifted.
        progress: called with the number of images just done.
    """
    least = None if unused is None else _Unused(unused, -(-images.num_images // batch_size), batch_size)
    comparison = _Comparison(*sides, least, parity)
    batches = images.numbered_batches(batch_size, sides[0].loaded.preprocess)
    while group := list(itertools.islice(batches, comparison.num_together(batch_size))):
        comparison.add(group, run_artefact)
        progress(sum(len(batch) for _, batch in group))
    verdict = comparison.verdict(images)
    return replace(verdict, warnings=warnings_of(verdict))


def broken(
    sides: tuple[Side, Side], run_artefact: Callable[[Tensor], Artefact], images: ImageSet, *, parity: Parity = Parity()
) -> list[str]:
    """What of the artefact is not as in the patched graph on `images`, shapes and values; outliers do not count."""
    comparison = _Comparison(*sides, None, parity)
    comparison.add(list(images.numbered_batches(images.num_images, sides[0].loaded.preprocess)), run_artefact)
    return comparison.broken()


class _Runs(NamedTuple):
    """What the models make of a batch; `least` is the output with unused registers, where it is wanted."""

    original: tuple[dict[str, Tensor], dict[str, Tensor]]
    patched: tuple[dict[str, Tensor], dict[str, Tensor]]
    artefact: Artefact
    least: dict[str, Tensor] | None = None


class _Comparison:
    """The sums over all batches, and the verdict on them."""

    def __init__(self, original: Side, patched: Side, unused: _Unused | None, parity: Parity) -> None:
        self.original_side, self.patched_side, self.unused, self.parity = original, patched, unused, parity
        self.margins, self.places, self.means, self.figures = _Margins(patched), _Places(), Means(), Figures()
        self.original = tap(original.graph_module, probe_nodes(original.sites))
        self.patched = tap(patched.graph_module, {**probe_nodes(patched.sites), **self.margins.nodes()})
        self.main, self.num_images, self.finite = "", 0, True
        self.worst = [0.0, 0.0]
        self.difference, self.limit = parity.found, parity.limit
        self.shapes: set[str] = set()  # outputs that changed their shape

    def num_together(self, batch_size: int) -> int:
        """How many batches one reading of weights on disk serves."""
        side, registers = self.original_side, self.patched_side.registers
        if not side.loaded.stored:
            return 1
        images = num_at_once(side.sites, registers.stop - registers.start) // MODELS
        return min(MAX_TOGETHER, max(1, images // batch_size))

    @torch.no_grad()
    def add(self, group: Sequence[tuple[int, Tensor]], run_artefact: Callable[[Tensor], Artefact]) -> None:
        """Add numbered batches; weights on disk are read once for all of them and for all models."""
        calls: list[list[Callable[[], Any]]] = []
        for number, batch in group:
            inputs = tensor_inputs(self.original_side.loaded, batch)
            new_inputs = tensor_inputs(self.patched_side.loaded, batch)
            calls.append([partial(self.original, *inputs), partial(self.patched, *new_inputs)])
            calls[-1].append(partial(run_artefact, batch))
            if self.unused is not None and self.unused.wants(number, len(batch)):
                calls[-1].append(partial(self.unused.graph_module, *inputs))
        every = [call for own in calls for call in own]
        given = iter(in_turns(every) if self.original_side.loaded.stored else (call() for call in every))
        for (_, batch), own in zip(group, calls, strict=True):
            self._add(batch, _Runs(*(next(given) for _ in own)))

    def _add(self, batch: Tensor, runs: _Runs) -> None:
        sites, patched_side = self.original_side.sites, self.patched_side
        self.num_images += len(batch)
        (outputs, taps), (new_outputs, new_taps), artefact = runs[:3]
        shared = {name: value for name, value in outputs.items() if name in artefact.outputs}
        self.main = main = main_output(tuple(shared))
        self.shapes |= {name for name, value in shared.items() if value.shape != artefact.outputs[name].shape}
        compared = new_outputs if main in self.shapes else artefact.outputs
        tokens = (patched_side.patches, patched_side.registers)
        drift = compare(self.means, sites, main, (outputs, taps), (compared, new_taps), outliers, tokens)
        self.figures.add(len(batch), _values(drift))
        if self.unused is not None and runs.least is not None:
            self.unused.add(outputs[main], runs.least[main], drift)
        self.margins.add(new_taps)
        norms = token_norms(taps["probe"])[:, sites.patches], token_norms(new_taps["probe"])[:, patched_side.patches]
        self.places.add(*norms, (batch.shape[-2], batch.shape[-1]))
        self.worst = [max(before, float(norms_BN.max())) for before, norms_BN in zip(self.worst, norms, strict=True)]
        for name, value in artefact.as_graph.items():
            if name not in self.shapes:
                self.difference = max(self.difference, float((value - new_outputs[name]).abs().max()))
                self.limit = max(self.limit, self.parity.factor * rounding(new_outputs[name]))
        self.finite = self.finite and all(bool(value.isfinite().all()) for value in artefact.outputs.values())

    def verdict(self, images: ImageSet) -> Verdict:
        """The verdict, without warnings."""
        means, failures = self.means, self.failures()
        same = means.get("argmax")
        return Verdict(
            passed=not failures,
            num_images=self.num_images,
            images=images.note,
            evidence=images.evidence,
            block=self.original_side.sites.probe_block,
            output=self.main,
            outliers_per_image=self._pair("outliers"),
            max_patch_norm=self._pair("max"),
            worst_patch_norm=BeforeAfter(*self.worst),
            median_patch_norm=self._pair("median"),
            register_norm=means.get("register"),
            register_norm_std=means.deviation("register"),
            positional=self.places.positional(),
            margin=self.margins.smallest(),
            cosine_patches=means["cosine patches"],
            cosine_output=means["cosine output"],
            kl=means.get("kl"),
            same_argmax=same,
            num_same=None if same is None else round(same * self.num_images),
            intervals={row.name: _ends(row.patched) for row in self.figures.rows()},
            unused_register=None if self.unused is None else self.unused.result(),
            parity_max_abs=self.difference,
            parity_allowed=self.limit,
            failures=tuple(failures),
            norm_maps=self.places.norm_maps(),
        )

    def broken(self) -> list[str]:
        """What is not as in the patched graph."""
        failures = [f"the output '{name}' changed its shape" for name in sorted(self.shapes)]
        if not self.finite:
            failures.append("the patched model returns NaN or infinity")
        if self.difference > self.limit:
            failures.append(
                f"the written model differs from the patched graph by {self.difference:.2e} (allowed {self.limit:.0e})"
            )
        return failures

    def failures(self) -> list[str]:
        """The requirements that the patched model does not meet."""
        failures = self.broken()
        found = self._pair("outliers")
        if found.patched > max(MAX_OUTLIERS, MAX_OUTLIERS_SHARE * found.original):
            failures.append(
                f"{found.patched:.2f} of {found.original:.2f} outlier tokens per image remain; search for the register "
                "neurons again with regsurgery find"
            )
        cosine = self.means["cosine output"]
        if not cosine >= MIN_COSINE_OUTPUT:
            failures.append(
                f"the output '{self.main}' moved too far: cosine {cosine:.3f} to the original, at least "
                f"{MIN_COSINE_OUTPUT} is needed"
            )
        return failures

    def _pair(self, name: str) -> BeforeAfter:
        return BeforeAfter(self.means[f"original {name}"], self.means[f"patched {name}"])
