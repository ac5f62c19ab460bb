"""What was collected -> one HTML file: style, scripts, Vega and data inline, nothing to fetch."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch

from regsurgery.reporting import charts
from regsurgery.reporting.collect import SIDES, Collected, Lost
from regsurgery.reporting.packing import packed_activations, packed_colors, packed_maps, packed_norms
from regsurgery.verification.verdict_text import FigureRow, counted, remarks, rows, sentence, title
from regsurgery.version import __version__

if TYPE_CHECKING:
    from regsurgery.recipe import Recipe
    from regsurgery.verification.verdict import Verdict

BINS = 60
SETTINGS = {  # key of a row of the search's table -> its column
    "name": "neurons",
    "num_registers": "registers",
    "fill": "patches keep",
    "outliers_per_image": "outliers per image",
    "register_norm": "norm of a register",
    "drift": "drift",
    "kl": "KL divergence",
    "cost": "tokens added, %",
}


@dataclass(frozen=True)
class ReportSubject:
    """What the report is about.

    Attributes:
        source: `id`, `revision` and `sha256` of what was patched, as its config records them.
    """

    name: str
    mode: str
    recipe: Recipe
    source: Mapping[str, Any]


def page(subject: ReportSubject, verdict: Verdict, collected: Collected, lost: Lost | None) -> str:
    """The report as HTML."""
    import jinja2
    import vl_convert
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("regsurgery"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    settings = subject.recipe.table()
    specs = {
        "histogram": charts.histogram(*_range(collected)),
        "curve": charts.norm_curve(_curve(collected)),
        **({"settings-chart": charts.settings_curve(settings)} if settings else {}),
    }
    return environment.get_template("report.html.j2").render(
        title=subject.name,
        mode=subject.mode,
        version=__version__,
        num_images=verdict.num_images,
        images_note=verdict.images,
        verdict=verdict,
        sentence=sentence(verdict),
        remarks=remarks(verdict),
        grade="bad" if verdict.failures else "unsure" if verdict.warnings or not verdict.is_judged else "good",
        heading=title(verdict),
        rows=figures(verdict, collected),
        neurons=_neurons(subject.recipe, collected),
        has_contributions=bool(_contributions(subject.recipe)),
        settings=[(_mark(row), [_cell(row.get(key)) for key in SETTINGS]) for row in settings],
        settings_columns=SETTINGS.values(),
        has_boxes=lost is not None,
        boxes_note=""
        if lost is None
        else f"Boxes: LOST on the {lost.kind} of block {lost.block}, bias {lost.bias:g}, at the model's input size; "
        "it draws one box in every image, without labels.",
        attention_note=collected.attention_note,
        recipe=subject.recipe.to_yaml(),
        source=subject.source,
        style=Markup(_text("report.css")),  # nosec B704 # our file
        vega=Markup(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")),  # nosec B704 # the library
        script=Markup(_text("report.js")),  # nosec B704 # our file
        data=Markup(_json(_data(collected, verdict.block, specs))),  # nosec B704 # _json escapes
    )


def figures(verdict: Verdict, collected: Collected) -> list[FigureRow]:
    """The table of before and after."""
    found = rows(verdict)
    if collected.register_attention is not None:
        given, images = f"{float(collected.register_attention[-1]):.3f}", counted(verdict).split()[0]
        found.append(FigureRow("attention of the class token to registers, last block", "0", given, "", images))
    return found


def _data(collected: Collected, probe: int, specs: Mapping[str, Any]) -> dict[str, Any]:
    low, high = _range(collected)
    attention = collected.attention
    return {
        "grid": collected.grid,
        "blocks": list(range(len(collected.norms["original"]))),
        "probe": probe,
        "heads": 0 if attention is None else attention["original"].shape[1],
        "neurons": [f"{block}:{index}" for block, index in collected.neurons],
        "images": [
            {
                "name": example.name,
                "src": f"data:image/jpeg;base64,{base64.b64encode(example.jpeg).decode('ascii')}",
                "boxes": example.boxes,
            }
            for example in collected.examples
        ],
        "norms": {side: packed_norms(_in_medians(collected, side)) for side in SIDES},
        "attention": None if attention is None else {side: packed_maps(attention[side]) for side in SIDES},
        "activations": packed_activations(collected.activations),
        "histogram": {"low": low, "high": high, "bins": BINS},
        "colors": packed_colors(),
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


def _neurons(recipe: Recipe, collected: Collected) -> list[dict[str, Any]]:
    """A row for every neuron whose activations were collected."""
    known = _contributions(recipe)
    rows = []
    for (block, index), values_IN in zip(collected.neurons, collected.activations, strict=True):
        largest_I = values_IN.gather(1, values_IN.abs().argmax(dim=1, keepdim=True))
        rows.append(
            {
                "block": block,
                "index": index,
                "contribution": _number(known.get((block, index))),
                "largest": f"{float(largest_I.mean()):.2f}",
                "median": f"{float(values_IN.median()):z.2f}",
            }
        )
    return rows


def _contributions(recipe: Recipe) -> dict[tuple[int, int], float]:
    """(block, neuron) -> the contribution that `find` measured."""
    listed = recipe.provenance.get("candidates")
    if not isinstance(listed, list):
        return {}
    found = {}
    for entry in listed:
        if isinstance(entry, dict) and {"block", "index", "contribution"} <= entry.keys():
            found[entry["block"], entry["index"]] = entry["contribution"]
    return found


def _mark(row: Mapping[str, Any]) -> str:
    return ", ".join(word for word, is_so in (("chosen", row["chosen"]), ("paper", row["paper"])) if is_so)


def _cell(value: object) -> str:
    return value[:200] if isinstance(value, str) else _number(value)


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–"


def _text(name: str) -> str:
    return (resources.files("regsurgery") / "templates" / name).read_text("utf-8")


def _json(value: object) -> str:
    """JSON that is safe inside a script element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
