"""Dense evidence: correspondences, foregrounds and attention rollout, before and after the surgery.

    python -m benchmarks.dense shift=DIR native=DIR --images labelled --voc voc2007-subset --json benchmarks/dense.json

Each task sees every image of its kind, and every setting below is measured and kept; they were written down, and
committed, before the first figure was seen. The blocks are the one of LOST's best setting on the ViT-Ti, and its last.
The tables of docs/evaluation.md are rows of what this prints from the file, without measuring:

    python -m benchmarks.dense --json benchmarks/dense.json

with each folder's figure and, in brackets, the 95 % interval of its paired difference to the original (bootstrap over
the images). Intervals are of one figure each: nothing is chosen among them, and they are not corrected for their
number.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import regsurgery

KINDS = ("tokens", "queries", "keys", "values")
SETTINGS: dict[str, dict[str, Any]] = {
    "correspondence": {"kind": KINDS, "warp": ("homography", "mirror")},
    "foreground": {"kind": KINDS, "method": ("kmeans", "ncut")},
    "rollout": {},
}
OF_BLOCKS = ("correspondence", "foreground")
IN_VOC_LAYOUT = ("foreground", "rollout")
SIDES = ("original", "patched", "difference")


def measure(task: str, folder: str, images: Path, blocks: list[int]) -> dict[str, Any]:
    started = time.process_time()
    settings: dict[str, Any] = SETTINGS[task] | ({"block": blocks} if task in OF_BLOCKS else {})
    found = regsurgery.evaluate(folder, task, images=images, **settings)
    figures = {}
    for row in found.rows:
        name = "; ".join([row.name, *(str(value) for value in row.where.values() if value != "")])
        given = row.as_dict()
        figures[name] = {side: given[side] and [*map(_rounded, given[side].values())] for side in SIDES}
    return {
        "images": found.images,
        "mode": found.mode,
        "cpu_seconds": round(time.process_time() - started),
        "figures": figures,  # of each side: value, low, high, n
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def table(of_folders: dict[str, Any]) -> list[str]:
    """Markdown, line by line: a row for each figure; in brackets the interval of the difference to the original."""
    head = ["figure", "n", "original", *of_folders]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, figure in next(iter(of_folders.values()))["figures"].items():
        value, _, _, n = figure["original"]
        cells = [_patched(found["figures"][name]) for found in of_folders.values()]
        lines.append(f"| {' | '.join([name, str(n), f'{100 * value:.1f}', *cells])} |")
    return lines


def _patched(figure: dict[str, Any]) -> str:
    (value, *_), (_, low, high, _) = figure["patched"], figure["difference"]
    return f"{100 * value:.1f}" if low is None else f"{100 * value:.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="*", metavar="NAME=DIR")
    parser.add_argument("--images", type=Path, help="photos, for correspondences")
    parser.add_argument("--voc", type=Path, help="photos in VOC layout, for foregrounds and rollout")
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 11], metavar="BLOCK", help="default: 8 and 11")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="TASK")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="write there, beside what is there")
    args = parser.parse_args()
    kept = json.loads(args.json.read_text("utf-8")) if args.json.is_file() else {}
    for name, _, folder in (given.partition("=") for given in args.folders):
        for task in args.only:
            images = args.voc if task in IN_VOC_LAYOUT else args.images
            if images is not None:
                kept.setdefault(task, {})[name] = measure(task, folder, images, args.blocks)
                args.json.write_text(_dumped(kept), "utf-8")
                print(f"{task}, {name}: {kept[task][name]['cpu_seconds']} s of CPU", flush=True)
    for task, of_folders in kept.items():
        print(f"\n{task}, {next(iter(of_folders.values()))['images']}, %\n", *table(of_folders), sep="\n")


def _dumped(kept: dict[str, Any]) -> str:
    """JSON with a line for each figure."""
    return re.sub(r"\{[^{}]*\}", lambda figure: " ".join(figure[0].split()), json.dumps(kept, indent=1)) + "\n"


if __name__ == "__main__":
    main()
