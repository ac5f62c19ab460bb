"""The picture of a card: the norms that it was given, the same bytes every time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from regsurgery.emit.picture import GAP, LABEL_WIDTH, MAP_SIDE, PICTURE_NAME, before_after
from regsurgery.verification.verdict import NormMaps


def verdict(original: torch.Tensor, patched: torch.Tensor) -> Any:
    return SimpleNamespace(block=10, norm_maps=NormMaps(original, patched))


@pytest.fixture
def outlier() -> Any:
    """Two images whose patch (0, 0) is an outlier before, and not after."""
    original, patched = torch.full((2, 4, 4), 10.0), torch.full((2, 4, 4), 10.0)
    original[:, 0, 0] = 500
    return verdict(original, patched)


def test_outliers_are_bright_before_and_not_after(outlier: Any, tmp_path: Path) -> None:
    assert before_after(outlier, tmp_path) == PICTURE_NAME
    with Image.open(tmp_path / PICTURE_NAME) as picture:
        corner = (LABEL_WIDTH + 5, GAP + 5)
        brightness = [sum(picture.getpixel(where)) for where in (  # type: ignore[arg-type]
            corner, (corner[0] + MAP_SIDE - 10, corner[1]), (corner[0], corner[1] + MAP_SIDE + GAP))]  # fmt: skip
    assert brightness[0] > 500 and brightness[1] < 100 and brightness[2] < 100


def test_the_same_norms_give_the_same_bytes(outlier: Any, tmp_path: Path) -> None:
    contents = []
    for _ in range(2):
        before_after(outlier, tmp_path)
        contents.append((tmp_path / PICTURE_NAME).read_bytes())
    assert contents[0] == contents[1]
    for chunk in (b"tEXt", b"tIME", b"eXIf", b"iTXt"):
        assert chunk not in contents[0]


def test_norms_of_zero_and_maps_that_are_not_square_are_drawn(tmp_path: Path) -> None:
    before_after(verdict(torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)), tmp_path)
    with Image.open(tmp_path / PICTURE_NAME) as picture:
        assert picture.height < MAP_SIDE


def test_without_maps_nothing_is_drawn(tmp_path: Path) -> None:
    assert before_after(SimpleNamespace(norm_maps=None), tmp_path) is None  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
