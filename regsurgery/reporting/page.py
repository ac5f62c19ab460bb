"""What was collected -> one HTML file: style, scripts, Vega and data inline, nothing to fetch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from regsurgery.html import html_template, inline, inline_json, script_hashes
from regsurgery.reporting import charts, settings
from regsurgery.reporting.collect import SIDES, Collected, Lost
from regsurgery.reporting.opening import Cost, jpeg_url, lead, opening, three_figures
from regsurgery.reporting.packing import packed_activations, packed_bytes, packed_maps, packed_norms, packed_palette
from regsurgery.reporting.tables import Row, number
from regsurgery.verification.verdict_text import FigureRow, counted, remarks, rows, sentence
from regsurgery.version import __version__

if TYPE_CHECKING:
    from regsurgery.recipe import Recipe
    from regsurgery.verification.verdict import Verdict

BINS = 60


@dataclass(frozen=True)
class ReportSubject:
    """What the report is about.

    Attributes:
        folder: the name of the patched folder; `digest` its `folder_digest`.
        source: `id`, `revision` and `sha256` of what was patched, as its config records them.
    """

    folder: str
    digest: str
    mode: str
    recipe: Recipe
    source: Mapping[str, Any]
    cost: Cost

    @property
    def name(self) -> str:
        """The model's Hub repository, or the name of its folder: a page that is shared tells no path."""
        identifier, is_local = self.source["id"], self.source.get("revision") is None
        return self.source.get("repo") or (Path(identifier).name if is_local else identifier) or self.folder


@dataclass(frozen=True)
class LiveLink:
    """The live page beside the report: the name of its folder, and what it makes a browser load."""

    folder: str
    num_bytes: int


def page(
    subject: ReportSubject, verdict: Verdict, collected: Collected, lost: Lost | None, live: LiveLink | None = None
) -> str:
    """The report as HTML."""
    import vl_convert
    from markupsafe import Markup

    specs = {
        "histogram": charts.histogram(*_range(collected)),
        "curve": charts.norm_curve(_curve(collected)),
    }
    vega = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    script = inline("maps.js", "report.js")
    return html_template("report.html.j2").render(
        subject=subject,
        version=__version__,
        load_line=f"import regsurgery; model = regsurgery.load({subject.folder!r})",
        measured_on=_measured_on(verdict),
        lead=lead(verdict, subject.cost),
        figures=three_figures(verdict, subject.cost),
        opening=opening(verdict, collected.examples),
        verdict=verdict,
        sentence=sentence(verdict),
        remarks=remarks(verdict),
        grade="bad" if verdict.failures else "unsure" if verdict.warnings or not verdict.is_judged else "good",
        figure_rows=[
            Row(row.name, (row.original, row.patched, row.interval, row.images), row.meaning)
            for row in _figure_rows(verdict, collected)
        ],
        compared=settings.compared(subject.recipe),
        heat_map=settings.heat_map(subject.recipe),
        levels=settings.LEVELS,
        settings_rows=settings.all_rows(subject.recipe),
        settings_columns=("neurons", *settings.COLUMNS.values(), "setting"),
        neuron_rows=_neurons(subject.recipe, collected),
        lost=lost,
        live=live,
        attention_note=collected.attention_note,
        recipe=subject.recipe.to_yaml(),
        style=Markup(inline("report.css")),  # nosec B704 # our file
        vega=Markup(vega),  # nosec B704 # the library
        script=Markup(script),  # nosec B704 # our file
        may_run=Markup(script_hashes(vega, script)),  # nosec B704 # base64
        data=Markup(inline_json(_data(collected, verdict.block, specs))),  # nosec B704 # escaped there
    )


def _measured_on(verdict: Verdict) -> str:
    """The images, counted once: the note on them mostly begins with their number."""
    note = verdict.images
    return note if note.startswith(f"{verdict.num_images} ") else f"{verdict.num_images} of {note}"


