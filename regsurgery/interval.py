"""95 % intervals of figures that are means over images, in memory that does not grow with the images.

Means, ratios of sums and paired differences: the Poisson bootstrap, which draws for every image how often each of
`RESAMPLES` imagined samples has it, and keeps sums only. All figures of an evaluation share the draws, so that a
difference between two of them is paired. Shares: Wilson's interval.

Sources: Chamandy et al., Estimating Uncertainty for Massive Data Streams (Google, 2012), for the bootstrap; Wilson,
Probable Inference (JASA 1927).

Shape suffixes: B images of a batch, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

LEVEL = 0.95
RESAMPLES = 2000
MIN_COUNT = 2  # one image says nothing about others


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; `low` and `high` are None if there are fewer than two images.

    Attributes:
        n: number of images (or of runs, if a task says so).
    """

    value: float
    low: float | None
    high: float | None
    n: int

    def as_dict(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


@dataclass(frozen=True)
class Row:
    """One figure of both models; None if a model has no such figure.

    Attributes:
        name: of the figure; `where`: block, head or setting, by name, in the order in which a table shows them.
        difference: patched - original, paired: both models saw the same images.
        unit: "" for a pure number.
        is_detail: one of many, such as a single head's; tables leave it out.
    """

    name: str
    original: Estimate | None
    patched: Estimate | None
    difference: Estimate | None = None
    where: Mapping[str, int | str] = field(default_factory=dict)
    unit: str = ""
    is_detail: bool = False

    def as_dict(self) -> dict[str, Any]:
        estimates = {"original": self.original, "patched": self.patched, "difference": self.difference}
        shown = {key: None if value is None else value.as_dict() for key, value in estimates.items()}
        return {"name": self.name, **({"where": dict(self.where)} if self.where else {}), "unit": self.unit, **shown}


def share(hits: int, count: int) -> Estimate:
    """A share with Wilson's interval.

    Args:
        hits: how many of the `count` images count; `count` is at least 1.
    """
    if count < MIN_COUNT:
        return Estimate(hits / count, None, None, count)
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    shrunk = count + z**2
    centre = (hits + z**2 / 2) / shrunk
    half = z / shrunk * (hits * (count - hits) / count + z**2 / 4) ** 0.5
    low, high = 0.0 if hits == 0 else centre - half, 1.0 if hits == count else centre + half
    return Estimate(hits / count, low, high, count)


def from_resamples(value: float, resampled_R: np.ndarray, count: int) -> Estimate:
    """A figure with known values on resampled images: the percentile interval."""
    known_R = resampled_R[np.isfinite(resampled_R)]
    if count < MIN_COUNT or not len(known_R):
        return Estimate(value, None, None, count)
    low, high = np.quantile(known_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), count)


class _Moments:
    """One model's figure: sums over the images, and over every resample of them."""

    def __init__(self) -> None:
        self.count = 0
        self.total = np.zeros(2)  # numerator, denominator
        self.sums_2R = np.zeros((2, RESAMPLES))
        self.only_0_and_1 = True

    def add(self, weights_RB: np.ndarray, numerator_B: np.ndarray, denominator_B: np.ndarray) -> None:
        both_2B = np.stack([np.where(denominator_B > 0, numerator_B, 0.0), denominator_B])
        self.count += int((denominator_B > 0).sum())
        self.total += both_2B.sum(axis=1)
        self.sums_2R += both_2B @ weights_RB.T
        self.only_0_and_1 &= bool(np.isin(both_2B, (0.0, 1.0)).all())

    @property
    def value(self) -> float:
        return float(self.total[0] / self.total[1])

    def resampled(self) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.sums_2R[0] / self.sums_2R[1]

    def estimate(self, is_share: bool) -> Estimate | None:
        if not self.count:
            return None
        if is_share:
            assert self.only_0_and_1, "a share is made of zeros and ones"
            return share(round(self.total[0]), self.count)
        return from_resamples(self.value, self.resampled(), self.count)


@dataclass(frozen=True)
class Values:
    """One batch of a figure: its value for every image of the batch; None if a model has no such figure.

    Attributes:
        original, patched: `[B]`; NaN if the figure is not defined for an image, which is then left out.
        where, unit, is_detail: as in `Row`.
        is_share: the values are zeros and ones.
        out_of: makes the figure sum(values) / sum(out_of) over the images instead of the mean, `[B]`, for both models.
    """

    original: Tensor | None
    patched: Tensor | None = None
    where: tuple[tuple[str, int | str], ...] = ()
    unit: str = ""
    is_share: bool = False
    is_detail: bool = False
    out_of: Tensor | None = None


class Figures:
    """Figures of an evaluation, summed up batch by batch.

    Args:
        seed: of the resamples; the same seed and batches give the same intervals.
    """

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.num_images = 0
        self._kept: dict[tuple[str, Any], tuple[Values, tuple[_Moments, _Moments]]] = {}

    def add(self, batch_size: int, values: Mapping[str, Values] | list[tuple[str, Values]]) -> None:
        """Add all figures of the next `batch_size` images, by name; call it once a batch.

        Args:
            values: the figures by name; a list of pairs where one name is there for several `where`.
        """
        weights_RB = self.rng.poisson(1.0, (RESAMPLES, batch_size)).astype(np.float64)
        self.num_images += batch_size
        for name, given in values.items() if isinstance(values, Mapping) else values:
            _, sums = self._kept.setdefault((name, given.where), (given, (_Moments(), _Moments())))
            for kept, values_B in zip(sums, (given.original, given.patched), strict=True):
                if values_B is None:
                    continue
                numerator_B = values_B.detach().double().cpu().numpy()
                assert numerator_B.shape == (batch_size,), f"{name}: one value an image, not {numerator_B.shape}"
                out_of_B = np.ones(batch_size) if given.out_of is None else given.out_of.double().cpu().numpy()
                kept.add(weights_RB, numerator_B, np.where(np.isnan(numerator_B), 0.0, out_of_B))

    def rows(self) -> list[Row]:
        """Every figure of both models with their paired difference, in the order in which they were first added."""
        return [self._row(name, given, sums) for (name, _), (given, sums) in self._kept.items()]

    def _row(self, name: str, given: Values, sums: tuple[_Moments, _Moments]) -> Row:
        original, patched = (kept.estimate(given.is_share) for kept in sums)
        difference = None
        if original is not None and patched is not None:
            moved_R = sums[1].resampled() - sums[0].resampled()
            difference = from_resamples(sums[1].value - sums[0].value, moved_R, min(original.n, patched.n))
        return Row(name, original, patched, difference, dict(given.where), given.unit, given.is_detail)
