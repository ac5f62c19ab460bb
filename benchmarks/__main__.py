"""The whole suite: `python -m benchmarks` (under 20 minutes on two cores), `--short` (under 3).

Writes `RESULTS.md` and `results.json` beside this file; parts that are not run keep their earlier figures there. The
exit status is 1 where a part failed; a goal that is missed is a result.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.full_size import PUBLISHED, SHAPES
from benchmarks.report import rendered, rounded
from benchmarks.suite import PARTS, Order, allowed, run_part

Run = Callable[[Order, Callable[[str], None]], dict[str, Any]]


def main(arguments: Sequence[str] | None = None, run: Run = run_part) -> int:
    args = _arguments(arguments)
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {line}", flush=True)

    form = "smoke" if args.smoke else "short" if args.short else "full"
    kept = args.output / "results.json"
    results = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
    for name in [name for name, record in results.items() if not _is_understood(name, record)]:
        say(f"{name}: the earlier figures are of another version of the suite; left out")
        del results[name]
    failed = []
    for name in [name for name in PARTS if name in args.only]:
        if args.device not in PARTS[name].devices:
            say(f"{name}: not on {args.device}")
            continue
        order = Order(
            name, form, args.device, args.threads, allowed(name, form, time.monotonic() - began),
            large=args.large and name == "patch", more=_more(name, args),
        )  # fmt: skip
        say(f"{name}: up to {order.seconds:.0f} s")
        record = run(order, lambda line, name=name: say(f"{name}: {line}"))
        say(f"{name}: {record['status']}")
        if record["status"] != "ok":
            failed.append(name)
        results[name if args.device == "cpu" else f"{name} ({args.device})"] = rounded(record)
        args.output.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        (args.output / "RESULTS.md").write_text(rendered(results), "utf-8")
    say(f"{args.output / 'RESULTS.md'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _is_understood(name: str, record: dict[str, Any]) -> bool:
    """Whether figures that were kept can still be shown."""
    try:
        rendered({name: record})
    except (KeyError, TypeError, AttributeError):
        return False
    return True


def _more(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What only the part `name` is told."""
    if name != "rehearsal":
        return {}
    return {"folder": str(args.output.absolute()), **({"models": args.models} if args.models else {})}


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="fewer models and rounds, under 3 minutes")
    parser.add_argument(
        "--only", type=_parts, default=[name for name, part in PARTS.items() if not part.asked], metavar="PART,...",
        help=f"{', '.join(PARTS)} (default: all but rehearsal, which takes hours and 30 GB of disk in FOLDER)",
    )  # fmt: skip
    parser.add_argument(
        "--models", type=_models, metavar="NAME,...",
        help=f"part rehearsal: {', '.join(PUBLISHED)} (default: all); those in FOLDER's rehearsal.json are left out",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the forwards run")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores, %(default)s")
    parser.add_argument(
        "--large", action="store_true", help="part patch: a checkpoint of 12 GB, too; half an hour, 36 GB of disk"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent, metavar="FOLDER", help="default: this folder"
    )
    parser.add_argument(
        "--smoke", action="store_true", help=argparse.SUPPRESS
    )  # that it runs; its figures mean nothing
    return parser.parse_args(arguments)


def _parts(text: str) -> list[str]:
    return _names(text, PARTS)


def _models(text: str) -> list[str]:
    return _names(text, SHAPES)


def _names(text: str, known: Iterable[str]) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
