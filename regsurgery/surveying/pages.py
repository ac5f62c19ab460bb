"""The tables of a survey as Markdown, HTML and JSON; nothing in a name or an error acts as either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regsurgery.checkpoints.whole import replace_file
from regsurgery.html import html_template
from regsurgery.plain import markdown
from regsurgery.surveying.records import write_whole
from regsurgery.surveying.tables import Surveyed, Table, machines, tables
from regsurgery.version import __version__

TITLE = "Survey"


def write_pages(output: Path, models: Sequence[Surveyed], settings: Mapping[str, Any]) -> None:
    """Write `survey.md`, `survey.html` and `survey.json` into `output`, each completely or not at all.

    Args:
        settings: what was measured on, see `survey._settings`.

    Raises:
        OutputError: the disk is full or not writable.
    """
    facts, shown = _facts(models, settings), tables(models)
    replace_file(output / "survey.md", as_markdown(facts, shown).encode())
    replace_file(output / "survey.html", as_html(facts, shown).encode())
    data = {
        "regsurgery": __version__,
        "settings": dict(settings),
        "machines": machines(models),
        "models": [model.as_dict() for model in models],
    }
    write_whole(output / "survey.json", data)


def _facts(models: Sequence[Surveyed], settings: Mapping[str, Any]) -> list[str]:
    """What holds for all tables, a line each."""
    begun = sum(bool(model.records) for model in models)
    images = [f"{name}: {value['note']}" for name, value in settings.items() if isinstance(value, Mapping)]
    return [
        f"{begun} of {len(models)} models, by regsurgery {__version__}; {'; '.join(images)}; seed {settings['seed']}.",
        *(f"Machine: {one}." for one in machines(models)),
    ]


def as_markdown(facts: Sequence[str], shown: Sequence[Table]) -> str:
    """The page for people and for repositories."""
    parts = [f"# {TITLE}", *map(markdown, facts)]
    for table in shown:
        rows = [table.head, ("---",) * len(table.head), *(tuple(map(markdown, row)) for row in table.rows)]
        lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts += [f"## {table.title}", *([markdown(table.note)] if table.note else []), lines]
    return "\n\n".join(parts) + "\n"


def as_html(facts: Sequence[str], shown: Sequence[Table]) -> str:
    """The page for browsers: one file, nothing to fetch, light and dark."""
    return html_template("survey.html.j2").render(title=TITLE, facts=facts, tables=shown)
