"""What regsurgery costs before it does anything: `--help`, completion and `import regsurgery` beside an empty Python.

    python benchmarks/startup.py --json benchmarks/startup.json     # half a minute

Every run is a fresh process; they take turns, so that a busy moment hits all alike. Seconds are the median, and `over`
is that less the median of `python -c pass`: what is ours. Two of each come first and are not counted, so files are in
memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import typer.main

from regsurgery.cli import app

PROGRAM = Path(sys.executable).parent / "regsurgery"
RUNS: dict[str, tuple[list[str], dict[str, str]]] = {
    "python -c pass": ([sys.executable, "-c", "pass"], {}),
    "import regsurgery": ([sys.executable, "-c", "import regsurgery"], {}),
    "regsurgery --help": ([str(PROGRAM), "--help"], {}),
    **{
        f"regsurgery {name} --help": ([str(PROGRAM), name, "--help"], {})
        for name in getattr(typer.main.get_command(app), "commands", ())
    },
    "completion of --recipe": (
        [str(PROGRAM)],
        {
            "_REGSURGERY_COMPLETE": "complete_bash",
            "COMP_WORDS": "regsurgery\npatch\ndemo\n--recipe\nv",
            "COMP_CWORD": "4",
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=None, help="also write the figures there")
    args = parser.parse_args()
    taken: dict[str, list[float]] = {name: [] for name in RUNS}
    for _ in range(2 + args.rounds):
        for name, (command, env) in RUNS.items():
            taken[name].append(seconds(command, env))
    median = {name: statistics.median(each[2:]) for name, each in taken.items()}
    empty = median["python -c pass"]
    figures: dict[str, Any] = {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "load_average": os.getloadavg()[0]},
        "rounds": args.rounds,
        "runs": {
            name: {
                "seconds": round(value, 3),
                "slowest": round(max(taken[name][2:]), 3),
                "over": round(value - empty, 3),
                "ratio": round(value / empty, 1),
            }
            for name, value in median.items()
        },
    }
    for name, row in figures["runs"].items():
        print(f"{name:28} {row['seconds']:6.3f} s  {row['over']:+.3f} s  {row['ratio']:5.1f} of an empty Python")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


def seconds(command: list[str], env: dict[str, str]) -> float:
    """Wall-clock time of one run, which must end well and print something unless it is Python's own."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, env={**os.environ, **env}, check=True)
    taken = time.perf_counter() - started
    if Path(command[0]) == PROGRAM and not done.stdout:
        raise SystemExit(f"{command}: printed nothing")
    return taken


if __name__ == "__main__":
    main()
