"""The command line in a process of its own, for drills: a run of a second, at a moment that the drill picks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.drills.kills import PARTIAL

COMMAND = [sys.executable, "-m", "regsurgery"]


def patch(source: Path | str, out: Path, *more: object, **how: Any) -> subprocess.Popen[str]:
    """Start `regsurgery patch SOURCE --recipe demo -o OUT`; `how` goes to `Popen`, `env` is added to this process's."""
    arguments = ["patch", source, "--recipe", "demo", "--num-images", "8", "-q", "-o", out, *more]
    how.setdefault("preexec_fn", partial(signal.signal, signal.SIGHUP, signal.SIG_DFL))  # `nohup pytest` ignores it
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **how.pop("env", {})}
    return subprocess.Popen(
        [*how.pop("before", ()), *COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        **how,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr, of which an error has one line and no traceback."""
    _, said = process.communicate(timeout=120)
    assert "Traceback" not in said, said
    return process.returncode, said


def wait(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 60.0) -> bool:
    """Wait until `condition` holds or `process` ends; whether it came to hold."""
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.002)
    return False


def is_writing(folder: Path) -> Callable[[], object]:
    """Whether a run has begun to write `folder / "out"`: its folder is there, and a file in it."""
    return lambda: any(path.name != "owner.json" for path in folder.glob(f"{PARTIAL}/**/*") if path.is_file())
