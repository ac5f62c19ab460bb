"""Original against patched -> `Verdict`: figures over images, and whether the surgery did what it must.

Norms are read off the two graphs; the artefact that was written (the module form, or the `.pt2`) is run on the same
images, and its outputs must equal the patched graph's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from regsurgery.calibration import ImageSet
from regsurgery.comparison import Means, compare, main_output, probe_nodes
from regsurgery.statistics import outliers, tap, token_norms
from regsurgery.surgery import Surgery
from regsurgery.trace import tensor_inputs

# What a verdict needs. Outliers: below one in twenty images, or a tenth of what there were. Fidelity: an output that
# keeps its direction; the real ViT-Ti keeps 0.94 (image features) to 0.96 (logits). Parity: rounding only.
MAX_OUTLIERS = 0.05
MAX_OUTLIERS_SHARE = 0.1
MIN_COSINE_OUTPUT = 0.8
PARITY = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Pair:
    """One figure of the original and of the patched model."""

    original: float
    patched: float


@dataclass(frozen=True)
class Verdict:
    """The figures of the contract. Norms are L2 norms of tokens after block `block`; means are over the images.

    Attributes:
        outliers_per_image: patches above 5 times the median patch norm of their image.
        max_patch_norm: mean of each image's largest patch norm; `worst_patch_norm` is the largest of all.
        register_norm: mean norm of the register tokens in the patched model; None without registers.
        cosine_patches: mean cosine, original to patched, of the patches that were no outliers, after the last block.
        cosine_output: mean cosine of `output`.
        kl: mean KL divergence from the original's class distribution in nats; None for models without logits.
        same_argmax: share of images whose first class stays; None for models without logits.
        parity_max_abs: largest absolute difference between the graph and the written artefact over all outputs.
        failures: why `passed` is false.
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
    cosine_patches: float
    cosine_output: float
    kl: float | None
    same_argmax: float | None
    parity_max_abs: float
    failures: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "failures": list(self.failures)}


def verify(
    surgery: Surgery,
    run_artefact: Callable[[list[Tensor]], dict[str, Tensor]],
    images: ImageSet,
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda done: None,
) -> Verdict:
    """Compare the original graph, the patched graph and the artefact over `images`.

    Args:
        run_artefact: positional inputs of the graph -> outputs of the artefact by name.
        progress: called with the number of images just done.
    """
    loaded, sites = surgery.loaded, surgery.sites
    nodes = probe_nodes(sites)
    original, patched = tap(surgery.traced.graph_module, nodes), tap(surgery.graph_module, nodes)
    names = surgery.traced.output_names
    main = main_output(names)
    patches = slice(sites.num_prefix, sites.num_tokens)
    means, worst = Means(), [0.0, 0.0]
    parity, limit, finite = 0.0, 0.0, True
    shapes: set[str] = set()
    num_images = 0
    for batch in images.batches(batch_size, loaded.preprocess):
        num_images += len(batch)
        inputs = tensor_inputs(loaded, batch)
        with torch.no_grad():
            (outputs, taps), (new_outputs, new_taps) = original(*inputs), patched(*inputs)
            artefact = run_artefact(inputs)
        compare(means, sites, main, (outputs, taps), (new_outputs, new_taps), outliers)
        norms = token_norms(taps["probe"])[:, patches], token_norms(new_taps["probe"])[:, patches]
        worst = [max(before, float(norms_BN.max())) for before, norms_BN in zip(worst, norms, strict=True)]
        for name in names:
            if outputs[name].shape != artefact[name].shape:
                shapes.add(name)
                continue
            parity = max(parity, float((artefact[name] - new_outputs[name]).abs().max()))
            limit = max(limit, PARITY[outputs[name].dtype] * max(1.0, float(new_outputs[name].abs().max())))
            finite = finite and bool(artefact[name].isfinite().all())
        progress(len(batch))

    pair = lambda name: Pair(means[f"original {name}"], means[f"patched {name}"])  # noqa: E731
    failures = [f"the output '{name}' changed its shape" for name in sorted(shapes)]
    if not finite:
        failures.append("the patched model returns NaN or infinity")
    if parity > limit:
        failures.append(f"the written model differs from the patched graph by {parity:.2e} (allowed {limit:.0e})")
    found = pair("outliers")
    if found.patched > max(MAX_OUTLIERS, MAX_OUTLIERS_SHARE * found.original):
        failures.append(
            f"{found.patched:.2f} outlier tokens per image remain of {found.original:.2f}: these are not, or not all, "
            "of the register neurons"
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
        cosine_patches=means["cosine patches"],
        cosine_output=means["cosine output"],
        kl=means.get("kl"),
        same_argmax=means.get("argmax"),
        parity_max_abs=parity,
        failures=tuple(failures),
    )
