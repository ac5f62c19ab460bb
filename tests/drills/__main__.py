"""`python -m tests.drills [NAME ...]`: run drills, print a row of a table for each; exit code 1 if a promise broke."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
from pathlib import Path

from tests.drills import OFTEN, drills, promise


def main() -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[OFTEN] = "1"
    known = drills()
    parser = argparse.ArgumentParser(prog="python -m tests.drills", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--list", action="store_true", help="print what each drill is about, and run none")
    args = parser.parse_args()
    for name in args.names:
        if name not in known:
            parser.error(f"{name}: no such drill; there are {', '.join(known)}")
    chosen = args.names or list(known)
    if args.list:
        for name in chosen:
            print(f"{name}: {promise(known[name])}")
        return 0
    broken = 0
    print("| drill | tries | outcome |\n| --- | --- | --- |", flush=True)
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="drill-") as place:
            try:
                row = known[name](Path(place))
            except Exception:
                traceback.print_exc()
                print(f"| {name} | | BROKEN |", flush=True)
                broken += 1
            else:
                print(f"| {name} | {row.tries} | {row.outcome} |", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
