"""What regsurgery costs before it does anything: `--help`, completion and `import regsurgery` beside an empty Python.

    python -m benchmarks.startup     # half a minute

Every run is a fresh process; they take turns, so that a busy moment hits all alike. Seconds are the median, and `over`
is that less the median of `python -c pass`: what is ours. Two of each come first and are not counted, so files are in
memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import typer.main

from regsurgery.cli.app import app
from regsurgery.errors import RegsurgeryError
from regsurgery.evaluation.timing import median, turns

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

FORMS = {"full": (10, len(RUNS)), "short": (5, 3), "smoke": (4, 3)}  # rounds of the suite, and how many of the runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=None, help="also write the figures there")
    args = parser.parse_args()
    figures = compare(args.rounds, RUNS)
    for name, row in figures["runs"].items():
        print(
            f"{name:28} {row['seconds']['value']:6.3f} s  {row['over']:+.3f} s  {row['ratio']:5.1f} of an empty Python"
        )
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


def measure(form: str, device: str, limit: float, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The suite's part `startup`; yields the figures once."""
    rounds, count = FORMS[form]
    figures = compare(rounds, dict(islice(RUNS.items(), count)))
    say(", ".join(f"{name} {row['seconds']['value']:.3f} s" for name, row in islice(figures["runs"].items(), 3)))
    yield figures


def compare(rounds: int, runs: Mapping[str, tuple[list[str], dict[str, str]]]) -> dict[str, Any]:
    """Seconds of each of `runs`, every one a fresh process."""
    ways = {name: partial(run, command, env) for name, (command, env) in runs.items()}
    taken = list(islice(turns(ways), rounds))
    median_of = {name: median([each[name] for each in taken]) for name in runs}
    empty = median_of["python -c pass"].value
    return {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "load_average": os.getloadavg()[0]},
        "rounds": rounds,
        "runs": {
            name: {
                "seconds": found.as_dict(),
                "slowest": max(each[name] for each in taken),
                "over": found.value - empty,
                "ratio": found.value / empty,
            }
            for name, found in median_of.items()
        },
    }


def run(command: list[str], env: dict[str, str]) -> None:
    """One run, which must end well and print something unless it is Python's own."""
    done = subprocess.run(command, capture_output=True, env={**os.environ, **env}, check=True)
    if Path(command[0]) == PROGRAM and not done.stdout:
        raise RegsurgeryError(f"{command}: printed nothing")


if __name__ == "__main__":
    main()
