"""Nearest neighbours, segmentation sums and places of `shift-map` against loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from regsurgery.errors import UserError
from regsurgery.evaluation import patch_probe
from regsurgery.evaluation.knn import TEMPERATURE, vote
from regsurgery.evaluation.masks import IGNORED
from regsurgery.evaluation.shift_map import chosen_patches, extremes_at, in_box

RNG = np.random.default_rng(0)


def naive_vote(known: np.ndarray, labels: np.ndarray, asked: np.ndarray, neighbours: int, skip: bool) -> list[int]:
    chosen = []
    for place, one in enumerate(asked):
        cosines = [float(one @ other / math.hypot(*one) / math.hypot(*other)) for other in known]
        order = sorted((i for i in range(len(known)) if not (skip and i == place)), key=lambda i: -cosines[i])
        weights: dict[int, float] = {}
        for i in order[:neighbours]:
            weights[int(labels[i])] = weights.get(int(labels[i]), 0.0) + math.exp(cosines[i] / TEMPERATURE)
        chosen.append(max(weights, key=weights.__getitem__))
    return chosen


@pytest.mark.parametrize("neighbours", [1, 5, 100])
def test_neighbours_vote_by_weight_and_never_for_themselves(neighbours: int) -> None:
    known, asked = RNG.normal(size=(30, 4)), RNG.normal(size=(9, 4))
    labels = RNG.integers(2, 6, 30)
    assert vote(known, labels, asked, neighbours).tolist() == naive_vote(known, labels, asked, neighbours, False)
    assert vote(known, labels, None, neighbours).tolist() == naive_vote(known, labels, known, neighbours, True)


def test_a_patch_is_of_the_class_of_most_of_its_pixels() -> None:
    mask = np.full((4, 8), IGNORED, dtype=np.uint8)
    mask[:, :4] = 7
    mask[0, :4] = 3
    mask[:2, 4:] = 3
    mask[2, 4] = 7
    assert patch_probe.patch_labels(mask, 4).tolist() == [7, 3], "8 of 16 pixels known are enough"
    mask[:2, 4] = IGNORED
    assert patch_probe.patch_labels(mask, 4).tolist() == [7, IGNORED]


def test_sums_equal_ious_counted_over_all_pixels() -> None:
    """Also that resampled figures bracket the figure, and equal models differ by nothing."""
    truth = RNG.integers(-1, 3, (12, 8, 8))
    patches = RNG.integers(0, 4, (12, 4))  # 2 x 2 patches of 4 pixels; class 3 is never true
    sums = patch_probe.Confusion(4, np.random.default_rng(1))
    for start in (0, 5):
        chosen = slice(start, 5 if start == 0 else None)
        sums.add([patches[chosen], patches[chosen]], truth[chosen], (2, 2), 4)
    shared, either = np.zeros(4), np.zeros(4)
    right = known = 0
    for image in range(12):
        for row in range(8):
            for column in range(8):
                true, given = truth[image, row, column], patches[image, row // 4 * 2 + column // 4]
                if true < 0:
                    continue
                known += 1
                right += true == given
                either[true] += 1
                either[given] += true != given
                shared[true] += true == given
    mean_iou, accuracy = sums.rows()
    assert mean_iou.original is not None and accuracy.original is not None and mean_iou.difference is not None
    np.testing.assert_allclose(mean_iou.original.value, (shared / either).mean())
    np.testing.assert_allclose(accuracy.original.value, right / known)
    np.testing.assert_allclose([each["patched"] for each in sums.ious()], shared / either)
    assert mean_iou.original.low is not None and mean_iou.original.high is not None
    assert mean_iou.original.low < mean_iou.original.value < mean_iou.original.high
    assert (mean_iou.difference.low, mean_iou.difference.high) == (0, 0)


def test_a_class_that_no_image_of_a_resample_has_is_left_out_of_its_mean() -> None:
    sums_SC = np.array([[3.0, 0.0], [4.0, 0.0], [5.0, 0.0]])
    assert patch_probe.mean_iou(sums_SC) == 3 / 6


def test_extremes_go_to_the_places_of_each_image() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 5)
    before = hidden.clone()
    given = extremes_at(hidden, (1, 4), (2, 5), (1, 7))
    expected = before.clone()
    for image in range(3):
        for neuron in (1, 4):
            values = before[image, :, neuron].tolist()
            peak = max(values, key=abs)
            for token in range(1, 7):
                expected[image, token, neuron] = peak if token in (2, 5) else 0.0
    assert torch.equal(given, expected)
    assert torch.equal(hidden, before), "the activation is not written into"


def test_a_box_in_fractions_and_in_pixels() -> None:
    lower_left = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool).flatten()
    assert torch.equal(in_box("0,0.6,0.5,0.4", (96, 64), (3, 4)), lower_left)
    assert torch.equal(in_box("0,64,32,32", (96, 64), (3, 4)), lower_left)
    assert not in_box("0.3,0.3,0.01,0.01", (96, 64), (3, 4)).any()
    with pytest.raises(UserError, match="x,y,w,h"):
        in_box("1,2,3", (96, 64), (3, 4))


def test_places_by_mask(tmp_path: Path) -> None:
    mask = PIL.Image.new("L", (48, 48), 0)
    mask.paste(255, (24, 0, 36, 12))
    mask.save(tmp_path / "mask.png")
    chosen_N = chosen_patches(None, tmp_path / "mask.png", (96, 96), (12, 12))
    assert torch.equal(chosen_N, in_box("0.5,0,0.25,0.25", (96, 96), (12, 12)))
    assert int(chosen_N.sum()) == 9


@pytest.mark.parametrize(
    ("where", "mask", "reason"),
    [
        (None, None, "with either --where x,y,w,h or --mask"),
        ("0,0,0.5,0.5", "mask.png", "with either --where x,y,w,h or --mask"),
        ("0,0,1,1", None, "all patches are in 0,0,1,1"),
        ("0.01,0,0.01,0.01", None, "no patch is in"),
        (None, "absent.png", "absent.png: not a readable mask"),
    ],
)
def test_what_is_no_place(where: Any, mask: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        chosen_patches(where, mask, (96, 96), (12, 12))
