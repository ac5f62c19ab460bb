"""Rows of the report's tables, which are cards on a phone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

LARGEST = 1e300


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        head: its first cell; `note` explains it in smaller type.
        cells: the others, a text each.
    """

    head: str
    cells: tuple[str, ...]
    note: str = ""


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` can be calculated with: a recipe may hold NaN, infinity, and whole numbers beyond floats."""
    return isinstance(value, int | float) and abs(value) < LARGEST


def number(value: object, digits: int = 4) -> str:
    """So many significant digits; a dash for what is no number."""
    return f"{value:.{digits}g}" if is_number(value) else "–"
