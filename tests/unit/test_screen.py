"""Tables on a narrow terminal: names wrap, figures are whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from regsurgery.cli.screen import Screen
from regsurgery.evaluation.result import Evaluation
from regsurgery.interval import Estimate, Row
from regsurgery.search.drift import Setting, Tried
from regsurgery.search.faithful import SettingRow


def row(name: str, fill: str = "zero") -> SettingRow:
    values = torch.linspace(0, 1, 32, dtype=torch.float64)
    tried = Tried(values / 70, values, 470 + values, values, values, values / 70, (values > 0.5).double())
    return SettingRow(name, Setting(((6, 189),), 12, fill), tried, 12.34, True, True)


@pytest.mark.parametrize("columns", [72, 80, 120])
def test_find_shows_every_figure(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    rows = [row("smallest +6:189 +11:1234", "outliers"), row("unused register")]
    recipe = SimpleNamespace(register_neurons={6: (189,)})
    found: Any = SimpleNamespace(
        num_images=8, judged_on="32 others", choice=SimpleNamespace(rows=rows), candidates=(), recipe=recipe,
        second_resolution=SimpleNamespace(note="holds"), suppressed=True,
    )  # fmt: skip
    Screen(as_json=False, quiet=False).found(found, Path("recipe.yaml"))
    out = capsys.readouterr().out
    assert "…" not in out
    for figure in ("0.50", "470", "0.0071", "16 of 32", "12.34", "outliers", "same class", "cost, %"):
        assert figure in out


@pytest.mark.parametrize(("columns", "is_wide"), [(80, False), (160, True)])
def test_eval_names_every_figure_and_setting(
    columns: int, is_wide: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Where four columns of names have no room beside the figures, settings stand below the names."""
    monkeypatch.setenv("COLUMNS", str(columns))
    one = Estimate(0.12345, -0.12345, 0.23456, 175)
    settings = (("8", "queries", "homography"), ("11", "", "mirror"))
    places = [dict(zip(("block", "kind", "warp"), setting, strict=True)) for setting in settings]
    figures = tuple(Row(f"PCK, outlier patches {index}", one, one, one, where) for index, where in enumerate(places))
    Screen(as_json=False, quiet=False).evaluated(
        Evaluation("t", "f", "timm", "shift", "175 images", 175, 4.0, "", figures, (), {}, {})
    )
    out = capsys.readouterr().out
    assert "…" not in out
    for text in ("PCK, outlier", "patches 0", "patches 1", "-0.1235..0.2346", "175", "kind", "homography"):
        assert text in out
    assert ("8, queries," in out and "11, mirror" in out) is not is_wide
    assert not is_wide or "PCK, outlier patches 0  8      queries" in out
