"""What each mode costs in fidelity: one model patched in every mode, each folder compared with the original.

    python benchmarks/modes.py DIR --fit-images calibration --images labelled --json benchmarks/modes.json

The modes are fitted on one set of images and compared on another. `dead leaves` is native mode calibrated on generated
pictures instead. Figures are those of `regsurgery verify`; seconds are of the whole patch, recipe given.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import regsurgery

WAYS: dict[str, dict[str, Any]] = {
    "shift": {},
    "bias": {"mode": "bias"},
    "native, --no-calibrate": {"mode": "native", "calibrate": False},
    "native": {"mode": "native"},
    "native, dead leaves": {"mode": "native", "images": None, "calibrate": True},
    "native, 2 registers": {"mode": "native", "num_registers": 2},
    "native, 3 registers": {"mode": "native", "num_registers": 3},
    "native, 3, --no-calibrate": {"mode": "native", "num_registers": 3, "calibrate": False},
}
HEAD = ("KL", "same", "cos.patch", "outliers", "max norm", "worst", "register", "margin", "s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--recipe", default="vit-tiny")
    parser.add_argument("--fit-images", type=Path, required=True)
    parser.add_argument(
        "--images", type=Path, required=True, help="to compare on; none of them may be among the others"
    )
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures there, beside those of earlier ways"
    )
    args = parser.parse_args()
    figures = json.loads(args.json.read_text("utf-8")) if args.json and args.json.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="regsurgery-") as scratch:
        for index, name in enumerate(args.only):
            folder = Path(scratch) / str(index)
            started = time.perf_counter()
            given = {"recipe": args.recipe, "images": args.fit_images, **WAYS[name]}
            regsurgery.patch(args.model, folder, **given)
            seconds = time.perf_counter() - started
            verdict = regsurgery.verify(folder, images=args.images)
            figures[name] = {
                "KL": verdict.kl,
                "same": verdict.same_argmax,
                "cos.patch": verdict.cosine_patches,
                "outliers": verdict.outliers_per_image.patched,
                "max norm": verdict.max_patch_norm.patched,
                "worst": verdict.worst_patch_norm.patched,
                "register": verdict.register_norm,
                "margin": verdict.margin,
                "s": seconds,
            }
            if index == 0:
                print(f"{verdict.num_images} images; {'':10}" + "".join(f"{head:>10}" for head in HEAD))
            print(f"{name:26}" + "".join(f"{_text(figures[name][head]):>10}" for head in HEAD), flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 2 else f"{value:.1f}"


if __name__ == "__main__":
    main()
