"""Compare the original with a patched model batch by batch: running means of the figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from regsurgery.compiler.outliers import token_norms
from regsurgery.compiler.sites import Sites
from regsurgery.families import LOGIT_OUTPUTS, MAIN_OUTPUTS

Run = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]  # what `taps.tap` returns: outputs, taps


class Means:
    """Running sums over images, in float64."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values.double().sum())
        self.counts[name] = self.counts.get(name, 0) + values.numel()

    def __getitem__(self, name: str) -> float:
        return self.sums[name] / self.counts[name]

    def deviation(self, name: str) -> float | None:
        """The standard deviation, using the mean of `NAME squared`; None if nothing was added."""
        mean, square = self.get(name), self.get(f"{name} squared")
        return None if mean is None or square is None else max(0.0, square - mean**2) ** 0.5

    def get(self, name: str) -> float | None:
        """The mean, or None if nothing was added."""
        return self[name] if self.counts.get(name) else None


@dataclass(frozen=True, eq=False)
class Drift:
    """How far each image of a batch moved, `[B]`; for models without logits, `kl` and `same` are None.

    Attributes:
        kl: KL divergence from the original's class distribution, nats.
        same: whether the first class stays the same.
        cosine_output: see `output_cosine`.
        cosine_patches: sum of the cosines of the patches that were not outliers; `num_patches` is their number.
    """

    kl: Tensor | None
    same: Tensor | None
    cosine_output: Tensor
    cosine_patches: Tensor
    num_patches: Tensor

    @property
    def mean_cosine_patches(self) -> Tensor:
        """Mean cosine of the patches that were no outliers, `[B]`."""
        return self.cosine_patches / self.num_patches

    @property
    def value(self) -> Tensor:
        """The drift as one number an image, `[B]`: `kl` in nats, or for models without logits of classes what is
        missing to 1 of the cosines of the output and of the patches, added.
        """
        return 2 - self.cosine_output - self.mean_cosine_patches if self.kl is None else self.kl


def moved(main: str, output: Tensor, new_output: Tensor, cosine_BN: Tensor, inlier_BN: Tensor) -> Drift:
    """How far one batch moved.

    Args:
        output, new_output: the main output of the original and of the patched model.
        cosine_BN: `patch_cosines` of the two after the last block.
        inlier_BN: which patches of the original were no outliers.
    """
    kl_B, same_B = None, None
    if has_classes(main, output):
        kl_B, same_B = kl_divergence(output, new_output), output.argmax(-1) == new_output.argmax(-1)
    cosine_B = (cosine_BN * inlier_BN).sum(dim=1)
    return Drift(kl_B, same_B, output_cosine(output, new_output), cosine_B, inlier_BN.sum(dim=1))


def patch_cosines(patches_BND: Tensor, new_patches_BND: Tensor) -> Tensor:
    """Cosine of each patch, `[B, N]`."""
    return F.cosine_similarity(patches_BND.float(), new_patches_BND.float(), dim=-1)


def probe_nodes(sites: Sites) -> dict[str, str]:
    """The nodes that `compare` needs tapped: the stream after the last but one block, and after the last."""
    return {"probe": sites.blocks[sites.probe_block].output, "last": sites.last}


def main_output(names: tuple[str, ...]) -> str:
    """The output that drift is measured on."""
    return next((name for name in MAIN_OUTPUTS if name in names), names[0])


def compare(
    means: Means,
    sites: Sites,
    main: str,
    original: Run,
    patched: Run,
    outliers: Callable[[Tensor], Tensor],
    patched_tokens: tuple[slice, slice] | None = None,
) -> Drift:
    """Add one batch to `means`, and return how far its images moved.

    Adds, for both models (`original ...`, `patched ...`): `outliers` per image, `max` and `median` patch norm and the
    `ratio` of the two after the last but one block; `register`: the register tokens' norm there; `cosine patches` of
    those that were not outliers, after the last block; `cosine output`; for logits `kl` in nats and `argmax`, whether
    it stayed the same.

    Args:
        sites: of the original.
        outliers: norms `[B, N]` -> which are outliers, bool `[B, N]`.
        patched_tokens: the places of patches and registers among the patched model's tokens; by default as left by the
            passes.
    """
    (outputs, taps), (new_outputs, new_taps) = original, patched
    num_registers = new_taps["probe"].shape[1] - sites.num_tokens
    new_patches, registers = patched_tokens or sites.patched(num_registers)
    was_outlier_BN = outliers(token_norms(taps["probe"])[:, sites.patches])
    for kind, tapped, patches in (("original", taps, sites.patches), ("patched", new_taps, new_patches)):
        norms_BN = token_norms(tapped["probe"])[:, patches]
        max_B, median_B = norms_BN.amax(dim=1), norms_BN.median(dim=1).values
        means.add(f"{kind} outliers", outliers(norms_BN).sum(dim=1))
        means.add(f"{kind} max", max_B)
        means.add(f"{kind} median", median_B)
        means.add(f"{kind} ratio", max_B / median_B)
    register_norms_BR = token_norms(new_taps["probe"])[:, registers]
    means.add("register", register_norms_BR)
    means.add("register squared", register_norms_BR.double() ** 2)
    cosine_BN = patch_cosines(taps["last"][:, sites.patches], new_taps["last"][:, new_patches])
    means.add("cosine patches", cosine_BN[~was_outlier_BN])
    drift = moved(main, outputs[main], new_outputs[main], cosine_BN, ~was_outlier_BN)
    means.add("cosine output", drift.cosine_output)
    if drift.kl is not None and drift.same is not None:
        means.add("kl", drift.kl)
        means.add("argmax", drift.same)
    return drift


def has_classes(main: str, output: Tensor) -> bool:
    """Whether the main output is class logits, `[B, C]`; those of MAE, `[B, N, pixels]`, are not."""
    return main in LOGIT_OUTPUTS and output.ndim == 2


def output_cosine(output: Tensor, new_output: Tensor) -> Tensor:
    """Cosine of each image's output, `[B]`; the mean over the tokens if the output is `[B, T, D]`."""
    cosine = F.cosine_similarity(output.float(), new_output.float(), dim=-1)
    return cosine if cosine.ndim == 1 else cosine.flatten(1).mean(dim=1)


def kl_divergence(logits_BC: Tensor, new_logits_BC: Tensor) -> Tensor:
    """KL(original || patched) of each image's class distribution, in nats, `[B]`."""
    log_p, log_q = logits_BC.float().log_softmax(-1), new_logits_BC.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
