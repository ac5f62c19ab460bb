"""The picture of a model card: patch norms before and after the surgery, as measured by the verification."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from regsurgery.verification.verdict import Verdict

PICTURE_NAME = "before_after.png"
MAP_SIDE, GAP, LABEL_WIDTH, TEXT_HEIGHT, FONT_SIZE = 160, 8, 72, 26, 14  # pixels
DARK, MIDDLE, LIGHT = "#000004", "#b63679", "#fcfdbf"  # of matplotlib's magma: its ends and its middle


def before_after(verdict: Verdict, folder: Path) -> str | None:
    """Draw `before_after.png` into `folder`; returns its name, or None if the verdict has no maps.

    One column per image, the original above the patched model, all maps on one logarithmic scale, which is stated below
    them. The same verdict gives the same bytes: no date, no software name, no fonts of the machine.
    """
    maps = verdict.norm_maps
    if maps is None:
        return None
    import PIL.Image
    import PIL.ImageDraw
    import PIL.ImageFont

    lowest = float(min(maps.original_ERC.min(), maps.patched_ERC.min()))
    highest = float(max(maps.original_ERC.max(), maps.patched_ERC.max()))
    rows = (("original", maps.original_ERC), ("patched", maps.patched_ERC))
    columns, (height, width) = len(maps.original_ERC), _size(maps.original_ERC)
    scale = f"patch norms after block {verdict.block}, logarithmic: {lowest:.3g} (dark) to {highest:.3g} (light)"
    font = PIL.ImageFont.load_default(FONT_SIZE)
    right = LABEL_WIDTH + max(columns * (width + GAP), round(font.getlength(scale)) + GAP)
    picture = PIL.Image.new("RGB", (right, GAP + 2 * (height + GAP) + TEXT_HEIGHT), "white")
    draw = PIL.ImageDraw.Draw(picture)
    for row, (label, norms_ERC) in enumerate(rows):
        top = GAP + row * (height + GAP)
        draw.text((GAP, top + height // 2), label, "black", font, anchor="lm")
        for column, norms_RC in enumerate(norms_ERC):
            tile = _coloured(norms_RC, lowest, highest).resize((width, height), PIL.Image.Resampling.NEAREST)
            picture.paste(tile, (LABEL_WIDTH + column * (width + GAP), top))
    draw.text((LABEL_WIDTH, GAP + 2 * (height + GAP) + TEXT_HEIGHT // 2 - 4), scale, "black", font, anchor="lm")
    picture.save(folder / PICTURE_NAME, "PNG", optimize=True)
    return PICTURE_NAME


def _size(norms_ERC: Tensor) -> tuple[int, int]:
    """Height and width in pixels of one map."""
    rows, columns = norms_ERC.shape[1:]
    longest = max(rows, columns)
    return round(MAP_SIDE * rows / longest), round(MAP_SIDE * columns / longest)


def _coloured(norms_RC: Tensor, lowest: float, highest: float) -> Image:
    import PIL.Image
    import PIL.ImageOps

    floor = max(lowest, 1e-6 * highest, 1e-12)  # norms may be 0
    top = max(math.log(max(highest, floor) / floor), 1e-12)
    levels = (255 / top * (norms_RC.double().clamp(min=floor) / floor).log()).round().clamp(0, 255).byte()
    grey = PIL.Image.fromarray(levels.numpy())
    return PIL.ImageOps.colorize(grey, DARK, LIGHT, MIDDLE)
