"""What opens the report: one picture, one sentence and three figures for readers who have never heard of registers."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regsurgery.emit.picture import palette, tiles
from regsurgery.verification.verdict_text import MEANINGS, ends, sentence

if TYPE_CHECKING:
    from PIL.Image import Image

    from regsurgery.reporting.collect import Example
    from regsurgery.verification.verdict import Verdict


@dataclass(frozen=True)
class Cost:
    """What the surgery adds: register tokens, to `num_tokens` others of which `num_patches` are patches."""

    num_registers: int
    num_tokens: int
    num_patches: int


@dataclass(frozen=True)
class Figure:
    """One of the three figures: what it is, its value, what it means."""

    name: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Shown:
    """One photo of the opening picture, as data URLs: `photo`, and the norm maps before and after.

    Attributes:
        largest: the largest norm before and after, as text.
    """

    name: str
    photo: str
    original: str
    patched: str
    largest: tuple[str, str]


@dataclass(frozen=True)
class Opening:
    """The picture: its photos, and the ends of the colour scale, `legend`, which all its maps share."""

    photos: tuple[Shown, ...]
    legend: str
    lowest: str
    highest: str


def opening(verdict: Verdict, examples: Sequence[Example]) -> Opening | None:
    """The picture of the model card with the photos above it; None if the patches make no grid."""
    maps = verdict.norm_maps
    if maps is None:
        return None
    drawn = tiles(maps)
    largest = zip(maps.original_ERC.amax(dim=(1, 2)).tolist(), maps.patched_ERC.amax(dim=(1, 2)).tolist(), strict=True)
    photos = tuple(
        Shown(example.name, jpeg_url(example.jpeg), _png_url(before), _png_url(after), (f"{most:.0f}", f"{now:.0f}"))
        for example, before, after, (most, now) in zip(examples, drawn.original, drawn.patched, largest, strict=False)
    )
    return Opening(photos, _png_url(palette()), f"{drawn.lowest:.3g}", f"{drawn.highest:.3g}")


def lead(verdict: Verdict, cost: Cost) -> str:
    """The outcome for a reader who knows no terms; what failed, or cannot be judged, is said as the verdict says it."""
    found = verdict.outliers_per_image
    if verdict.failures or not verdict.is_judged or found.patched >= found.original:
        return sentence(verdict)
    if cost.num_registers:
        by = "an extra token takes them" if cost.num_registers == 1 else f"{cost.num_registers} extra tokens take them"
    else:
        by = "a constant in every attention stands in for them"
    if verdict.num_same is None:
        kept = f"its output keeps a cosine of {verdict.cosine_output:.3f} to the original's"
    else:
        kept = f"{verdict.num_images - verdict.num_same} of {verdict.num_images} predictions changed"
    now = "none" if found.patched == 0 else f"{found.patched:.1g}"
    return (
        f"On average this model used {found.original:.1f} of the {cost.num_patches} patches of an image for notes of "
        f"its own; patched, it uses {now}, {by}, and {kept}."
    )


def three_figures(verdict: Verdict, cost: Cost) -> tuple[Figure, Figure, Figure]:
    """Outliers before and after, how much of the output is kept, and the cost."""
    found = verdict.outliers_per_image
    outliers = Figure(
        "outlier patches per image",
        f"{found.original:.2f} → {found.patched:.2f}",
        MEANINGS["outlier tokens"],
    )
    if verdict.num_same is None:
        meaning = f"1 means the same direction. 95 % interval: {ends(verdict, 'cosine_output', 3)}."
        kept = Figure(f"cosine of {verdict.output} to the original's", f"{verdict.cosine_output:.3f}", meaning)
    else:
        kind = "Generated pictures" if verdict.evidence == "generated" else "Images"
        meaning = f"{kind} whose most probable class is still the original's."
        kept = Figure("predictions unchanged", f"{verdict.num_same} of {verdict.num_images}", meaning)
    if not cost.num_registers:
        added = Figure("tokens added", "0", "One constant key and value in each attention.")
    else:
        share = 100 * cost.num_registers / cost.num_tokens
        added = Figure("tokens added", f"{cost.num_registers}", f"On top of {cost.num_tokens}: {share:.2g} % more.")
    return outliers, kept, added


def jpeg_url(content: bytes) -> str:
    """A JPEG file as a data URL."""
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode('ascii')}"


def _png_url(picture: Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
