"""Probes that classify every patch by its feature alone, and their accuracy.

Shape suffixes: B images, N patches, P sampled patches, D width, C classes, R resamples, S the three sums per class
(shared, predicted, true pixels).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from regsurgery.evaluation.masks import IGNORED, MaskedBatch
from regsurgery.interval import RESAMPLES, Row, from_resamples

MAX_STEPS = 300
STARTS = 4  # starts of k-means; the best is kept
Predict = Callable[[np.ndarray], np.ndarray]  # features [N, D] -> class places [N]


class Samples:
    """Patches that the probes are fitted on: up to `per_image` of each image, labelled with their majority class."""

    def __init__(self, per_image: int, rng: np.random.Generator) -> None:
        self.per_image, self.rng = per_image, rng
        self.features: list[list[np.ndarray]] = [[], []]
        self.labels: list[np.ndarray] = []
        self.numbers: list[np.ndarray] = []
        self.seen = np.zeros(IGNORED + 1, dtype=bool)

    @property
    def count(self) -> int:
        return sum(map(len, self.labels))

    def add(self, features: Sequence[np.ndarray], batch: MaskedBatch, patch: int) -> None:
        for place, (number, mask) in enumerate(zip(batch.numbers, batch.masks, strict=True)):
            self.seen[np.unique(mask)] = True
            labels_N = patch_labels(mask, patch)
            (known,) = np.nonzero(labels_N != IGNORED)
            chosen = self.rng.permutation(known)[: self.per_image]
            self.labels.append(labels_N[chosen])
            self.numbers.append(np.full(len(chosen), number))
            for kept, of_side in zip(self.features, features, strict=True):
                kept.append(of_side[place, chosen])

    def classes(self) -> np.ndarray:
        """The classes in the masks, ascending."""
        return np.flatnonzero(self.seen[:IGNORED])

    def places(self, classes: np.ndarray) -> np.ndarray:
        """Class indices as positions in `classes()`; -1 for ignored ones."""
        table = np.full(IGNORED + 1, -1)
        table[self.classes()] = np.arange(len(self.classes()))
        return table[classes]

    def fit(self, side: int, method: str, folds: int, seed: int) -> Callable[[int], Predict]:
        """Fold -> the predictor for the images of that fold."""
        features_PD = np.concatenate(self.features[side])
        places_P, folds_P = self.places(np.concatenate(self.labels)), np.concatenate(self.numbers) % folds
        if method == "kmeans":
            predict = _clustered(features_PD, places_P, len(self.classes()), seed)
            return lambda fold: predict
        fitted = [_linear(features_PD[folds_P != fold], places_P[folds_P != fold]) for fold in range(folds)]
        return lambda fold: fitted[fold]


def patch_labels(mask: np.ndarray, patch: int) -> np.ndarray:
    """The majority class of each patch's pixels, row by row, `[N]`; `IGNORED` if less than half of them have one."""
    height, width = mask.shape
    tiles_NP = mask.reshape(height // patch, patch, width // patch, patch).swapaxes(1, 2).reshape(-1, patch * patch)
    counts_NC = np.stack([np.bincount(tile, minlength=IGNORED + 1) for tile in tiles_NP])[:, :IGNORED]
    return np.where(2 * counts_NC.sum(axis=1) >= patch * patch, counts_NC.argmax(axis=1), IGNORED)


def _linear(features_PD: np.ndarray, places_P: np.ndarray) -> Predict:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(places_P)) < 2:
        only = places_P[0] if len(places_P) else 0
        return lambda features_ND: np.full(len(features_ND), only)
    fitted: Any = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_STEPS)).fit(features_PD, places_P)
    return fitted.predict


