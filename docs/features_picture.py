"""Draw the features of a few photos' patches as colours, before and after: the picture of docs/evaluation.md.

    python docs/features_picture.py PATCHED PHOTOS -o docs/images/features.png

Red, green and blue are the first three principal components of the tokens after the last block, over all the photos
drawn, as in the report. PATCHED is a folder that `regsurgery patch` wrote, PHOTOS a folder of images. Needs
`regsurgery[eval]`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

import regsurgery
from regsurgery.reporting.components import colours

SIDES = ("original", "patched")
TITLES = ("photo", "original", "patched", "original, in the\npatched model's colours")


def draw(patched: str, photos: str, count: int) -> Figure:
    """A row for each photo: each model with axes of its own, and the original with the patched model's."""
    sides = [
        regsurgery.observe(patched, photos, blocks=[-1], what=("blocks",), side=side, num_images=count)
        for side in SIDES
    ]
    (last,) = sides[0].blocks
    drawn = colours({side: seen.blocks[last][:, seen.patches] for side, seen in zip(SIDES, sides, strict=True)})
    maps = (drawn["own"]["original"], drawn["own"]["patched"], drawn["shared"]["original"])
    figure = Figure(figsize=(7.2, 1.75 * count + 0.4), layout="constrained")
    axes = figure.subplots(count, 4, squeeze=False)
    for title, axis in zip(TITLES, axes[0], strict=True):
        axis.set_title(title, fontsize=8)
    for number, row in enumerate(axes):
        row[0].imshow(sides[0].pictures[number].permute(1, 2, 0).numpy())
        for axis, colours_IN3 in zip(row[1:], maps, strict=True):
            axis.imshow(colours_IN3[number].reshape(*sides[0].grid, 3).cpu().numpy())
        for axis in row:
            axis.set_axis_off()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("patched", help="folder that regsurgery patch wrote")
    parser.add_argument("photos", help="folder of images")
    parser.add_argument("-n", "--count", type=int, default=4, help="number of photos")
    parser.add_argument("-o", "--output", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args()
    draw(args.patched, args.photos, args.count).savefig(args.output, dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()
