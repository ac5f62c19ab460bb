"""The process of the command line: `regsurgery`, `python -m regsurgery`, and so `torchrun -m regsurgery find ...`."""

from __future__ import annotations

import atexit
import os
import sys

from regsurgery.errors import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED


def run() -> None:
    """Entry point of the console script: `cli.main`, without Python's final garbage collection.

    That would walk all of torch and take 2 s.
    """
    try:
        from regsurgery.cli.app import main

        main()
    except KeyboardInterrupt:  # while the command line was imported
        print("error: interrupted before anything was done; run the same command again", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except SystemExit as end:
        if "torch" not in sys.modules or not (end.code is None or isinstance(end.code, int)):
            raise
        code = end.code or 0
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = EXIT_BROKEN_PIPE
    os._exit(code)


if __name__ == "__main__":
    run()
