"""Correspondences, foregrounds and rollout on features and attention whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

import scipy.linalg

from benchmarks import dense
from regsurgery.evaluation import boxed, correspondence, foreground, rollout
from regsurgery.options import CorrespondenceOptions

ROWS, COLUMNS = 8, 10
ROOT = Path(__file__).parents[2]


def codes(points_BP2: Tensor) -> Tensor:
    """A feature for each place, the more alike the nearer: a place's identity, wherever it is seen."""
    spots = torch.from_numpy(correspondence.centres(24, 24))
    return torch.exp(-40 * (points_BP2[..., None, :] - spots).square().sum(dim=-1))


@pytest.fixture(scope="module")
def homographies() -> np.ndarray:
    return correspondence.homographies(5, np.random.default_rng(0))


def test_a_homography_takes_the_corners_where_it_must() -> None:
    corners = np.array([[0.1, 0.0], [0.8, 0.2], [1.0, 0.9], [0.25, 0.75]])
    found = correspondence.mapped(correspondence.homography(corners)[None], correspondence.CORNERS)[0]
    np.testing.assert_allclose(found, corners, atol=1e-12)
    assert torch.equal(correspondence.mapped(np.eye(3)[None], corners)[0], torch.from_numpy(corners))


def test_views_lie_in_their_images_and_differ(homographies: np.ndarray) -> None:
    corners_B42 = correspondence.mapped(homographies, correspondence.CORNERS)
    moved_B42 = (corners_B42 - torch.from_numpy(correspondence.CORNERS)).abs()
    assert (corners_B42 >= 0).all() and (corners_B42 <= 1).all()
    assert moved_B42.min() > 0 and 0.2 < moved_B42.max() <= correspondence.MAX_MOVE
    assert len({tuple(each.flatten().tolist()) for each in corners_B42}) == 5


def test_a_view_shows_what_the_map_says(homographies: np.ndarray) -> None:
    """On a picture that is its own coordinates the view is the true places; mirrored, it is `flip`."""
    places_P2 = correspondence.centres(40, 60)
    picture = torch.from_numpy(places_P2).float().reshape(1, 40, 60, 2).permute(0, 3, 1, 2)
    picture = torch.cat([picture, picture[:, :1] * picture[:, 1:]], dim=1).expand(5, -1, -1, -1)
    seen = correspondence.view(picture, homographies)[:, :2].flatten(2).transpose(1, 2)
    true = correspondence.mapped(homographies, places_P2)
    inner = ((true > 0.5 / 40) & (true < 1 - 0.5 / 40)).all(dim=-1)  # outside, there is no pixel on one side
    assert inner.float().mean() > 0.9
    torch.testing.assert_close(seen[inner].double(), true[inner], atol=1e-5, rtol=0)
    torch.testing.assert_close(correspondence.view(picture, correspondence.MIRROR[None]), picture.flip(-1))


def test_features_that_go_with_the_content_are_found_and_those_of_the_place_are_not(homographies: np.ndarray) -> None:
    here = torch.from_numpy(correspondence.centres(ROWS, COLUMNS))[None]
    true = correspondence.mapped(homographies, here[0].numpy())
    image = codes(here).expand(5, -1, -1)
    by_content = correspondence.distances(codes(true), image, true, COLUMNS)
    assert (by_content <= 0.5**0.5 + 1e-6).all(), "half a diagonal: the nearest patch"
    by_place = correspondence.distances(image, image, true, COLUMNS)
    np.testing.assert_allclose(by_place, ((here - true) * torch.tensor([COLUMNS, ROWS])).norm(dim=-1))
    assert (by_place <= 1).double().mean() < 0.5
    mirrored = correspondence.mapped(correspondence.MIRROR[None], here[0].numpy())
    assert (correspondence.distances(codes(mirrored), codes(here), mirrored, COLUMNS) < 1e-9).all()
    stayed = correspondence.distances(codes(here), codes(here), mirrored, COLUMNS).reshape(ROWS, COLUMNS)
    np.testing.assert_allclose(stayed, np.abs(2 * np.arange(COLUMNS) + 1 - COLUMNS)[None].repeat(ROWS, axis=0))


