"""Task `probe`: the accuracy of a linear classifier on frozen features, on images that it was not fitted on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regsurgery.errors import UserError
from regsurgery.evaluation.features import add_hits, default_pooling, labelled_features
from regsurgery.evaluation.result import Result
from regsurgery.interval import Figures
from regsurgery.verification.pair import Pair
from regsurgery.verification.verdict_text import share_text

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

    from regsurgery.images.image_set import ImageSet
    from regsurgery.progress import Progress

FOLDS = 5
MAX_STEPS = 1000


def evaluate(
    pair: Pair,
    images: ImageSet,
    *,
    progress: Progress,
    seed: int,
    features: str | None = None,
    block: int = -1,
    train: str | Path | None = None,
) -> Result:
    """Accuracy of a logistic regression on standardised features, on held-out images.

    Cross-validated over `images` in `FOLDS` stratified folds, so each image is held out once; or fitted on the images
    of `train` and tested on all of `images`. The interval treats the fitted classifiers as fixed.

    Args:
        images: labelled, see `labels.labels_of`.
        features: `cls` or `mean`, see `features.labelled_features`; by default `cls` if there is a class token.
        block: after which block; by default the last.

    Raises:
        UserError: the images have no labels or only one class, or a class has a single image and there is no `train`.
    """
    from regsurgery.images.image_set import image_set

    features = features or default_pooling(pair)
    tested, labels_S = labelled_features(pair, images, features, block, progress)
    if train is None:
        folds = _folds(images, labels_S)
        progress.stage("probe")
        hits = [_cross_validated(of_side_SD, labels_S, folds, seed) == labels_S for of_side_SD in tested]
        note = f"{folds} folds"
    else:
        fitting = image_set(train, say=progress.say)
        fitted, train_labels_S = labelled_features(pair, fitting, features, block, progress)
        _check_classes(fitting, train_labels_S)
        progress.stage("probe")
        hits = [
            _classifier().fit(train_SD, train_labels_S).predict(test_SD) == labels_S
            for train_SD, test_SD in zip(fitted, tested, strict=True)
        ]
        note = f"fitted on {fitting.note}"
    figures = Figures(seed)
    add_hits(figures, "accuracy", *hits)
    return Result(figures.rows(), (f"feature {features}; {note}; {baseline(labels_S)}",))


def baseline(labels_S: np.ndarray) -> str:
    """The accuracy of guessing the largest class."""
    counts = np.bincount(labels_S)
    return f"{(counts > 0).sum()} classes, {share_text(int(counts.max()), len(labels_S))} images are of the largest"


def _check_classes(images: ImageSet, labels_S: np.ndarray) -> None:
    if len(np.unique(labels_S)) < 2:
        raise UserError(f"{images.note}: all have class {labels_S[0]}; give images of at least two classes")


def _folds(images: ImageSet, labels_S: np.ndarray) -> int:
    _check_classes(images, labels_S)
    classes, counts = np.unique(labels_S, return_counts=True)
    if counts.min() < 2:
        raise UserError(
            f"{images.note}: class {classes[counts.argmin()]} has one image; give at least two of every class, or "
            "other images to fit on with --train"
        )
    return min(FOLDS, int(counts.min()))


def _cross_validated(features_SD: np.ndarray, labels_S: np.ndarray, folds: int, seed: int) -> np.ndarray:
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return np.asarray(cross_val_predict(_classifier(), features_SD, labels_S, cv=split))


def _classifier() -> Pipeline:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_STEPS))
