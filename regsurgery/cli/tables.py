"""The tables of `regsurgery recipes` and `regsurgery families`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from regsurgery.families import FAMILIES, REFUSED
from regsurgery.modes import NATIVE, SHIFT

if TYPE_CHECKING:
    from regsurgery.recipe import Recipe


def recipe_table(found: Mapping[str, Recipe]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("recipe", "model", "register neurons"):
        table.add_column(name, overflow="fold")
    for name, recipe in found.items():
        blocks = ", ".join(map(str, recipe.register_neurons))
        table.add_row(name, recipe.model, f"{recipe.num_neurons} in block(s) {blocks}")
    Console().print(table)


FAMILY_COLUMNS = ("library", "family", "models", "shift, bias", "native", "other sizes", "registers")
REFUSED_COLUMNS = ("refused", "why")


def family_rows() -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """The support matrix as text: the cells of the families, and of what is refused."""
    rows = [
        (
            family.library,
            family.name,
            ", ".join(family.members),
            ", ".join(family.formats(SHIFT)),
            ", ".join(family.formats(NATIVE)),
            "yes" if family.any_size else "no",
            {"end": "at the end", "prefix": "inside the prefix"}[family.placement],
        )
        for family in FAMILIES
    ]
    return rows, [(refused.name, refused.reason) for refused in REFUSED]


def family_table() -> None:
    """The matrix for a terminal, with the models below the family's name."""
    families, refused = family_rows()
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("library", "family and models", "native", "sizes", "registers"):
        table.add_column(name, no_wrap=name in ("library", "sizes"), overflow="fold")
    for library, family, models, _, native, any_size, placement in families:
        table.add_row(library, f"{family}\n[dim]{models}[/dim]", native, any_size, placement)
    Console().print(table)
    table = Table(*REFUSED_COLUMNS, box=box.SIMPLE_HEAD)
    for row in refused:
        table.add_row(*row)
    Console().print(table)
    Console().print(
        "Modes shift and bias write the library's own format, pt2 and onnx. Sizes: other image sizes than its own."
    )


def family_markdown() -> str:
    """The same as Markdown; docs/formats.md has it."""
    lines = []
    for columns, rows in zip((FAMILY_COLUMNS, REFUSED_COLUMNS), family_rows(), strict=True):
        lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        for row in rows:
            cells = [f"`{cell.replace(', ', '`, `')}`" if name == "models" else cell
                     for name, cell in zip(columns, row, strict=True)]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)
