"""The tables of `regsurgery recipes`, `regsurgery families` and `regsurgery eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from regsurgery.cli.console import console
from regsurgery.families import FAMILIES, REFUSED
from regsurgery.modes import NATIVE, SHIFT
from regsurgery.plain import in_blocks

if TYPE_CHECKING:
    from regsurgery.recipe import Recipe


def recipe_table(found: Mapping[str, Recipe]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("recipe", "model", "register neurons"):
        table.add_column(name, overflow="fold")
    for name, recipe in found.items():
        table.add_row(name, recipe.model, f"{recipe.num_neurons} in {in_blocks(recipe.register_neurons)}")
    console().print(table)


def evaluation_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> Table:
    """The `cells` of an evaluation, every interval below its figure. If it is too wide, the first column wraps."""
    from regsurgery.evaluation.result import FIGURES, INTERVAL

    table = Table(
        *(name for name in head if name != INTERVAL), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.no_wrap = True
        if column.header in FIGURES:
            column.justify = "right"
    for row in body:
        shown: list[str] = []
        for name, cell in zip(head, row, strict=True):
            if name != INTERVAL:
                shown.append(cell)
            elif cell:
                shown[-1] += f"\n{cell}"
        table.add_row(*map(Text, shown))  # verbatim: [ms] is not markup
    return table


def with_places_below(head: Sequence[str], body: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The same cells in fewer columns: block, head or setting below the name of the figure."""
    from regsurgery.evaluation.result import COLUMNS

    count = next(index for index, name in enumerate(head) if name in COLUMNS)
    below = [", ".join(filter(None, row[1:count])) for row in (head, *body)]
    narrow = [
        ["\n".join(filter(None, (row[0], places))), *row[count:]]
        for row, places in zip((head, *body), below, strict=True)
    ]
    return narrow[0], narrow[1:]


FAMILY_COLUMNS = ("library", "family", "models", "shift, bias", "native", "other sizes", "registers")
REFUSED_COLUMNS = ("refused", "why")


def family_rows() -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """The support matrix as text: the cells for the families, and for what is refused."""
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
    """The matrix for a terminal of 80 columns: one table per library, one line per model below the family's name."""
    for library in dict.fromkeys(family.library for family in FAMILIES):
        table = Table(box=box.SIMPLE_HEAD, title=library, title_justify="left")
        for name in ("family and models", "native", "sizes", "registers"):
            table.add_column(name, overflow="fold")
        for family in (one for one in FAMILIES if one.library == library):
            models = "\n".join(f"[dim]  {member}[/dim]" for member in family.members)
            size = "any" if family.any_size else "own"
            table.add_row(f"{family.name}\n{models}", ", ".join(family.native) or "-", size, family.placement)
        console().print(table)
    table = Table(*REFUSED_COLUMNS, box=box.SIMPLE_HEAD)
    for refused in REFUSED:
        table.add_row(refused.name, refused.reason)
    console().print(table)
    console().print(
        "Modes shift and bias write the library's own format, pt2 and onnx; mode native writes pt2, onnx and the "
        "formats listed under native. Sizes: any image size, or only the model's own. Registers: at the end, or inside "
        "the prefix."
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
