"""An evaluation as a table, for the terminal and for notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regsurgery.evaluation.interval import Estimate

if TYPE_CHECKING:
    from regsurgery.evaluation import Evaluation

FIGURES, INTERVAL = ("original", "patched", "difference", "n"), "95 %"
COLUMNS = ("original", INTERVAL, "patched", INTERVAL, "difference", INTERVAL, "n")

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
    """Three to four significant digits."""
    if value is None:
        return ""
    size = abs(value)
    if 0 < size < 0.001:
        return f"{value:.0e}"
    decimals = next((places for bound, places in ((1000, 0), (100, 1), (10, 2), (1, 3)) if size >= bound), 4)
    return f"{value:.{decimals}f}" if value else "0"


def interval(estimate: Estimate | None) -> str:
    if estimate is None or estimate.low is None:
        return ""
    return f"{number(estimate.low)}..{number(estimate.high)}"


def cells(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table: what, where, and both models' figures; without details and empty columns."""
    rows = [row for row in evaluation.rows if not row.is_detail]
    places = list(dict.fromkeys(place for row in rows for place in row.where))
    body = []
    for row in rows:
        estimates = (row.original, row.patched, row.difference)
        figures = [text for one in estimates for text in (number(None if one is None else one.value), interval(one))]
        n = next((one.n for one in (row.patched, row.original) if one is not None), 0)
        name = f"{row.name} [{row.unit}]" if row.unit else row.name
        body.append([name, *(str(row.where.get(place, "")) for place in places), *figures, str(n)])
    head = ["figure", *places, *COLUMNS]
    filled = [index for index in range(len(head)) if not body or any(row[index] for row in body)]
    return [head[index] for index in filled], [[row[index] for index in filled] for row in body]


def caption(evaluation: Evaluation) -> str:
    return f"{evaluation.task}: {evaluation.folder} (mode {evaluation.mode}), {evaluation.images}"


def as_html(evaluation: Evaluation) -> str:
    """The table as HTML; everything in it is escaped."""
    import jinja2

    head, body = cells(evaluation)
    lines = [line for line in (evaluation.expectation, *evaluation.notes) if line]
    template = jinja2.Environment(autoescape=True).from_string(HTML)
    return template.render(caption=caption(evaluation), head=head, body=body, lines=lines)
