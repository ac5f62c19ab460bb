"""Intervals, Moran's I, labels and the count of live bytes, against closed forms and counts by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from regsurgery.errors import UserError
from regsurgery.evaluation.attention import morans_i
from regsurgery.evaluation.labels import labels_of
from regsurgery.evaluation.latency import _LiveBytes
from regsurgery.evaluation.result import number
from regsurgery.images.image_set import image_set
from regsurgery.interval import Figures, Row, Values, share


def estimated(
    original: Tensor, patched: Tensor | None = None, *, batch: int = 16, seed: int = 0, **options: Any
) -> Row:
    """The row of one figure that was added batch by batch."""
    figures = Figures(seed)
    out_of = options.pop("out_of", None)
    for start in range(0, len(original), batch):
        part = slice(start, start + batch)
        denominators = None if out_of is None else out_of[part]
        after = None if patched is None else patched[part]
        figures.add(len(original[part]), {"figure": Values(original[part], after, out_of=denominators, **options)})
    (row,) = figures.rows()
    return row


def normal(seed: int, count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = 7 + 3 * normal(0, 400)
    found = estimated(values).original
    assert found is not None and found.low is not None and found.high is not None
    half = 1.96 * float(values.std()) / math.sqrt(len(values))
    assert found.value == pytest.approx(float(values.mean()), abs=1e-12)
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.12 * half)
    assert found.n == 400


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    held = 0
    for seed in range(200):
        found = estimated(normal(seed, 40), batch=40, seed=seed).original
        assert found is not None and found.low is not None and found.high is not None
        held += found.low <= 0 <= found.high
    assert 0.90 <= held / 200 <= 0.99  # 0.95 and three standard errors of 200 trials


def test_a_paired_difference_is_narrower_than_two_intervals() -> None:
    original = 10 * normal(0, 100)
    row = estimated(original, original + 1 + 0.1 * normal(1, 100))
    assert row.original is not None and row.difference is not None
    assert row.original.low is not None and row.original.high is not None
    assert row.difference.low is not None and row.difference.high is not None
    assert row.difference.value == pytest.approx(1, abs=0.05)
    assert row.difference.high - row.difference.low < 0.05 < row.original.high - row.original.low
    assert row.difference.low > 0.9


def test_a_ratio_of_sums_is_no_mean_of_ratios() -> None:
    hits, counts = torch.tensor([1.0, 0.0, 8.0]), torch.tensor([1.0, 0.0, 10.0])
    found = estimated(hits, out_of=counts).original
    assert found is not None and found.value == pytest.approx(9 / 11)
    assert found.n == 2  # the image without any has no say


def test_undefined_values_are_left_out() -> None:
    found = estimated(torch.tensor([1.0, float("nan"), 3.0])).original
    assert found is not None and (found.value, found.n) == (2.0, 2)


def test_batches_do_not_change_a_figure_and_the_seed_its_interval() -> None:
    values = normal(0, 50)
    one, other, again = estimated(values, batch=50), estimated(values, batch=7), estimated(values, batch=7)
    assert one.original is not None and other.original is not None
    assert one.original.value == pytest.approx(other.original.value, abs=1e-12)
    assert other == again
    assert estimated(values, batch=7, seed=1) != again


def test_of_one_image_there_is_no_interval() -> None:
    found = estimated(torch.tensor([4.0])).original
    assert found is not None and (found.value, found.low, found.high) == (4.0, None, None)


@pytest.mark.parametrize(("hits", "count"), [(141, 175), (0, 20), (20, 20), (1, 3)])
def test_a_share_has_wilsons_interval(hits: int, count: int) -> None:
    z, p = 1.959963984540054, hits / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    values = torch.cat([torch.ones(hits), torch.zeros(count - hits)])
    for found in (share(hits, count), estimated(values, is_share=True).original):
        assert found is not None and found.low is not None and found.high is not None
        assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-9)


def test_morans_i() -> None:
    checkerboard = torch.tensor([[(row + column) % 2 for column in range(6)] for row in range(4)]).float()
    assert float(morans_i(checkerboard)) == pytest.approx(-1)
    halves = torch.cat([torch.zeros(4, 3), torch.ones(4, 3)], dim=1)
    pairs, unlike = 4 * 5 + 3 * 6, 4  # each pair of unlike neighbours has the product -1/4, each other +1/4
    assert float(morans_i(halves)) == pytest.approx((pairs - 2 * unlike) / pairs)
    assert math.isnan(float(morans_i(torch.ones(3, 3))))
    noise = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0))
    assert morans_i(noise).tolist() == pytest.approx([brute_force(one.numpy()) for one in noise])


def brute_force(values: np.ndarray) -> float:
    cells = list(np.ndindex(values.shape))
    centred = values.astype(np.float64) - values.mean(dtype=np.float64)
    neighbours = [(a, b) for a in cells for b in cells if abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1]
    products = sum(centred[a] * centred[b] for a, b in neighbours)
    return float(len(cells) / len(neighbours) * products / (centred**2).sum())


def test_live_bytes_have_the_peak_of_what_is_alive_together() -> None:
    x = torch.zeros(1000)  # not counted: it was there before
    with _LiveBytes() as counted:
        y = x + 1
        y = y * 2  # two of 4000 bytes for a moment
        y += 1
        z = y.view(10, 100)
        w = torch.cat([z, z])  # 4000 and 8000
        del y, z, w
    assert (counted.peak, counted.now) == (12000, 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (546.02, "546.0"), (-0.0286, "-0.0286"), (27.921, "27.92"), (3.25, "3.250"), (4e-5, "4e-05")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def files(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    return root


def label_list(where: Path, num_classes: int | None, names: dict[str, int] | None = None) -> list[int]:
    return list(labels_of(image_set(where), num_classes, names).values())


def test_labels_come_from_file_names_or_folders(tmp_path: Path) -> None:
    numbered = files(tmp_path / "numbered", "0013_a.jpg", "0002_b.jpg", "7_c.jpg", "0013_d.jpg")
    assert label_list(numbered, 20) == [2, 13, 13, 7]
    folders = files(tmp_path / "folders", "3/a.jpg", "3/b.jpg", "11/a.jpg", "11/b.jpg")
    assert label_list(folders, 20) == [11, 11, 3, 3]
    named = files(tmp_path / "named", "cat/a.jpg", "cat/b.jpg", "dog/a.jpg", "dog/b.jpg")
    assert label_list(named, 20, {"dog": 4, "cat": 9}) == [9, 9, 4, 4]
    assert label_list(named, 2) == label_list(named, None) == [0, 0, 1, 1]
    with pytest.raises(UserError, match="no labels"):
        label_list(named, 20)
    with pytest.raises(UserError, match=r"0013_a\.jpg: has class 13, but there are 10"):
        label_list(numbered, 10)


def test_wilsons_interval_is_scipys() -> None:
    from scipy import stats

    for count in (2, 3, 30, 175, 50_000):
        for hits in {0, 1, count // 3, count - 1, count}:
            found, theirs = share(hits, count), stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
            assert (found.value, found.n) == (hits / count, count)
            assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_a_share_of_one_image_has_no_interval() -> None:
    assert (share(1, 1).low, share(0, 1).high) == (None, None)


def test_intervals_need_no_scipy() -> None:
    block = "import sys; sys.modules['scipy'] = None"
    code = f"{block}; from regsurgery.interval import share; print(share(3, 4).n)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "4\n"
