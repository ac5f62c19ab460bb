"""Task `knn`: classification by the nearest neighbours of frozen features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regsurgery.errors import UserError
from regsurgery.evaluation.features import add_hits, default_pooling, labelled_features
from regsurgery.evaluation.probe import baseline
from regsurgery.evaluation.result import Result
from regsurgery.interval import Figures
from regsurgery.verification.pair import Pair

if TYPE_CHECKING:
    from regsurgery.images.image_set import ImageSet
    from regsurgery.progress import Progress

NEIGHBOURS = 20
TEMPERATURE = 0.07


def evaluate(
    pair: Pair,
    images: ImageSet,
    *,
    progress: Progress,
    seed: int,
    features: str | None = None,
    block: int = -1,
    train: str | Path | None = None,
    neighbours: int = NEIGHBOURS,
) -> Result:
    """Accuracy of the vote of each image's nearest neighbours by cosine, weighted by exp(cosine / 0.07).

    The neighbours are all other `images` (leave one out), or those of `train`. The protocol is that of Wu et al.,
    Unsupervised Feature Learning via Non-Parametric Instance Discrimination (CVPR 2018), which DINO uses as well.

    Args:
        images: labelled, see `labels.labels_of`.
        features: `cls` or `mean`, see `features.labelled_features`; by default `cls` if there is a class token.
        block: after which block; by default the last.
        neighbours: how many vote; all if there are fewer.

    Raises:
        UserError: the images have no labels, or no class has two and there is no `train`.
    """
    from regsurgery.images.image_set import image_set

    if neighbours < 1:
        raise UserError(f"eval knn: {neighbours} neighbours; give at least one")
    features = features or default_pooling(pair)
    tested, labels_S = labelled_features(pair, images, features, block, progress)
    if train is None:
        if np.bincount(labels_S).max() < 2:
            raise UserError(
                f"{images.note}: every image has a different class, so no neighbour can be right; give at least two of "
                "a class, or other images with --train"
            )
        votes = [vote(of_side_SD, labels_S, None, neighbours) for of_side_SD in tested]
        note = "leave one out"
    else:
        known = image_set(train, say=progress.say)
        knowns, known_labels_S = labelled_features(pair, known, features, block, progress)
        votes = [
            vote(known_SD, known_labels_S, test_SD, neighbours)
            for known_SD, test_SD in zip(knowns, tested, strict=True)
        ]
        note = f"neighbours from {known.note}"
    figures = Figures(seed)
    add_hits(figures, "accuracy", *(voted_S == labels_S for voted_S in votes))
    return Result(figures.rows(), (f"feature {features}; {neighbours} neighbours, {note}; {baseline(labels_S)}",))


def vote(known_SD: np.ndarray, labels_S: np.ndarray, asked_QD: np.ndarray | None, neighbours: int) -> np.ndarray:
    """The class that the nearest of the known images give each query image, `[Q]`.

    Args:
        asked_QD: None: the known images themselves, each without its own vote.
    """
    from sklearn.neighbors import NearestNeighbors

    count = min(neighbours, len(known_SD) - (asked_QD is None))
    distances_QK, nearest_QK = (
        NearestNeighbors(n_neighbors=count, metric="cosine", algorithm="brute").fit(known_SD).kneighbors(asked_QD)
    )
    weights_QK = np.exp(-distances_QK / TEMPERATURE)  # exp(cosine / T) up to a factor: the same order
    votes_QC = np.zeros((len(nearest_QK), labels_S.max() + 1))
    np.add.at(votes_QC, (np.arange(len(nearest_QK))[:, None], labels_S[nearest_QK]), weights_QK)
    return votes_QC.argmax(axis=1)
