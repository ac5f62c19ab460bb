"""An evaluation as a table, for the terminal and for notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regsurgery.evaluation.interval import Estimate

if TYPE_CHECKING:
    from regsurgery.evaluation import Evaluation

COLUMNS = ("original", "95 %", "patched", "95 %", "difference", "95 %", "n")

HTML = """\
<table class="regsurgery">
<caption>{{ caption }}</caption>
<thead><tr>{% for name in head %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in body %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table>
{% for line in lines %}<p>{{ line }}</p>
{% endfor %}"""


def number(value: float | None) -> str:
    """Four significant digits, at most four decimals."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def interval(estimate: Estimate | None) -> str:
    if estimate is None or estimate.low is None:
        return ""
    return f"{number(estimate.low)} .. {number(estimate.high)}"


def cells(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table: what, where, and both models' figures."""
    places = list(dict.fromkeys(place for row in evaluation.rows for place in row.where))
    body = []
    for row in evaluation.rows:
        estimates = (row.original, row.patched, row.difference)
        figures = [text for one in estimates for text in (number(None if one is None else one.value), interval(one))]
        n = next((one.n for one in (row.patched, row.original) if one is not None), 0)
        name = f"{row.name} [{row.unit}]" if row.unit else row.name
        body.append([name, *(str(row.where.get(place, "")) for place in places), *figures, str(n)])
    return ["figure", *places, *COLUMNS], body


def caption(evaluation: Evaluation) -> str:
    return f"{evaluation.task}: {evaluation.folder} (mode {evaluation.mode}), {evaluation.images}"


def as_html(evaluation: Evaluation) -> str:
    """The table as HTML; everything in it is escaped."""
    import jinja2

    head, body = cells(evaluation)
    lines = [line for line in (evaluation.expectation, *evaluation.notes) if line]
    template = jinja2.Environment(autoescape=True).from_string(HTML)
    return template.render(caption=caption(evaluation), head=head, body=body, lines=lines)
