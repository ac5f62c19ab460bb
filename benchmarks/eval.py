"""Every figure of `regsurgery eval`, for one model and its patched folders: the table of docs/evaluation.md.

    python benchmarks/eval.py shift=DIR native=DIR --images labelled --voc voc2007-subset --json benchmarks/eval.json

The original's figures stand beside each folder's. `--only TASK ...` runs some tasks and keeps what the file has of
others.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import regsurgery
from regsurgery.evaluation.result import cells
from regsurgery.evaluation.tasks import TASKS

SETTINGS: dict[str, dict[str, Any]] = {
    "norms": {"block": -2},
    "attention": {"block": -1},
    "fidelity": {},
    "classify": {},
    "controls": {},
    "latency": {},
    "lost": {},
    "knn": {},
    "probe": {},
}
IN_VOC_LAYOUT = ("lost",)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--images", type=Path, required=True, help="labelled")
    parser.add_argument("--voc", type=Path, help="in VOC layout, for object discovery")
    parser.add_argument("--only", nargs="+", choices=list(TASKS), metavar="TASK")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    args = parser.parse_args()
    figures = json.loads(args.json.read_text("utf-8")) if args.json and args.json.is_file() else {}
    for task in args.only or [task for task in TASKS if task in SETTINGS]:
        images = args.voc if task in IN_VOC_LAYOUT else args.images
        if images is None:
            continue
        for name, _, folder in (given.partition("=") for given in args.folders):
            found = regsurgery.evaluate(folder, task, images=images, **SETTINGS.get(task, {}))
            print(f"\n{task}, {name}: {found.images}")
            for row in cells(found)[1]:
                print("  " + "  ".join(row), flush=True)
            written = found.as_dict()
            kept = {key: written[key] for key in ("images", "num_images", "settings", "notes", "figures")}
            figures.setdefault(task, {})[name] = kept
            if args.json:
                args.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
