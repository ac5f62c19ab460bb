"""Task `foreground`: the patches of an image in two groups without labels, against the boxes of its objects.

Two ways to make them, each of one image alone, on features of length 1:

- `kmeans`: k-means with two clusters, the best of `STARTS` starts. The foreground is the cluster with fewer of the
  patches on the image's edge (of equally many, with fewer patches).
- `ncut`: TokenCut (Wang et al., arXiv 2202.11539): patches with a cosine above `TAU` are joined by 1, others by
  `EPSILON`; the second eigenvector of the normalised cut is divided at its mean, and the foreground is the side of its
  largest absolute value.

The box is drawn around a region of the foreground, connected by patch sides: with `ncut` the one that has that value,
as in TokenCut; with `kmeans` the largest. Both models see images squeezed to the model's own size, as in `segment`,
where `lost` keeps each image's own.

Shape suffixes: B images, N patches, D width, H rows and W columns of patches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from regsurgery.errors import UserError
from regsurgery.evaluation.boxed import BoxedBatch, boxed
from regsurgery.evaluation.discovery import SIDES_ONLY, box_around, found
from regsurgery.evaluation.patch_features import KINDS, checked_kinds, chosen_blocks, feature_observer, patch_features
from regsurgery.evaluation.patch_probe import STARTS
from regsurgery.evaluation.result import Result
from regsurgery.interval import Figures, Values
from regsurgery.verification.observing import Observation
from regsurgery.verification.pair import Pair

if TYPE_CHECKING:
    from regsurgery.images.image_set import ImageSet
    from regsurgery.progress import Progress

TAU, EPSILON = 0.2, 1e-5  # of TokenCut
WHOLE = "whole image"
Divided = tuple[np.ndarray, tuple[int, int]]  # foreground [H, W], row and column of a patch of the region for the box


def evaluate(
    pair: Pair,
    images: ImageSet,
    *,
    progress: Progress,
    seed: int,
    block: Sequence[int] | None = None,
    kind: Sequence[str] = KINDS,
    method: Sequence[str] | None = None,
) -> Result:
    """For every block, kind of feature and method, and for the whole image as foreground:

    - `CorLoc`: the share of images whose box has an IoU of 0.5 or more with one of their objects;
    - `foreground IoU`: of the foreground with all boxes of the image together, in area, mean over the images.

    Args:
        images: `DIR/JPEGImages/NAME.jpg` with objects in `DIR/Annotations/NAME.xml`; images without are left out.
        block: by default each of the last four.
        kind: some of `KINDS`; `tokens` is the stream after the block.
        method: some of `METHODS`; by default all.

    Raises:
        UserError: the images have no annotations, or a setting is not valid.
    """
    blocks, kinds = chosen_blocks(pair, block), checked_kinds("foreground", kind, KINDS)
    methods = tuple(METHODS) if method is None else method
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise UserError(f"eval foreground: there is no method '{unknown[0]}'; choose from {', '.join(METHODS)}")
    observe, figures = feature_observer(pair, blocks, kinds), Figures(seed)
    progress.stage("foreground", images.num_images)
    for batch in boxed(pair, images):
        seen, grid = observe(batch.pixels), pair.original.grid
        values = _values([[(np.ones(grid, dtype=bool), (0, 0))] * len(batch.objects)] * 2, batch, WHOLE)
        for at, feature in itertools.product(blocks, kinds):
            maps = [_unit_features(side, at, feature) for side in seen]
            for name in methods:
                both = [[METHODS[name](each_ND, grid, seed) for each_ND in map_BND] for map_BND in maps]
                values += _values(both, batch, name, at, feature)
        figures.add(len(batch.objects), values)
        progress.advance(len(batch.objects))
    return Result(figures.rows(), num_images=figures.num_images)


def _unit_features(side: Observation, block: int, kind: str) -> np.ndarray:
    return F.normalize(patch_features(side, block, kind).double(), dim=-1).cpu().numpy()


def _values(
    both: Sequence[Sequence[Divided]], batch: BoxedBatch, method: str, block: int | str = "", feature: str = ""
) -> list[tuple[str, Values]]:
    where = (("block", block), ("features", feature), ("method", method))
    hits, new_hits = (torch.tensor([*map(_hit, side, batch.objects)]) for side in both)
    shared, new_shared = (torch.tensor([*map(_iou, side, batch.inside)]) for side in both)
    return [
        ("CorLoc", Values(hits, new_hits, where, is_share=True)),
        ("foreground IoU", Values(shared, new_shared, where)),
    ]


def _hit(divided: Divided, objects_G4: np.ndarray) -> float:
    """1 if the box is on an object, 0 if not; NaN for an image without objects."""
    return float(found(box_around(*divided), objects_G4)) if len(objects_G4) else float("nan")


def _iou(divided: Divided, inside_N: np.ndarray) -> float:
    """Of the foreground with the boxes; NaN for an image without objects."""
    front_N = divided[0].ravel()
    shared = inside_N[front_N].sum()
    return float(shared / (front_N.sum() + inside_N.sum() - shared)) if inside_N.any() else float("nan")


def by_kmeans(features_ND: np.ndarray, grid: tuple[int, int], seed: int) -> Divided:
    from scipy import ndimage
    from sklearn.cluster import KMeans

    clusters: Any = KMeans(2, n_init=STARTS, random_state=seed)  # type: ignore[arg-type]
    second_HW = clusters.fit_predict(features_ND).reshape(grid).astype(bool)
    edge_HW = np.ones(grid, dtype=bool)
    edge_HW[1:-1, 1:-1] = False
    front_HW = min((second_HW, ~second_HW), key=lambda group_HW: ((group_HW & edge_HW).sum(), group_HW.sum()))
    if not front_HW.any():  # k-means found one cluster: all patches are alike
        front_HW = ~front_HW
    labelled: Any = ndimage.label(front_HW, SIDES_ONLY)
    regions_HW = labelled[0]
    largest = np.bincount(regions_HW.ravel())[1:].argmax() + 1
    return front_HW, divmod(int((regions_HW == largest).argmax()), grid[1])


def by_ncut(features_ND: np.ndarray, grid: tuple[int, int], seed: int) -> Divided:
    """It draws nothing by `seed`."""
    from scipy.linalg import eigh

    joined_NN = np.where(features_ND @ features_ND.T > TAU, 1.0, EPSILON)
    degrees_NN = np.diag(joined_NN.sum(axis=1))
    vector_N = eigh(degrees_NN - joined_NN, degrees_NN, subset_by_index=[1, 1])[1][:, 0]
    first = int(np.abs(vector_N).argmax())
    above_N = vector_N > vector_N.mean()
    return (above_N if above_N[first] else ~above_N).reshape(grid), divmod(first, grid[1])


METHODS: dict[str, Callable[[np.ndarray, tuple[int, int], int], Divided]] = {"kmeans": by_kmeans, "ncut": by_ncut}