def _figure_rows(verdict: Verdict, collected: Collected) -> list[FigureRow]:
    """The table of before and after."""
    found = rows(verdict)
    if collected.register_attention is not None:
        given, images = f"{float(collected.register_attention[-1].mean()):.3f}", counted(verdict).split()[0]
        found.append(FigureRow("attention of the class token to registers, last block", "0", given, "", images))
    return found


def _data(collected: Collected, probe: int, specs: Mapping[str, Any]) -> dict[str, Any]:
    low, high = _range(collected)
    attention, taken = collected.attention, collected.register_attention
    return {
        "grid": collected.grid,
        "blocks": list(range(len(collected.norms["original"]))),
        "probe": probe,
        "heads": 0 if attention is None else attention["original"].shape[1],
        "neurons": [f"{block}:{index}" for block, index in collected.neurons],
        "images": [
            {"name": example.name, "src": jpeg_url(example.jpeg), "boxes": example.boxes}
            for example in collected.examples
        ],
        "norms": {side: packed_norms(_in_medians(collected, side)) for side in SIDES},
        "attention": None if attention is None else {side: packed_maps(attention[side]) for side in SIDES},
        "registers": None if taken is None else [[float(f"{share:.4g}") for share in row] for row in taken.tolist()],
        "components": {
            axes: {side: packed_bytes(found[side]) for side in SIDES} for axes, found in collected.colours.items()
        },
        "activations": packed_activations(collected.activations),
        "histogram": {"low": low, "high": high, "bins": BINS},
        "palette": packed_palette(),
        "charts": specs,
    }


def _in_medians(collected: Collected, side: str) -> torch.Tensor:
    norms_LIN = collected.norms[side]
    return norms_LIN / norms_LIN.median(dim=-1, keepdim=True).values


def _range(collected: Collected) -> tuple[float, float]:
    """Ends of the histogram, in medians: all patches of both models, in round numbers."""
    both = torch.stack([_in_medians(collected, side) for side in SIDES]).clamp_min(1e-3)
    return _round(float(both.min()), math.floor), _round(float(both.max()), math.ceil)


def _round(value: float, to: Any) -> float:
    step = 10 ** (math.floor(math.log10(value)))
    return float(f"{to(value / step) * step:.6g}")


def _curve(collected: Collected) -> list[dict[str, Any]]:
    rows = []
    for side in SIDES:
        norms_LIN = collected.norms[side]
        shown = {"largest": norms_LIN.amax(dim=-1), "median": norms_LIN.median(dim=-1).values}
        for figure, norms_LI in shown.items():
            rows += [
                {"model": side, "figure": figure, "block": block, "norm": float(f"{norm:.5g}")}
                for block, norm in enumerate(norms_LI.mean(dim=-1).tolist())
            ]
    return rows


def _neurons(recipe: Recipe, collected: Collected) -> list[Row]:
    """A row for every neuron whose activations were collected."""
    known = _contributions(recipe)
    rows = []
    for (block, index), values_IN in zip(collected.neurons, collected.activations, strict=True):
        largest_I = values_IN.gather(1, values_IN.abs().argmax(dim=1, keepdim=True))
        cells = (
            number(known.get((block, index))),
            f"{float(largest_I.mean()):.2f}",
            f"{float(values_IN.median()):z.2f}",
        )
        rows.append(Row(f"{block}:{index}", cells))
    return rows


def _contributions(recipe: Recipe) -> dict[tuple[int, int], Any]:
    """(block, neuron) -> the contribution that `find` measured."""
    listed = recipe.provenance.get("candidates")
    if not isinstance(listed, list):
        return {}
    found = {}
    for entry in listed:
        if isinstance(entry, dict) and isinstance(entry.get("block"), int) and isinstance(entry.get("index"), int):
            found[entry["block"], entry["index"]] = entry.get("contribution")
    return found
