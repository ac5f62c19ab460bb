"""The parts of the report that need no model: what opens it, the search's table, features as colours."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from regsurgery.emit.picture import GAP, LABEL_WIDTH, PICTURE_NAME, before_after
from regsurgery.recipe import Recipe
from regsurgery.reporting.collect import Example
from regsurgery.reporting.components import colours
from regsurgery.reporting.opening import Cost, lead, opening, three_figures
from regsurgery.reporting.settings import LEVELS, all_rows, compared, heat_map
from regsurgery.verification.verdict import BeforeAfter, NormMaps
from regsurgery.verification.verdict_text import rows, sentence
from tests.unit.test_verdict import verdict

COST = Cost(num_registers=3, num_tokens=197, num_patches=196)


def tried(name: str, registers: int, drift: object, outliers: float = 0.0, **marks: Any) -> dict[str, Any]:
    """A row of the search's table."""
    figures = {"outliers_per_image": outliers, "register_norm": 470.0, "drift": drift, "kl": drift, "cost": 0.5}
    row = {"name": name, "num_registers": registers, "fill": "zero", "chosen": False, "paper": False}
    return row | figures | {"neurons": [[7, 417]]} | marks


TABLE = [
    tried("unused register", 1, 0.003, 3.9, neurons=[]),
    tried("smallest", 1, 0.08, paper=True),
    tried("smallest", 3, 0.05),
    tried("smallest +6:189", 3, 0.01, neurons=[[6, 189], [7, 417]], chosen=True),
]


def recipe(table: list[Any]) -> Recipe:
    return Recipe({7: (417,)}, provenance={"sweep": table})


def test_the_chosen_cell_is_the_strongest_and_outliers_that_stay_have_no_colour() -> None:
    found = heat_map(recipe(TABLE))
    assert found is not None and found.columns == (1, 3) and found.measure == "KL divergence"
    assert [(neurons, name) for neurons, name, _ in found.rows] == [
        ("unused register", "unused register"), ("7:417", "smallest"), ("6:189, 7:417", "smallest +6:189"),
    ]  # fmt: skip
    (unused, nothing), (paper, between), (untried, chosen) = (cells for *_, cells in found.rows)
    assert nothing is None and untried is None
    assert unused is not None and unused.level == 0, "it drifts least because it does nothing"
    assert paper is not None and (paper.level, paper.marks) == (1, ("paper",))
    assert chosen is not None and (chosen.level, chosen.marks, chosen.text) == (LEVELS, ("chosen",), "0.01")
    assert between is not None and 1 < between.level < LEVELS


def test_the_papers_setting_stands_beside_ours() -> None:
    found = compared(recipe(TABLE))
    assert found is not None and "8.0 times closer" in found.sentence
    assert {row.head: row.cells for row in found.rows}["neurons shifted"] == ("7:417", "6:189, 7:417")
    same = compared(recipe([tried("smallest", 1, 0.08, paper=True, chosen=True)]))
    assert same is not None and same.rows == () and "chose the paper's setting" in same.sentence
    assert compared(recipe(TABLE[:3])) is None and heat_map(recipe([])) is None


@pytest.mark.parametrize("drift", [float("nan"), float("inf"), -1.0, 0, 10**400, True])
@pytest.mark.parametrize("neurons", ["<b>", [["a", "b"]], [1, 2], {}, None])
def test_a_table_that_somebody_made_up_is_shown_or_left_out(drift: object, neurons: object) -> None:
    made_up = [tried("x" * 999, 1, drift, paper=True, neurons=neurons), tried("y", 10**30, drift, chosen=True)]
    found = heat_map(recipe(made_up))
    assert found is not None and all(len(text) <= 200 for row in found.rows for text in row[:2])
    assert compared(recipe(made_up)) is not None and len(all_rows(recipe(made_up))) == 2


def test_the_first_sentence_needs_no_terms_and_hides_no_failure() -> None:
    found = verdict(16)
    assert lead(found, COST) == (
        "On average this model used 3.9 of the 196 patches of an image for notes of its own; patched, it uses none, "
        "3 extra tokens take them, and 0 of 16 predictions changed."
    )
    headless = replace(found, num_same=None, kl=None)
    assert "keeps a cosine of 0.995" in lead(headless, COST)
    assert "a constant in every attention" in lead(found, replace(COST, num_registers=0))
    for bad in (
        replace(found, failures=("it is broken",)),
        replace(found, num_images=2),
        replace(found, outliers_per_image=BeforeAfter(1.0, 1.0)),
        replace(found, outliers_per_image=BeforeAfter(0.0, 0.0)),
    ):
        assert lead(bad, COST) == sentence(bad)
    assert [figure.value for figure in three_figures(found, COST)] == ["3.91 → 0.00", "16 of 16", "3"]
    assert [figure.value for figure in three_figures(headless, replace(COST, num_registers=0))][1:] == ["0.995", "0"]


def test_every_figure_is_explained() -> None:
    found = verdict(16)
    shown = [*rows(found), *rows(replace(found, kl=None, num_same=None, margin=2.0, unused_register=None))]
    assert [row.name for row in shown if not row.meaning] == []
    assert len({row.meaning for row in shown}) == len({row.name for row in shown}), "one explanation a figure"


def test_the_opening_has_the_tiles_of_the_cards_picture(tmp_path: Path) -> None:
    original = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(0)) + 1
    original[:, 0, 0] = 60.0
    found = replace(verdict(16), norm_maps=NormMaps(original, original.clamp(max=2)))
    examples = [Example(f"{number}.jpg", b"photo") for number in range(16)]
    shown = opening(found, examples)
    assert shown is not None and [photo.name for photo in shown.photos] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert shown.photos[0].largest == ("60", "2") and (shown.highest, shown.lowest[:2]) == ("60", "1.")
    before_after(found, tmp_path)
    with Image.open(tmp_path / PICTURE_NAME) as picture:
        for number, photo in enumerate(shown.photos):
            tile = Image.open(io.BytesIO(base64.b64decode(photo.original.partition(",")[2])))
            assert tile.size == (5, 3)
            corner = (LABEL_WIDTH + number * (160 + GAP) + 2, GAP + 2)
            assert picture.getpixel(corner) == tile.getpixel((0, 0))
    assert opening(replace(found, norm_maps=None), examples) is None


def test_features_are_coloured_by_the_same_axes_or_by_their_own() -> None:
    features_IND = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 7)
    outliers_IND = features_IND.clone()
    outliers_IND[:, 0, 5] += 900
    found = colours({"original": outliers_IND, "patched": features_IND})
    shared, own = found["shared"], found["own"]
    assert shared["patched"].shape == (2, 9, 3) and shared["patched"].dtype == torch.uint8
    assert shared["original"][:, 1:].equal(shared["patched"][:, 1:]), "equal features, equal colours"
    assert own["patched"].equal(shared["patched"])
    spread = [own[side][:, 1:, 0].float().std() for side in ("original", "patched")]
    assert spread[0] < 0.2 * spread[1], "outliers take the first colour"
    turned = colours({"original": -outliers_IND, "patched": -features_IND})
    assert torch.equal(255 - turned["own"]["patched"].int(), own["patched"].int()), "the sign is not arbitrary"
    assert colours({"patched": features_IND[..., :2]})["own"]["patched"].shape == (2, 9, 3)
