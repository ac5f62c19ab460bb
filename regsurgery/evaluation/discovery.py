"""LOST: one box per image from the similarities of its patches, for a whole batch and several biases at once.

Simeoni et al., Localizing Objects with Self-Supervised Transformers and no Labels, arXiv 2109.14279, section 3. The
bias is that of Jiang et al., arXiv 2506.08010: added to every similarity, so that fewer patches count as similar.

Shape suffixes: B batch, N patches, D width, G objects of one image. Boxes are `[left, top, right, bottom]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SEED_NEIGHBOURS = 100  # k of LOST: this many patches of lowest degree may help the seed to grow
MIN_IOU = 0.5
SIDES_ONLY = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]])


def boxes(features_BND: Tensor, height: int, width: int, biases: Sequence[float]) -> np.ndarray:
    """The box that LOST draws in each image under each bias, int64 `[len(biases), B, 4]`, in patches.

    Args:
        features_BND: one feature per patch, row by row, N = height x width; normalised to length 1 here.
    """
    unit_BND = F.normalize(features_BND.float(), dim=-1)
    similarity_BNN = unit_BND @ unit_BND.transpose(1, 2)
    return np.stack([_boxes(similarity_BNN + bias, height, width) for bias in biases])


def _boxes(similarity_BNN: Tensor, height: int, width: int) -> np.ndarray:
    """`[B, 4]`, from similarities with their bias added."""
    batch = len(similarity_BNN)
    seed_B1, similar_BN = seeds(similarity_BNN)
    votes_BN = (similar_BN[:, None].to(similarity_BNN) @ similarity_BNN)[:, 0]
    mask_BHW = (votes_BN > 0).reshape(batch, height, width).cpu().numpy()
    return np.stack(
        [box_around(mask_HW, divmod(int(seed), width)) for mask_HW, seed in zip(mask_BHW, seed_B1, strict=True)]
    )


def seeds(similarity_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """The seed patch of each image, `[B, 1]`, and which patches grow it, bool `[B, N]`.

    The seed is the patch that is similar (above 0) to the fewest others, the first of several; the `SEED_NEIGHBOURS` of
    lowest degree that are similar to it grow it, the seed itself among them.
    """
    similar_BNN = similarity_BNN > 0
    degree_BN = similar_BNN.sum(dim=-1) - similar_BNN.diagonal(dim1=1, dim2=2).long()
    lowest_BK = degree_BN.argsort(dim=1, stable=True)[:, :SEED_NEIGHBOURS]
    seed_B1 = lowest_BK[:, :1]
    to_seed_BN = similar_BNN.take_along_dim(seed_B1[:, :, None], dim=1)[:, 0]
    eligible_BN = torch.zeros_like(to_seed_BN).scatter(1, lowest_BK, True)
    return seed_B1, to_seed_BN & eligible_BN


def box_around(mask_HW: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    """The box around the region of `mask_HW`, connected by patch sides, that has the seed; else around the seed."""
    from scipy import ndimage

    labelled: Any = ndimage.label(mask_HW, SIDES_ONLY)
    regions_HW = labelled[0]
    row, column = seed
    if regions_HW[row, column] == 0:
        return np.array([column, row, column + 1, row + 1])
    rows, columns = np.nonzero(regions_HW == regions_HW[row, column])
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def ious(box_4: np.ndarray, objects_G4: np.ndarray) -> np.ndarray:
    """Intersection over union of one box with each object, `[G]`."""
    sides_G2 = np.minimum(box_4[2:], objects_G4[:, 2:]) - np.maximum(box_4[:2], objects_G4[:, :2])
    shared_G = sides_G2.clip(min=0).prod(axis=1)
    areas_G = (objects_G4[:, 2:] - objects_G4[:, :2]).prod(axis=1)
    return shared_G / ((box_4[2:] - box_4[:2]).prod() + areas_G - shared_G)


def found(box_4: np.ndarray, objects_G4: np.ndarray) -> bool:
    """Whether the box counts for CorLoc: an IoU of `MIN_IOU` or more with one of the objects."""
    return bool((ious(box_4, objects_G4) >= MIN_IOU).any())
