"""Patch norms as pictures, before and after the surgery: the picture of a model card, and the tiles that it is made of,
which also open the report.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from regsurgery.verification.verdict import NormMaps, Verdict

PICTURE_NAME = "before_after.png"
MAP_SIDE, GAP, LABEL_WIDTH, FONT_SIZE = 160, 8, 72, 14  # pixels
LEGEND_WIDTH, LEGEND_HEIGHT = 200, 12  # pixels
# Low, middle, high. The ends are neither black nor white: usual patches differ visibly, and outliers in a corner stand
# out from a white page.
DARK, MIDDLE, LIGHT = "#150d38", "#b63679", "#ffc83d"


@dataclass(frozen=True)
class Tiles:
    """Norm maps as RGB pictures, a pixel a patch, all on one logarithmic scale from `lowest` to `highest`."""

    original: tuple[Image, ...]
    patched: tuple[Image, ...]
    lowest: float
    highest: float


def tiles(maps: NormMaps) -> Tiles:
    """The maps of every image in the colours of `palette`."""
    lowest = float(min(maps.original_ERC.min(), maps.patched_ERC.min()))
    highest = float(max(maps.original_ERC.max(), maps.patched_ERC.max()))
    original, patched = (
        tuple(_coloured(norms_RC, lowest, highest) for norms_RC in norms_ERC)
        for norms_ERC in (maps.original_ERC, maps.patched_ERC)
    )
    return Tiles(original, patched, lowest, highest)


def palette() -> Image:
    """The colours from low to high as a picture of 256 x 1 pixels."""
    import PIL.Image

    return _colorized(PIL.Image.frombytes("L", (256, 1), bytes(range(256))))


def before_after(verdict: Verdict, folder: Path) -> str | None:
    """Draw `before_after.png` into `folder`; returns its name, or None if the verdict has no maps.

    One column per image, the original above the patched model, with the scale below them. It shows no photos: a card is
    published, and they may not be ours to publish. The same verdict gives the same bytes: no date, no software name, no
    fonts of the machine.
    """
    if verdict.norm_maps is None:
        return None
    import PIL.Image
    import PIL.ImageDraw
    import PIL.ImageFont

    drawn = tiles(verdict.norm_maps)
    height, width = _size(drawn.original[0])
    font = PIL.ImageFont.load_default(FONT_SIZE)
    low, high = f"{drawn.lowest:.3g}", f"{drawn.highest:.3g}"
    unit = f"norm of a patch after block {verdict.block}, logarithmic"
    legend_right = LABEL_WIDTH + LEGEND_WIDTH + 4 * GAP + sum(round(font.getlength(text)) for text in (low, high, unit))
    right = max(LABEL_WIDTH + len(drawn.original) * (width + GAP), legend_right)
    legend_top = GAP + 2 * (height + GAP)
    picture = PIL.Image.new("RGB", (right, legend_top + FONT_SIZE + 2 * GAP), "white")
    draw = PIL.ImageDraw.Draw(picture)
    for row, (label, maps) in enumerate((("original", drawn.original), ("patched", drawn.patched))):
        top = GAP + row * (height + GAP)
        draw.text((GAP, top + height // 2), label, "black", font, anchor="lm")
        for column, tile in enumerate(maps):
            enlarged = tile.resize((width, height), PIL.Image.Resampling.NEAREST)
            picture.paste(enlarged, (LABEL_WIDTH + column * (width + GAP), top))
    left, middle = float(LABEL_WIDTH), legend_top + FONT_SIZE / 2
    draw.text((left, middle), low, "black", font, anchor="lm")
    left += round(font.getlength(low)) + GAP
    bar = palette().resize((LEGEND_WIDTH, LEGEND_HEIGHT))
    picture.paste(bar, (round(left), round(middle - LEGEND_HEIGHT / 2)))
    draw.text((left + LEGEND_WIDTH + GAP, middle), f"{high}   {unit}", "black", font, anchor="lm")
    picture.save(folder / PICTURE_NAME, "PNG", optimize=True)
    return PICTURE_NAME


def _size(tile: Image) -> tuple[int, int]:
    """Height and width in pixels of one map in the picture."""
    longest = max(tile.size)
    return round(MAP_SIDE * tile.height / longest), round(MAP_SIDE * tile.width / longest)


def _coloured(norms_RC: Tensor, lowest: float, highest: float) -> Image:
    import PIL.Image

    floor = max(lowest, 1e-6 * highest, 1e-12)  # norms may be 0
    top = max(math.log(max(highest, floor) / floor), 1e-12)
    levels = (255 / top * (norms_RC.double().clamp(min=floor) / floor).log()).round().clamp(0, 255).byte()
    return _colorized(PIL.Image.fromarray(levels.numpy()))


def _colorized(grey: Image) -> Image:
    import PIL.ImageOps

    return PIL.ImageOps.colorize(grey, DARK, LIGHT, MIDDLE)
