"""Features of patches as colours: their first three principal components are red, green and blue.

Shape suffixes: I images, N patches, D width, P patches of all images.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

COMPONENTS = 3
AXES = ("shared", "own")  # of the patched model for both, or each model's own
TAILS = 0.02  # this share of the patches at either end of a component has the colour of the end


def colours(features: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Axes -> side -> red, green and blue of every patch, uint8 `[I, N, 3]`.

    With shared axes, equal features have equal colours in both models. With its own, each model shows what its features
    are used for: a few outliers take them all.

    Args:
        features: side -> tokens of the patches of all images, `[I, N, D]`.
    """
    own = {side: _Axes(features_IND) for side, features_IND in features.items()}
    return {
        kind: {side: (own["patched"] if kind == "shared" else own[side])(found) for side, found in features.items()}
        for kind in AXES
    }


class _Axes:
    """The principal components of some features, and the range of each that becomes 0 to 255."""

    def __init__(self, features_IND: Tensor) -> None:
        features_PD = features_IND.flatten(0, 1).double()
        self.mean_D = features_PD.mean(dim=0)
        centred_PD = features_PD - self.mean_D
        _, vectors_DD = torch.linalg.eigh(centred_PD.T @ centred_PD)
        axes_DK = vectors_DD[:, -COMPONENTS:].flip(-1)
        largest_1K = axes_DK.gather(0, axes_DK.abs().argmax(dim=0, keepdim=True))
        self.axes_DK = axes_DK * largest_1K.sign()  # a component's sign is arbitrary: the same one on every machine
        values_PK = (centred_PD @ self.axes_DK).sort(dim=0).values
        last = len(values_PK) - 1
        self.low_K, self.high_K = values_PK[round(TAILS * last)], values_PK[round((1 - TAILS) * last)]

    def __call__(self, features_IND: Tensor) -> Tensor:
        values_INK = (features_IND.double() - self.mean_D) @ self.axes_DK
        shares_INK = (values_INK - self.low_K) / (self.high_K - self.low_K).clamp_min(1e-12)
        levels_INK = (255 * shares_INK).round().clamp(0, 255).byte()
        missing = COMPONENTS - levels_INK.shape[-1]  # of a model that is narrower than three
        return torch.nn.functional.pad(levels_INK, (0, missing))
