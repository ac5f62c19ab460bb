"""Original against patched -> `Verdict`: figures over images, and whether the surgery did what it must.

Norms are read off the two graphs; the artefact that was written (the module form, a program) is run on the same
images, and its outputs must equal the patched graph's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from regsurgery.calibration import ImageSet
from regsurgery.comparison import Means, compare, main_output, probe_nodes
from regsurgery.loading import Loaded
from regsurgery.mlp import mlp_of
from regsurgery.native import separation
from regsurgery.recipe import Recipe
from regsurgery.sites import Sites
from regsurgery.statistics import POSITIONAL_SHARE, outliers, share_at_common_places, tap, token_norms
from regsurgery.surgery import Surgery
from regsurgery.trace import Traced, tensor_inputs

# What a verdict needs. Outliers: below one in twenty images, or a tenth of what there were. Fidelity: an output that
# keeps its direction; the real ViT-Ti keeps 0.94 (image features) to 0.96 (logits). Parity: rounding only.
MAX_OUTLIERS = 0.05
MAX_OUTLIERS_SHARE = 0.1
MIN_COSINE_OUTPUT = 0.8
MIN_IMAGES_POSITIONAL = 4  # of fewer, places that are the same say little
NUM_EXAMPLES = 4  # images whose norms are kept for a picture
PARITY = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # other dtypes: 0


@dataclass(frozen=True)
class Pair:
    """One figure of the original and of the patched model."""

    original: float
    patched: float


@dataclass(frozen=True, eq=False)
class NormMaps:
    """Patch norms of the first images, before and after, `[E, rows, columns]` each, float32 on the CPU."""

    original_ERC: Tensor
    patched_ERC: Tensor


@dataclass(frozen=True)
class Verdict:
    """The figures of the contract. Norms are L2 norms of tokens after block `block`; means are over the images.

    Attributes:
        outliers_per_image: patches above 5 times the median patch norm of their image.
        max_patch_norm: mean of each image's largest patch norm; `worst_patch_norm` is the largest of all.
        register_norm: mean norm of the register tokens in the patched model; None without registers.
        register_norm_std: its standard deviation over the images.
        positional: whether the original's outliers sit at the same places in every image; None where there are none, or
            fewer than `MIN_IMAGES_POSITIONAL` images.
        margin: native mode: how well its detectors keep registers apart, see `native.separation`; the smallest.
        cosine_patches: mean cosine, original to patched, of the patches that were no outliers, after the last block.
        cosine_output: mean cosine of `output`, over its tokens where it has some.
        kl: mean KL divergence from the original's class distribution in nats; None for models without logits.
        same_argmax: share of images whose first class stays; None for models without logits.
        parity_max_abs: largest absolute difference between the graph and the written artefact over all outputs.
        parity_allowed: the largest that passes: rounding, by the outputs' dtype and size, times the format's factor.
        failures: why `passed` is false.
        norm_maps: of the first `NUM_EXAMPLES` images, for a picture and no part of `as_dict`; None where the patches
            make no grid.
    """

    passed: bool
    num_images: int
    images: str
    block: int
    output: str
    outliers_per_image: Pair
    max_patch_norm: Pair
    worst_patch_norm: Pair
    median_patch_norm: Pair
    register_norm: float | None
    register_norm_std: float | None
    positional: bool | None
    margin: float | None
    cosine_patches: float
    cosine_output: float
    kl: float | None
    same_argmax: float | None
    parity_max_abs: float
    parity_allowed: float
    failures: tuple[str, ...] = field(default=())
    norm_maps: NormMaps | None = field(default=None, repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        facts = asdict(replace(self, norm_maps=None))
        del facts["norm_maps"]
        return {**facts, "failures": list(self.failures)}


@dataclass(frozen=True)
class Side:
    """One of the two models: its graph, and where its tokens lie.

    Attributes:
        loaded: what the graph was traced from; says how it is called.
        detectors: linear nodes and the unit of each that is native mode's detector of registers.
    """

    loaded: Loaded
    graph_module: fx.GraphModule
    sites: Sites
    patches: slice
    registers: slice
    detectors: tuple[tuple[str, int], ...] = ()


def rounding(output: Tensor) -> float:
    """The largest difference from `output` that rounding explains."""
    return PARITY.get(output.dtype, 0.0) * max(1.0, float(output.abs().max()))


def sides(surgery: Surgery) -> tuple[Side, Side]:
    """Original and patched model of a surgery."""
    sites, traced, loaded = surgery.sites, surgery.traced, surgery.loaded
    original = Side(loaded, traced.graph_module, sites, sites.patches, slice(0, 0))
    found = detectors(traced, sites, surgery.recipe) if surgery.recipe.mode == "native" else ()
    return original, Side(loaded, surgery.graph_module, sites, *sites.patched(surgery.plan.num_registers), found)


def detectors(traced: Traced, sites: Sites, recipe: Recipe) -> tuple[tuple[str, int], ...]:
    """The detector of every block: all its register neurons have the same one, but for the slope."""
    found = []
    for block, neurons in recipe.register_neurons.items():
        gate = mlp_of(traced, sites.blocks[block]).gate
        found.append((gate.node, gate.offset + neurons[0]))
    return tuple(found)


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


@dataclass(frozen=True)
class Artefact:
    """What a written model gave.

    Attributes:
        outputs: by the names of the original's outputs; not all of them where the host of native mode has not all.
        as_graph: what must be equal to the patched graph's outputs of those names.
    """

    outputs: Mapping[str, Tensor]
    as_graph: Mapping[str, Tensor]


def verify(
    original_side: Side,
    patched_side: Side,
    run_artefact: Callable[[Tensor], Artefact],
    images: ImageSet,
    *,
    parity: tuple[float, float] = (0.0, 0.0),
    parity_factor: float = 1.0,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda done: None,
) -> Verdict:
    """Compare the original graph, the patched graph and the artefact over `images`.

    Args:
        run_artefact: images `[B, 3, H, W]` -> what the artefact gives.
        parity: a difference between artefact and graph that was measured before, and its limit.
        parity_factor: by how much more than rounding the artefact may differ from the patched graph.
        progress: called with the number of images just done.
    """
    sites = original_side.sites
    margins, places = _Margins(patched_side), _Places()
    original = tap(original_side.graph_module, probe_nodes(sites))
    patched = tap(patched_side.graph_module, {**probe_nodes(patched_side.sites), **margins.nodes()})
    main = ""
    means, worst = Means(), [0.0, 0.0]
    difference, limit = parity
    finite = True
    shapes: set[str] = set()
    num_images = 0
    for batch in images.batches(batch_size, original_side.loaded.preprocess):
        num_images += len(batch)
        with torch.no_grad():
            outputs, taps = original(*tensor_inputs(original_side.loaded, batch))
            new_outputs, new_taps = patched(*tensor_inputs(patched_side.loaded, batch))
            artefact = run_artefact(batch)
        shared = {name: value for name, value in outputs.items() if name in artefact.outputs}
        main = main_output(tuple(shared))
        shapes |= {name for name, value in shared.items() if value.shape != artefact.outputs[name].shape}
        compared = new_outputs if main in shapes else artefact.outputs
        tokens = (patched_side.patches, patched_side.registers)
        compare(means, sites, main, (outputs, taps), (compared, new_taps), outliers, tokens)
        margins.add(new_taps)
        norms = token_norms(taps["probe"])[:, sites.patches], token_norms(new_taps["probe"])[:, patched_side.patches]
        places.add(*norms, (batch.shape[-2], batch.shape[-1]))
        worst = [max(before, float(norms_BN.max())) for before, norms_BN in zip(worst, norms, strict=True)]
        for name, value in artefact.as_graph.items():
            if name in shapes:
                continue
            difference = max(difference, float((value - new_outputs[name]).abs().max()))
            limit = max(limit, parity_factor * rounding(new_outputs[name]))
        finite = finite and all(bool(value.isfinite().all()) for value in artefact.outputs.values())
        progress(len(batch))

    pair = lambda name: Pair(means[f"original {name}"], means[f"patched {name}"])  # noqa: E731
    failures = [f"the output '{name}' changed its shape" for name in sorted(shapes)]
    if not finite:
        failures.append("the patched model returns NaN or infinity")
    if difference > limit:
        failures.append(f"the written model differs from the patched graph by {difference:.2e} (allowed {limit:.0e})")
    found = pair("outliers")
    if found.patched > max(MAX_OUTLIERS, MAX_OUTLIERS_SHARE * found.original):
        failures.append(
            f"{found.patched:.2f} outlier tokens per image remain of {found.original:.2f}: these are not, or not all, "
            "of the register neurons, which regsurgery find names"
        )
    if not means["cosine output"] >= MIN_COSINE_OUTPUT:
        failures.append(
            f"the output '{main}' moved too far: cosine {means['cosine output']:.3f} to the original, at least "
            f"{MIN_COSINE_OUTPUT} is needed"
        )
    return Verdict(
        passed=not failures,
        num_images=num_images,
        images=images.note,
        block=sites.probe_block,
        output=main,
        outliers_per_image=found,
        max_patch_norm=pair("max"),
        worst_patch_norm=Pair(*worst),
        median_patch_norm=pair("median"),
        register_norm=means.get("register"),
        register_norm_std=means.deviation("register"),
        positional=places.positional(),
        margin=margins.smallest(),
        cosine_patches=means["cosine patches"],
        cosine_output=means["cosine output"],
        kl=means.get("kl"),
        same_argmax=means.get("argmax"),
        parity_max_abs=difference,
        parity_allowed=limit,
        failures=tuple(failures),
        norm_maps=places.norm_maps(),
    )