def _clustered(features_PD: np.ndarray, places_P: np.ndarray, num_classes: int, seed: int) -> Predict:
    """k-means; each cluster is assigned one class, so that as many sampled patches as possible are right."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans

    clusters: Any = KMeans(num_classes, n_init=STARTS, random_state=seed)  # type: ignore[arg-type]
    fitted = clusters.fit(features_PD)
    together_CC = np.zeros((num_classes, num_classes))
    np.add.at(together_CC, (fitted.labels_, places_P), 1)
    _, class_of_cluster = linear_sum_assignment(together_CC, maximize=True)
    return lambda features_ND: class_of_cluster[fitted.predict(features_ND)]


class Confusion:
    """Shared, predicted and true pixels of each class, over the images and over every resample of them."""

    def __init__(self, num_classes: int, rng: np.random.Generator) -> None:
        self.rng, self.num_classes, self.num_images = rng, num_classes, 0
        self.totals_SC = [np.zeros((3, num_classes)) for _ in range(2)]
        self.sums_RSC = [np.zeros((RESAMPLES, 3, num_classes)) for _ in range(2)]

    def add(self, predicted: Sequence[np.ndarray], places: np.ndarray, grid: tuple[int, int], patch: int) -> None:
        """Add a batch: predicted class positions `[B, N]` of both models, true ones `[B, H, W]`, -1 for none."""
        weights_RB = self.rng.poisson(1.0, (RESAMPLES, len(places))).astype(np.float64)
        self.num_images += len(places)
        for totals_SC, sums_RSC, of_side in zip(self.totals_SC, self.sums_RSC, predicted, strict=True):
            pixels_BHW = of_side.reshape(-1, *grid).repeat(patch, axis=1).repeat(patch, axis=2)
            pairs = zip(pixels_BHW, places, strict=True)
            counts_BSC = np.stack([pixel_counts(given, true, self.num_classes) for given, true in pairs])
            totals_SC += counts_BSC.sum(axis=0)
            sums_RSC += np.tensordot(weights_RB, counts_BSC, axes=1)

    def ious(self) -> list[dict[str, float]]:
        """IoU of each class, both models."""
        original_C, patched_C = (iou(totals_SC) for totals_SC in self.totals_SC)
        return [{"original": float(o), "patched": float(p)} for o, p in zip(original_C, patched_C, strict=True)]

    def rows(self) -> list[Row]:
        return [self._row("mIoU", mean_iou), self._row("pixel accuracy", pixel_accuracy)]

    def _row(self, name: str, figure: Callable[[np.ndarray], np.ndarray]) -> Row:
        values = [float(figure(totals_SC)) for totals_SC in self.totals_SC]
        resampled = [figure(sums_RSC) for sums_RSC in self.sums_RSC]
        original, patched = (
            from_resamples(value, resampled_R, self.num_images)
            for value, resampled_R in zip(values, resampled, strict=True)
        )
        difference = from_resamples(values[1] - values[0], resampled[1] - resampled[0], self.num_images)
        return Row(name, original, patched, difference)


def pixel_counts(predicted_HW: np.ndarray, true_HW: np.ndarray, num_classes: int) -> np.ndarray:
    """Shared, predicted and true pixels of each class, `[3, C]`, where the true class is known."""
    known = true_HW >= 0
    predicted, true = predicted_HW[known], true_HW[known]
    return np.stack([np.bincount(of, minlength=num_classes) for of in (true[predicted == true], predicted, true)])


def iou(sums_SC: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, `[..., C]`; NaN for a class that is neither present nor predicted."""
    shared, predicted, true = np.moveaxis(sums_SC, -2, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return shared / (predicted + true - shared)


def mean_iou(sums_SC: np.ndarray) -> np.ndarray:
    """The mean over the classes that are present or predicted, `[...]`."""
    ious_C = iou(sums_SC)
    known_C = ~np.isnan(ious_C)
    with np.errstate(invalid="ignore"):
        return np.where(known_C, ious_C, 0.0).sum(axis=-1) / known_C.sum(axis=-1)


def pixel_accuracy(sums_SC: np.ndarray) -> np.ndarray:
    """The share of correct pixels among those with a known class, `[...]`."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums_SC[..., 0, :].sum(axis=-1) / sums_SC[..., 2, :].sum(axis=-1)
