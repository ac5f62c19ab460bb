"""Task `correspondence`: is a patch found again in another view of the same image, by its feature alone?

The other view is the image under a known map, so that the ground truth is exact and needs no labels: a random
homography, as HPatches has them (Balntas et al., CVPR 2017; here each corner of the view lies up to `MAX_MOVE` of the
side inside the image, so that everything in the view is in the image), or a mirror image. A patch of the view is
matched to the patch of the image with the largest cosine. PCK is the share of patches whose match is near enough to
where the view's patch comes from (Yang and Ramanan, TPAMI 2013): within one side of a patch, which an ideal match
always reaches, or within a tenth of the image's longer side, as usual for semantic matching.

Shape suffixes: B images, N patches, D width, P points. Points are (x, y), from 0 to 1 over the image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regsurgery.compiler.outliers import outliers, token_norms
from regsurgery.errors import UserError
from regsurgery.evaluation.patch_features import KINDS, checked_kinds, chosen_blocks, feature_observer, patch_features
from regsurgery.evaluation.result import Result
from regsurgery.interval import Figures, Values
from regsurgery.verification.pair import Pair

if TYPE_CHECKING:
    from regsurgery.images.image_set import ImageSet
    from regsurgery.progress import Progress

WARPS = ("homography", "mirror")
MAX_MOVE = 0.25  # of the side
WITHIN_SIDE = 0.1  # of the image's longer side
SLACK = 1e-6  # of a patch's side, for distances that equal the bound
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
MIRROR = np.array([[-1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


def evaluate(
    pair: Pair,
    images: ImageSet,
    *,
    progress: Progress,
    seed: int,
    block: Sequence[int] | None = None,
    kind: Sequence[str] = KINDS,
    warp: Sequence[str] = WARPS,
) -> Result:
    """For every block, kind of feature and warp:

    - `PCK, one patch` and `PCK, a tenth`: of all patches of the view;
    - `PCK, outlier patches`: within one patch, of those patches of the view that are outliers in the original (after
      the last block but one, above 5 times the median). It is the same patches for both models.

    Args:
        block: by default each of the last four.
        kind: some of `KINDS`; `tokens` is the stream after the block.
        warp: some of `WARPS`. Each image has its own homography, drawn by `seed`.

    Raises:
        UserError: a setting is not valid.
    """
    blocks, kinds = chosen_blocks(pair, block), checked_kinds("correspondence", kind, KINDS)
    unknown = sorted(set(warp) - set(WARPS))
    if unknown:
        raise UserError(f"eval correspondence: there is no warp '{unknown[0]}'; choose from {', '.join(WARPS)}")
    observe = feature_observer(pair, blocks, kinds)
    probe, (rows, columns) = pair.sites.probe_block, pair.original.grid
    rng, figures = np.random.default_rng(seed), Figures(seed)
    progress.stage("correspondence", images.num_images)
    for batch in pair.batches(images):
        seen, values = observe(batch.pixels), []
        for name in warp:
            maps_B33 = homographies(len(batch.pixels), rng) if name == "homography" else MIRROR[None]
            viewed = observe(view(batch.pixels, maps_B33))
            outlier_BN = outliers(token_norms(viewed[0].patches(probe))).double()
            true_BN2 = mapped(maps_B33, centres(rows, columns))
            for at, feature in itertools.product(blocks, kinds):
                where = (("block", at), ("features", feature), ("warp", name))
                both = [
                    distances(patch_features(there, at, feature), patch_features(here, at, feature), true_BN2, columns)
                    for there, here in zip(viewed, seen, strict=True)
                ]
                values += _values(both, outlier_BN.to(both[0].device), max(rows, columns), where)
        figures.add(len(batch.pixels), values)
        progress.advance(len(batch.pixels))
    return Result([row for row in figures.rows() if row.original is not None])


def _values(both: Sequence[Tensor], outlier_BN: Tensor, longer: int, where: tuple) -> list[tuple[str, Values]]:
    """The figures of one setting, from both models' distances `[B, N]`."""
    before, after = ((distance_BN <= 1 + SLACK).double() for distance_BN in both)
    far_before, far_after = ((distance_BN <= WITHIN_SIDE * longer + SLACK).double() for distance_BN in both)
    hits_B, new_hits_B = ((near_BN * outlier_BN).sum(dim=1) for near_BN in (before, after))
    return [
        ("PCK, one patch", Values(before.mean(dim=1), after.mean(dim=1), where)),
        ("PCK, a tenth", Values(far_before.mean(dim=1), far_after.mean(dim=1), where, is_detail=True)),
        ("PCK, outlier patches", Values(hits_B, new_hits_B, where, out_of=outlier_BN.sum(dim=1))),
    ]


def homographies(count: int, rng: np.random.Generator) -> np.ndarray:
    """Random maps from a view to its image, `[count, 3, 3]`: each corner is moved inwards, along both axes."""
    moves_B42 = MAX_MOVE * rng.random((count, 4, 2))
    return np.stack([homography(CORNERS + moves_42 * (1 - 2 * CORNERS)) for moves_42 in moves_B42])


def homography(to_42: np.ndarray) -> np.ndarray:
    """The projective map `[3, 3]` that takes `CORNERS` to four points."""
    equations, right = [], []
    for (x, y), (u, v) in zip(CORNERS, to_42, strict=True):
        equations += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        right += [u, v]
    return np.append(np.linalg.solve(np.array(equations), np.array(right)), 1.0).reshape(3, 3)


def centres(rows: int, columns: int) -> np.ndarray:
    """The middles of the cells of a grid, row by row, `[rows * columns, 2]`."""
    y, x = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=1)


def mapped(maps_B33: np.ndarray, points_P2: np.ndarray) -> Tensor:
    """The points under each map, float64 `[B, P, 2]`."""
    homogeneous_P3 = np.append(points_P2, np.ones((len(points_P2), 1)), axis=1)
    found_BP3 = homogeneous_P3 @ maps_B33.swapaxes(1, 2)
    return torch.from_numpy(found_BP3[..., :2] / found_BP3[..., 2:])


def view(pixels_B3HW: Tensor, maps_B33: np.ndarray) -> Tensor:
    """The images as each map's view shows them, bilinear, of the same size."""
    batch, _, height, width = pixels_B3HW.shape
    places = (2 * mapped(maps_B33, centres(height, width)) - 1).float().to(pixels_B3HW.device)
    grid = places.reshape(-1, height, width, 2).expand(batch, -1, -1, -1)
    seen = F.grid_sample(pixels_B3HW.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return seen.to(pixels_B3HW.dtype)


def distances(view_BND: Tensor, image_BND: Tensor, true_BN2: Tensor, columns: int) -> Tensor:
    """How far each patch's match is from where it comes from, in sides of a patch, float64 `[B, N]`.

    Args:
        view_BND, image_BND: features of the view's and of the image's patches.
        true_BN2: where in the image the middle of each of the view's patches is; of one map for all images, or of each.
    """
    similarity_BNN = F.normalize(view_BND.float(), dim=-1) @ F.normalize(image_BND.float(), dim=-1).transpose(1, 2)
    match_BN = similarity_BNN.argmax(dim=-1)
    rows = image_BND.shape[1] // columns
    match_BN2 = torch.from_numpy(centres(rows, columns)).to(match_BN.device)[match_BN]
    apart_BN2 = (match_BN2 - true_BN2.to(match_BN.device)) * torch.tensor([columns, rows], device=match_BN.device)
    return apart_BN2.norm(dim=-1)