def test_pck_counts_patches_within_the_bounds_and_those_that_were_outliers() -> None:
    distance_BN = torch.tensor([[0.0, 1.0, 1.2, 3.0], [0.5, 0.5, 2.0, 9.0]])
    outlier_BN = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    found = dict(correspondence._values([distance_BN, distance_BN], outlier_BN, longer=12, where=()))

    def of(name: str) -> list[float]:
        value = found[name].original
        assert value is not None
        return value.tolist()

    assert of("PCK, one patch") == [0.5, 0.5]
    assert of("PCK, a tenth") == [0.75, 0.5]
    outliers = found["PCK, outlier patches"]
    assert of("PCK, outlier patches") == [1, 0] and outliers.out_of is not None
    assert outliers.out_of.tolist() == [2, 1]


def blobs(noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Features `[N, D]` of an object, a smaller one of its kind and a background, and where the objects are."""
    inside = np.zeros((ROWS, COLUMNS), dtype=bool)
    inside[2:6, 3:8] = inside[:2, 9] = True
    features = np.where(inside[..., None], [0.1, 1.0, 0.0], [1.0, 0.0, 0.1]).reshape(-1, 3)
    features += noise * np.random.default_rng(0).normal(size=features.shape)
    return features / np.linalg.norm(features, axis=1, keepdims=True), inside


@pytest.mark.parametrize("method", list(foreground.METHODS))
def test_an_object_is_divided_from_its_background(method: str) -> None:
    features, inside = blobs(0.05)
    divided = foreground.METHODS[method](features, (ROWS, COLUMNS), 0)
    assert np.array_equal(divided[0], inside), "the smaller group is the foreground, whatever its number"
    larger, smaller = [3, 2, 8, 6], [9, 0, 10, 2]  # which for ncut have one value, so that rounding chooses
    assert foreground.box_around(*divided).tolist() in ([larger, smaller] if method == "ncut" else [larger])


def test_the_foreground_of_kmeans_is_what_touches_the_edge_less() -> None:
    """Also where it is the larger group; with that of the corners its box would be another."""
    frame = np.ones((ROWS, COLUMNS), dtype=bool)
    frame[1:-1, 1:-1] = False
    features = np.where(frame[..., None], [1.0, 0.0], [0.0, 1.0]).reshape(-1, 2)
    front, seed = foreground.by_kmeans(features, (ROWS, COLUMNS), 0)
    assert np.array_equal(front, ~frame) and front.sum() > frame.sum()
    assert foreground.box_around(front, seed).tolist() == [1, 1, COLUMNS - 1, ROWS - 1]


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_an_image_of_one_cluster_is_all_foreground() -> None:
    front, seed = foreground.by_kmeans(np.ones((ROWS * COLUMNS, 4)), (ROWS, COLUMNS), 0)
    assert front.all() and seed == (0, 0)


def test_a_setting_that_is_given_twice_is_measured_once() -> None:
    given = CorrespondenceOptions(block=[8, 8, 11], warp=("mirror", "mirror"), kind=())
    assert given.settings == {"block": [8, 11], "warp": ["mirror"]}


def test_the_sign_of_an_eigenvector_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    features, inside = blobs(0.05)
    eigh: Any = scipy.linalg.eigh
    for sign in (1, -1):
        monkeypatch.setattr(scipy.linalg, "eigh", lambda *given, sign=sign, **how: (0, sign * eigh(*given, **how)[1]))
        assert np.array_equal(foreground.by_ncut(features, (ROWS, COLUMNS), 0)[0], inside)


def test_no_patch_moved_to_the_other_side_makes_a_smaller_normalised_cut() -> None:
    features, _ = blobs(0.05)
    joined = np.where(features @ features.T > foreground.TAU, 1.0, foreground.EPSILON)
    front = foreground.by_ncut(features, (ROWS, COLUMNS), 0)[0].ravel()

    def cut(group: np.ndarray) -> float:
        across = joined[group][:, ~group].sum()
        return across / joined[group].sum() + across / joined[~group].sum()

    others = [front ^ (np.arange(front.size) == one) for one in range(front.size)]
    assert all(cut(front) < cut(other) for other in others)


def test_foregrounds_are_scored_against_all_boxes_and_boxes_against_one() -> None:
    objects = np.array([[3.0, 2.0, 8.0, 6.0], [0.0, 0.0, 1.0, 1.0]])
    inside = boxed.covered(objects, (ROWS, COLUMNS), 4)
    _, mask = blobs(0)
    assert inside.sum() == 21 and foreground._iou((mask, (2, 3)), inside) == 20 / (22 + 21 - 20)
    assert foreground._hit((mask, (2, 3)), objects) == 1 and foreground._hit((mask, (0, 9)), objects) == 0
    nothing = np.zeros((0, 4))
    assert np.isnan(foreground._hit((mask, (2, 3)), nothing)) and np.isnan(foreground._iou((mask, (2, 3)), 0 * inside))


def test_a_patch_is_covered_in_part_and_once() -> None:
    boxes = np.array([[0.5, 0.0, 2.0, 1.0], [1.0, 0.0, 2.0, 0.25]])
    assert boxed.covered(boxes, (2, 3), 4).tolist() == [0.5, 1, 0, 0, 0, 0]
    assert rollout._middles(np.array([[0.4, 0.0, 1.5, 0.6]]), 2, 3).tolist() == [1, 0, 0, 0, 0, 0]
    assert rollout._middles(np.zeros((0, 4)), 2, 3).tolist() == [0] * 6


def seen(
    attention: list[Tensor], patches: slice, registers: slice, attended: slice | None = None, class_token: bool = True
) -> Any:
    subject = SimpleNamespace(
        num_blocks=len(attention),
        has_class_token=class_token,
        attended_registers=registers if attended is None else attended,
        side=SimpleNamespace(patches=patches, registers=registers),
    )
    return SimpleNamespace(subject=subject, attention=attention.__getitem__)


def drawn(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, 3, size, size, generator=generator).softmax(dim=-1) for size in sizes]


@pytest.mark.parametrize("class_token", [True, False])
def test_rollout_is_the_product_over_the_blocks(class_token: bool) -> None:
    attention = drawn(7, 7, 7)
    product = torch.eye(7)
    for block in attention:
        product = (block.mean(dim=1) + torch.eye(7)) / 2 @ product
    expected = product[:, 0] if class_token else product[:, 1:5].mean(dim=1)
    looked = seen(attention, slice(1, 5), slice(5, 7), class_token=class_token)
    row = rollout.rolled_out(looked, 0)
    torch.testing.assert_close(row.float(), expected)
    map_BN, registers_B = rollout.split(looked, row)
    torch.testing.assert_close(map_BN.float(), expected[:, 1:5])
    torch.testing.assert_close(registers_B.float(), expected[:, 5:].sum(dim=1))
    if class_token:
        torch.testing.assert_close(rollout.rolled_out(looked, 2).float(), attention[2].mean(dim=1)[:, 0])


def test_what_goes_to_a_constant_key_stays_there() -> None:
    """As if the key were a token that attends to itself alone; the first block has no such key."""
    attention = drawn(5, 6, 6)
    product = torch.eye(6)
    for block in attention:
        flow = torch.eye(6).repeat(2, 1, 1)
        size = block.shape[-1]
        flow[:, :size, :size] = block.mean(dim=1)
        flow[:, 5] = torch.eye(6)[5]
        product = (flow + torch.eye(6)) / 2 @ product
    looked = seen(attention, slice(1, 5), slice(5, 5), attended=slice(5, 6))
    map_BN, constant_B = rollout.split(looked, rollout.rolled_out(looked, 0))
    torch.testing.assert_close(map_BN.float(), product[:, 0, 1:5])
    torch.testing.assert_close(constant_B.float(), product[:, 0, 5])


def test_the_documented_figures_are_the_recorded_ones() -> None:
    recorded = json.loads((ROOT / "benchmarks" / "dense.json").read_text("utf-8"))
    lines = [line for of_folders in recorded.values() for line in dense.table(of_folders)]
    page = (ROOT / "docs" / "evaluation.md").read_text("utf-8").split("\n")
    names = {name for of_folders in recorded.values() for found in of_folders.values() for name in found["figures"]}
    shown = [line for line in page if line.startswith("| ") and line.split("|")[1].strip() in names]
    assert len(shown) == 17 + 8 + 16 and set(shown) <= set(lines)
    assert page.count(lines[0]) == 3
