"""The charts of the report as Vega-Lite specifications; Vega draws them in the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # identifies the format; nothing is fetched
COLORS = {"original": "#d1495b", "patched": "#2a9d8f"}  # contrast at least 3 to 1 on white and on black
MODEL_COLOR = {
    "field": "model",
    "type": "nominal",
    "title": None,
    "scale": {"domain": list(COLORS), "range": list(COLORS.values())},
    "legend": {"orient": "top"},
}


def histogram(low: float, high: float) -> dict[str, Any]:
    """Patches by norm (in medians of their image), `low` to `high`; the page fills `patches` and `threshold`."""
    norm = {"type": "quantitative", "scale": {"type": "log", "domain": [low, high]}, "title": "norm, medians"}
    count = {"type": "quantitative", "scale": {"type": "symlog"}, "title": "patches", "axis": {"tickCount": 4}}
    return _chart(
        "Histogram of patch norms after the chosen block, original and patched, with the threshold",
        height=220,
        layer=[
            {
                "data": {"name": "patches", "values": []},
                "mark": {"type": "bar", "opacity": 0.6, "tooltip": True},
                "encoding": {
                    "x": {"field": "from", **norm},
                    "x2": {"field": "to"},
                    "y": {"field": "patches", **count, "stack": None},
                    "y2": {"datum": 0},
                    "color": MODEL_COLOR,
                },
            },
            {
                "data": {"name": "threshold", "values": []},
                "mark": {"type": "rule", "strokeDash": [6, 4], "size": 2, "color": "#808890"},
                "encoding": {"x": {"field": "at", **norm}},
            },
        ],
    )


def norm_curve(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Patch norms over the blocks.

    Args:
        figures: one per model, block and figure: `model`, `block`, `figure` (`largest` or `median`), `norm`.
    """
    return _chart(
        "Median and largest patch norm of an image after every block, original and patched",
        height=220,
        data={"values": list(figures)},
        mark={"type": "line", "point": True, "tooltip": True},
        encoding={
            "x": {"field": "block", "type": "ordinal", "axis": {"labelAngle": 0}},
            "y": {"field": "norm", "type": "quantitative", "scale": {"type": "log"}, "title": "L2 norm"},
            "color": MODEL_COLOR,
            "strokeDash": {"field": "figure", "type": "nominal", "legend": None},  # the caption says which is which
        },
    )


def _chart(description: str, height: int, **content: Any) -> dict[str, Any]:
    return {
        "$schema": SCHEMA,
        "description": description,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit", "contains": "padding"},
        **content,
    }
