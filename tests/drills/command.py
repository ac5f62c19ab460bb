"""The command line in a process of its own, as drills use it."""

from __future__ import annotations

import os
import subprocess

from tests.commands import PROGRAM, Done

SECONDS = 300


def command(arguments: str, before: str = "", after: str = "") -> Done:
    """`regsurgery ARGUMENTS` in bash, in offline mode; `before` and `after` it: limits, redirections.

    Raises:
        subprocess.TimeoutExpired: it does not end.
    """
    line = f"{before} {PROGRAM} {arguments} {after}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=SECONDS, env=dict(os.environ))
    return Done(done.returncode, done.stdout, done.stderr)


def refused(done: Done) -> None:
    """Assert that a command ended with one line for its user's input."""
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code == 2 and len(errors) == 1 and "Traceback" not in done.err, done
