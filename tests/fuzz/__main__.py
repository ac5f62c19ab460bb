"""`python -m tests.fuzz --inputs 20000 --seed 0`; input 1234 alone: `--first 1234 --inputs 1`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.fuzz.run import fuzz


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input: to replay one that failed")
    parser.add_argument("--only", default="", help="kinds of damage whose name contains this")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for the inputs that fail")
    parser.add_argument("--stop-after", type=int, default=50, help="failures")
    args = parser.parse_args()
    outcome = fuzz(
        args.inputs, args.seed, only=args.only, first=args.first, keep=args.keep.absolute(), stop_after=args.stop_after
    )
    print(outcome.table())
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
