"""LOST against loops written from the paper, VOC annotations, and features read off models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from regsurgery.errors import UnsupportedModelError, UserError
from regsurgery.evaluation import discovery, own_size, voc
from regsurgery.sites import Block

HEIGHT, WIDTH, BIASES = 9, 13, (0.0, -0.2, -0.4)


def naive_box(features_ND: Tensor, height: int, width: int, bias: float, neighbours: int) -> list[int]:
    """LOST for one image, patch by patch, with a flood fill."""
    units = [feature / feature.norm() for feature in features_ND.double()]
    patches = range(len(units))
    similar = [[float(units[i] @ units[j]) + bias for j in patches] for i in patches]
    degrees = [sum(similar[i][j] > 0 for j in patches if j != i) for i in patches]
    order = sorted(patches, key=lambda i: degrees[i])  # stable
    seed = order[0]
    grown = [i for i in order[:neighbours] if similar[seed][i] > 0]
    inside = {j for j in patches if sum(similar[i][j] for i in grown) > 0}
    region, work = {seed}, [seed] if seed in inside else []
    while work:
        row, column = divmod(work.pop(), width)
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            patch = r * width + c
            if 0 <= r < height and 0 <= c < width and patch in inside and patch not in region:
                region.add(patch)
                work.append(patch)
    rows, columns = zip(*(divmod(patch, width) for patch in region), strict=True)
    return [min(columns), min(rows), max(columns) + 1, max(rows) + 1]


def pictures(generator: torch.Generator) -> Tensor:
    """Feature maps `[6, N, 8]`: a background direction, two blobs of another direction, and noise."""
    maps = torch.zeros(6, HEIGHT, WIDTH, 8)
    maps[..., 0] = 1.0
    maps[:, 2:6, 3:8, :2] = torch.tensor([-0.5, 1.0])
    maps[:3, 7:, 11:, :2] = torch.tensor([-0.5, 1.0])
    noise = torch.randn(maps.shape, generator=generator) * torch.linspace(0.1, 0.6, 6)[:, None, None, None]
    return (maps + noise).flatten(1, 2)


@pytest.mark.parametrize("neighbours", [100, 12])
def test_lost_equals_the_loops(monkeypatch: pytest.MonkeyPatch, neighbours: int) -> None:
    monkeypatch.setattr(discovery, "SEED_NEIGHBOURS", neighbours)
    features_BND = pictures(torch.Generator().manual_seed(0))
    given = discovery.boxes(features_BND, HEIGHT, WIDTH, BIASES)
    expected = [[naive_box(each, HEIGHT, WIDTH, bias, neighbours) for each in features_BND] for bias in BIASES]
    assert given.tolist() == expected
    assert given[0, 0].tolist() == [3, 2, 8, 6], "the blob, without the other one that does not touch it"
    assert len({tuple(box) for box in given.reshape(-1, 4).tolist()}) > 6, "boxes differ by image and bias"


def test_the_seed_has_the_lowest_degree_and_the_first_wins_a_tie() -> None:
    features_BND = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [1.0, 0.0], [-1.0, -0.1]])[None]
    seed_B1, similar_BN = discovery.seeds(features_BND @ features_BND.transpose(1, 2))
    assert int(seed_B1) == 2
    assert similar_BN.tolist() == [[False, False, True, False, True]]


def test_a_seed_that_its_neighbours_outvote_gets_its_own_patch() -> None:
    similarity = torch.tensor([[[1.0, 0.1, 0.0], [-9.0, 1.0, 1.0], [1.0, 1.0, 1.0]]])
    assert discovery._boxes(similarity, 1, 3).tolist() == [[0, 0, 1, 1]]


def test_iou_counts_pixels() -> None:
    def area(box: np.ndarray) -> np.ndarray:
        canvas = np.zeros((20, 20), dtype=bool)
        canvas[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = True
        return canvas

    corners = np.random.default_rng(0).integers(0, 10, (40, 4))
    boxes = np.concatenate([corners[:, :2], corners[:, :2] + 1 + corners[:, 2:]], axis=1)
    given = discovery.ious(boxes[0], boxes)
    expected = [(area(boxes[0]) & area(box)).sum() / (area(boxes[0]) | area(box)).sum() for box in boxes]
    np.testing.assert_allclose(given, expected)
    assert given[0] == 1
    half = np.array([[0, 0, 10, 5]])
    assert discovery.found(np.array([0, 0, 10, 10]), half), "an IoU of exactly one half counts"
    assert not discovery.found(np.array([0, 0, 10, 10]), half - [0, 0, 1, 0])


def annotation(*objects: str) -> str:
    return f"<annotation>{''.join(f'<object>{each}</object>' for each in objects)}</annotation>"


def box(*edges: int) -> str:
    names = ("xmin", "ymin", "xmax", "ymax")
    return "<bndbox>" + "".join(f"<{n}>{e}</{n}>" for n, e in zip(names, edges, strict=True)) + "</bndbox>"


def test_only_an_objects_own_box_counts_and_difficult_ones_do(tmp_path: Path) -> None:
    person = f"<part><name>head</name>{box(5, 5, 9, 9)}</part><difficult>0</difficult>{box(1, 1, 20, 40)}"
    (tmp_path / "a.xml").write_text(annotation(person, f"<difficult>1</difficult>{box(3, 4, 10, 11)}"))
    assert voc.read_boxes(tmp_path / "a.xml").tolist() == [[0, 0, 20, 40], [2, 3, 10, 11]]


@pytest.mark.parametrize("text", [annotation("<name>cat</name>"), annotation(box(9, 1, 3, 4)), "<annotation>", ""])
def test_broken_annotations_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(UserError, match=r"a\.xml"):
        voc.read_boxes(tmp_path / "a.xml")


def block(*weights: str) -> Block:
    return Block(0, "", "", (), "", 1, False, "", "", "", weights)


class Separate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.q_proj, self.v_proj = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.v_proj(x) + self.k_proj(x) + self.q_proj(x)


@pytest.mark.parametrize("fast", [True, False])
def test_projections_of_torchs_own_attention(fast: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2, batch_first=True).eval()
    nn.init.normal_(attention.in_proj_bias)
    x_BTD = torch.randn(3, 5, 6)
    assert attention.in_proj_weight is not None
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with torch.no_grad(), own_size._Linears({"attn.in_proj_weight": attention.in_proj_weight}) as linears:
            attention(x_BTD, x_BTD, x_BTD, need_weights=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    keys = own_size.projection(linears.given, block("attn.in_proj_weight"), "keys")
    expected = x_BTD @ attention.in_proj_weight[6:12].T + attention.in_proj_bias[6:12]
    torch.testing.assert_close(keys, expected)


def test_separate_projections_go_by_their_names() -> None:
    model, x_BTD = Separate(), torch.randn(2, 4, 6)
    names = ("k_proj.weight", "q_proj.weight", "v_proj.weight")
    with torch.no_grad(), own_size._Linears({name: model.get_parameter(name) for name in names}) as linears:
        model(x_BTD)
        for kind, linear in (("queries", model.q_proj), ("keys", model.k_proj), ("values", model.v_proj)):
            torch.testing.assert_close(own_size.projection(linears.given, block(*names), kind), linear(x_BTD))
    with pytest.raises(UnsupportedModelError, match="calls no linear with gone"):
        own_size.projection(linears.given, block("gone.weight"), "keys")
    given = {"a.weight": x_BTD, "b.weight": x_BTD}
    with pytest.raises(UnsupportedModelError, match=r"a\.weight, b\.weight"):
        own_size.projection(given, block("a.weight", "b.weight"), "keys")
