"""One batch of the original against the same batch of a patched model: running means of the figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from regsurgery.families import LOGIT_OUTPUTS, MAIN_OUTPUTS
from regsurgery.sites import Sites
from regsurgery.statistics import token_norms

Run = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]  # what `statistics.tap` returns: outputs, taps


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

    def get(self, name: str) -> float | None:
        """The mean, or None where nothing was added."""
        return self[name] if self.counts.get(name) else None


def probe_nodes(sites: Sites) -> dict[str, str]:
    """The nodes that `compare` wants tapped: the stream after the last but one block, and after the last."""
    return {"probe": sites.blocks[sites.probe_block].output, "last": sites.last}


def main_output(names: tuple[str, ...]) -> str:
    """The output that drift is measured on."""
    return next((name for name in MAIN_OUTPUTS if name in names), names[0])


def compare(
    means: Means, sites: Sites, main: str, original: Run, patched: Run, outliers: Callable[[Tensor], Tensor]
) -> None:
    """Add one batch to `means`.

    Adds, for both models (`original ...`, `patched ...`): `outliers` per image, `max` and `median` patch norm and the
    `ratio` of the two after the last but one block; `register`: the register tokens' norm there; `cosine patches` of
    those that were no outliers, after the last block; `cosine output`; for logits `kl` in nats and `argmax`, whether it
    stayed.

    Args:
        outliers: norms `[B, N]` -> which are outliers, bool `[B, N]`.
    """
    patches = slice(sites.num_prefix, sites.num_tokens)
    (outputs, taps), (new_outputs, new_taps) = original, patched
    was_outlier_BN = outliers(token_norms(taps["probe"])[:, patches])
    for kind, tapped in (("original", taps), ("patched", new_taps)):
        norms_BN = token_norms(tapped["probe"])[:, patches]
        max_B, median_B = norms_BN.amax(dim=1), norms_BN.median(dim=1).values
        means.add(f"{kind} outliers", outliers(norms_BN).sum(dim=1))
        means.add(f"{kind} max", max_B)
        means.add(f"{kind} median", median_B)
        means.add(f"{kind} ratio", max_B / median_B)
    means.add("register", token_norms(new_taps["probe"])[:, sites.num_tokens :])
    cosine_BN = F.cosine_similarity(taps["last"][:, patches].float(), new_taps["last"][:, patches].float(), dim=-1)
    means.add("cosine patches", cosine_BN[~was_outlier_BN])
    output, new_output = outputs[main], new_outputs[main]
    means.add("cosine output", F.cosine_similarity(output.flatten(1).float(), new_output.flatten(1).float()))
    if main in LOGIT_OUTPUTS:
        means.add("kl", kl_divergence(output, new_output))
        means.add("argmax", output.argmax(-1) == new_output.argmax(-1))


def kl_divergence(logits_BC: Tensor, new_logits_BC: Tensor) -> Tensor:
    """KL(original || patched) of each image's class distribution, in nats, `[B]`."""
    log_p, log_q = logits_BC.float().log_softmax(-1), new_logits_BC.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
