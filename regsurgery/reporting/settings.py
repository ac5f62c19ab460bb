"""The table that `find` chose from, as the report shows it: the paper's setting beside ours, and a heat map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regsurgery.reporting.tables import Row, is_number, number

if TYPE_CHECKING:
    from regsurgery.recipe import Recipe

LEVELS = 6  # colours of the heat map
KL, DRIFT = "KL divergence", "drift"
MEANINGS = {
    KL: "how far the class probabilities move, in nats; 0 is not at all",
    DRIFT: "1 - cosine of the output; 0 is the same direction",
}
MAX_TEXT = 200  # characters of a name: a recipe may hold anything
COLUMNS = {  # key of a row of the search's table -> its column
    "num_registers": "registers",
    "fill": "patches keep",
    "outliers_per_image": "outliers per image",
    "register_norm": "norm of a register",
    "drift": DRIFT,
    "kl": KL,
    "cost": "tokens added, %",
}


@dataclass(frozen=True)
class Cell:
    """A setting in the heat map.

    Attributes:
        text: its drift.
        level: 1 (farthest from the original) to `LEVELS` (closest); 0 if outliers remain: then its drift says nothing.
        marks: of "chosen" and "paper".
    """

    text: str
    level: int
    marks: tuple[str, ...]


@dataclass(frozen=True)
class HeatMap:
    """Sets of neurons by numbers of registers.

    Attributes:
        rows: the neurons of a set, how the search calls it, and for each of `columns` its cell; None where it was not
            tried.
        measure: what the cells show, and its `meaning`.
    """

    columns: tuple[int, ...]
    rows: tuple[tuple[str, str, tuple[Cell | None, ...]], ...]
    measure: str

    @property
    def meaning(self) -> str:
        return MEANINGS[self.measure]


@dataclass(frozen=True)
class Compared:
    """The paper's setting and the chosen one: a sentence, and a table of both; no rows if they are the same one."""

    sentence: str
    rows: tuple[Row, ...]


def heat_map(recipe: Recipe) -> HeatMap | None:
    """The search's table; None for a recipe without one."""
    table = recipe.table()
    if not table:
        return None
    columns = tuple(sorted({row["num_registers"] for row in table}))
    drifts = [row["drift"] for row in table if _is_cured(row)]
    sets: dict[tuple[str, str], dict[int, Cell]] = {}
    for row in table:
        marks = tuple(mark for mark in ("chosen", "paper") if row[mark])
        level = _level(row["drift"], drifts) if _is_cured(row) else 0
        cell = Cell(number(row["drift"], 2), level, marks)
        sets.setdefault((_neurons(row), _name(row)), {})[row["num_registers"]] = cell
    rows = tuple((*which, tuple(cells.get(count) for count in columns)) for which, cells in sets.items())
    return HeatMap(columns, rows, measure(table))


def compared(recipe: Recipe) -> Compared | None:
    """The paper's setting beside the chosen one; None for a recipe whose table lacks either."""
    table = recipe.table()
    paper = next((row for row in table if row["paper"]), None)
    chosen = next((row for row in table if row["chosen"]), None)
    if paper is None or chosen is None:
        return None
    if paper is chosen:
        return Compared("The search chose the paper's setting: the smallest set of neurons, and one register.", ())
    drifts = [row["drift"] for row in (paper, chosen) if is_number(row["drift"]) and row["drift"] > 0]
    times = drifts[0] / drifts[1] if len(drifts) == 2 else 0.0
    closer = f"{times:.1f} times closer to the original" if times >= 1.05 else "not closer to the original"
    sentence = (
        f"The paper shifts the smallest set of neurons that removes the outliers, onto one register. The setting that "
        f"the search chose is {closer}."
    )
    shown = (paper, chosen)
    rows = (
        Row("neurons shifted", tuple(_neurons(row) for row in shown)),
        Row("register tokens", tuple(str(row["num_registers"]) for row in shown)),
        Row("outlier patches left, per image", tuple(number(row["outliers_per_image"]) for row in shown)),
        Row(f"{measure(table)} from the original", tuple(number(row["drift"], 2) for row in shown), "lower is closer"),
        Row("tokens added", tuple(f"{number(row['cost'], 2)} %" for row in shown)),
    )
    return Compared(sentence, rows)


def all_rows(recipe: Recipe) -> tuple[Row, ...]:
    """The search's table with all its `COLUMNS`, and a last one that marks the chosen and the paper's setting."""
    return tuple(
        Row(
            row["name"][:MAX_TEXT],
            (*(_text(row.get(key)) for key in COLUMNS), ", ".join(mark for mark in ("chosen", "paper") if row[mark])),
        )
        for row in recipe.table()
    )


def measure(table: Sequence[Mapping[str, Any]]) -> str:
    """What `drift` is in a table: models without logits have no KL divergence."""
    return DRIFT if table[0].get("kl") is None else KL


def _is_cured(row: Mapping[str, Any]) -> bool:
    """Whether its drift says something: a setting that leaves outliers is close because it does nothing."""
    return is_number(row["drift"]) and row["outliers_per_image"] < 1


def _level(drift: float, drifts: Sequence[float]) -> int:
    """1 to `LEVELS` by the logarithm of `drift`, between the largest and the smallest of `drifts`."""
    low, high, value = (math.log(max(one, 1e-9)) for one in (min(drifts), max(drifts), drift))
    share = (high - value) / (high - low) if high > low else 1.0
    return 1 + round(share * (LEVELS - 1))


def _name(row: Mapping[str, Any]) -> str:
    kept = "" if row["fill"] == "zero" else f", patches keep: {row['fill']}"
    return f"{row['name']}{kept}"[:MAX_TEXT]


def _neurons(row: Mapping[str, Any]) -> str:
    """The neurons of a row, `block:index`; its name if it lists none. A provenance may hold anything."""
    listed = row.get("neurons")
    if not listed or not isinstance(listed, list) or not all(isinstance(one, list) and len(one) == 2 for one in listed):
        return row["name"][:MAX_TEXT]
    return ", ".join(f"{block}:{index}" for block, index in listed)[:MAX_TEXT]


def _text(value: object) -> str:
    return value[:MAX_TEXT] if isinstance(value, str) else number(value)
