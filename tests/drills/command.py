"""The command line as drills use it: in a process of its own, or, where that is not the point, in this one."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
import sys

from regsurgery.cli.app import main
from regsurgery.settings import replaced
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


def in_process(arguments: str) -> Done:
    """`regsurgery ARGUMENTS` without the seconds that a process takes to import torch."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        replaced(sys, "argv", ["regsurgery", *shlex.split(arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def refused(done: Done) -> None:
    """Assert that a command ended with one line for its user's input."""
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code == 2 and len(errors) == 1 and "Traceback" not in done.err, done
