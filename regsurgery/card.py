"""The model card of a patched folder."""

from __future__ import annotations

from regsurgery.surgery import Surgery
from regsurgery.verification import Verdict


def model_card(surgery: Surgery, fmt: str, verdict: Verdict | None, snippet: str) -> str:
    """Markdown with what was done, to what, with which measured figures, and how to load and repeat it."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("regsurgery"), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template("card.md.j2").render(
        library={"pt2": "pytorch"}.get(fmt, fmt),
        source=surgery.loaded.source,
        num_neurons=surgery.recipe.num_neurons,
        num_registers=surgery.plan.num_registers,
        recipe=surgery.recipe,
        snippet=snippet,
        mode=surgery.recipe.mode,
        fit=surgery.config_block.get("fit"),
        format=fmt,
        format_flag="" if fmt == surgery.loaded.library else f" --format {fmt}",
        verdict=verdict,
        version=surgery.config_block["version"],
    )
