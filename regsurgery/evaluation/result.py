"""The result of an evaluation: figures, and their table for the terminal and for notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regsurgery.interval import Estimate, Row

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


@dataclass(frozen=True)
class Result:
    """What a task found.

    Attributes:
        rows: the figures.
        notes: facts worth a line.
        details: what a picture or a program needs in addition to the figures; plain data.
        num_images: how many images were seen, if not all of them.
    """

    rows: Sequence[Row]
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    num_images: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """Figures of one task, original against patched.

    Attributes:
        task, folder, format, mode: what was evaluated; mode `original` for an unpatched model.
        images: one line that describes the images; `num_images` is how many both models saw.
        outliers_per_image: for the original on these images, by `outliers.robust_outliers`; None if the task did not
            count them.
        expectation: why no difference is expected, or "".
        rows, notes, details: as in `Result`.
        settings: the options that the task ran with.
    """

    task: str
    folder: str
    format: str
    mode: str
    images: str
    num_images: int
    outliers_per_image: float | None
    expectation: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    details: Mapping[str, Any]
    settings: Mapping[str, Any]

    def __getitem__(self, name: str) -> Row:
        """The only row of that name; KeyError if there are none or several."""
        (row, *others) = [row for row in self.rows if row.name == name] or [None]
        if row is None or others:
            raise KeyError(name)
        return row

    def select(self, name: str, **where: int | str) -> list[Row]:
        """The rows of that name whose `where` matches."""
        return [row for row in self.rows if row.name == name and where.items() <= dict(row.where).items()]

    def as_dict(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "folder": self.folder,
            "format": self.format,
            "mode": self.mode,
            "images": self.images,
            "num_images": self.num_images,
            "outliers_per_image": self.outliers_per_image,
            "expectation": self.expectation,
            "settings": dict(self.settings),
            "notes": list(self.notes),
            "figures": [row.as_dict() for row in self.rows],
            "details": dict(self.details),
        }

    def _repr_html_(self) -> str:
        return as_html(self)


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
    """Head and body of the table: names, places, and both models' figures; without details and empty columns."""
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
