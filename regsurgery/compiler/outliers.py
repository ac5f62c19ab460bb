"""Which tokens are outliers, by their norms."""

from __future__ import annotations

import torch
from torch import Tensor

OUTLIER_FACTOR = 5.0  # a patch is an outlier above this many times the median patch norm of its image
ROBUST_DEVIATIONS = 10.0
MIN_RATIO = 3.0
POSITIONAL_SHARE = 0.8  # outliers are positional if this share of them is at the few most frequent places


def token_norms(tokens_BTD: Tensor) -> Tensor:
    """L2 norms in float32, `[B, T]`."""
    return torch.linalg.vector_norm(tokens_BTD.float(), dim=-1)


def outliers(norms_BN: Tensor) -> Tensor:
    """Which patches are outliers: above `OUTLIER_FACTOR` times the median norm of their image, bool `[B, N]`."""
    return norms_BN > OUTLIER_FACTOR * norms_BN.median(dim=1, keepdim=True).values


def robust_threshold(norms_BN: Tensor) -> Tensor:
    """The norm above which a patch is an outlier by `robust_outliers`, `[B, 1]`."""
    median_B1 = norms_BN.median(dim=1, keepdim=True).values
    deviation_B1 = 1.4826 * (norms_BN - median_B1).abs().median(dim=1, keepdim=True).values
    return torch.maximum(median_B1 + ROBUST_DEVIATIONS * deviation_B1, MIN_RATIO * median_B1)


def robust_outliers(norms_BN: Tensor) -> Tensor:
    """Which patches are outliers without a given factor, bool `[B, N]`.

    Their norm exceeds both median + 10 robust standard deviations and 3 times the median of their image and block. The
    first bound adapts to how narrow the bulk is (1.4826 x the median absolute deviation); the second keeps a skewed but
    one-peaked distribution from being called bimodal.
    """
    return norms_BN > robust_threshold(norms_BN)


def share_at_common_places(hits_N: Tensor, usual: float) -> float:
    """Share of all outliers that sit at the k most frequent places, if an image has k of them on average.

    Args:
        hits_N: in how many images each patch is an outlier, `[N]`; not all zero.
    """
    return float(hits_N.topk(max(1, round(usual))).values.sum() / hits_N.sum())
