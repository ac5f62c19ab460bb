"""Draw patch norms and attention maps of a few photos, before and after: the picture of the README.

    python docs/picture.py PATCHED PHOTOS -o docs/images/before-after.png

PATCHED is a folder that `regsurgery patch` wrote, PHOTOS a folder of images. Needs `regsurgery[eval]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

import regsurgery

TITLES = ("photo", "patch norm\noriginal", "patch norm\npatched", "attention of the\nclass token, original",
          "attention of the\nclass token, patched")  # fmt: skip


def draw(patched: str, photos: str, count: int) -> Figure:
    """A row for each photo: norms before the last block, and the last block's attention, mean over its heads."""
    sides = [
        regsurgery.observe(patched, photos, blocks=[-2, -1], what=("blocks", "attention"), side=side, num_images=count)
        for side in ("original", "patched")
    ]
    before_last, last = sorted(sides[0].blocks)
    norms = [seen.blocks[before_last][:, seen.patches].norm(dim=-1) for seen in sides]
    attention = [seen.attention[last][:, :, 0, seen.attended_patches].mean(dim=1) for seen in sides]
    figure = Figure(figsize=(9, 1.55 * count + 0.4), layout="constrained")
    axes = figure.subplots(count, 5, squeeze=False)
    for title, axis in zip(TITLES, axes[0], strict=True):
        axis.set_title(title, fontsize=8)
    for row, number in zip(axes, range(count), strict=True):
        row[0].imshow(sides[0].pictures[number].permute(1, 2, 0).numpy())
        maps: Sequence[Tensor] = [one[number].reshape(sides[0].grid).cpu() for one in (*norms, *attention)]
        for axis, one in zip(row[1:], maps, strict=True):
            figure.colorbar(axis.imshow(one.numpy()), ax=axis, fraction=0.046).ax.tick_params(labelsize=6)
        for axis in row:
            axis.set_axis_off()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("patched", help="folder that regsurgery patch wrote")
    parser.add_argument("photos", help="folder of images")
    parser.add_argument("-n", "--count", type=int, default=3, help="number of photos")
    parser.add_argument("-o", "--output", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args()
    draw(args.patched, args.photos, args.count).savefig(args.output, dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()
