"""The moments at which a run writes: what Python does to files below a folder, seen by an audit hook.

A run is stopped at the first moment at which none was stopped before, so that each further run goes one moment on. No
drill has to guess how long anything takes. What Rust and C++ write is between two moments.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = {
    "open": 0,
    "os.mkdir": 0,
    "os.rename": 1,
    "os.remove": 0,
    "os.rmdir": 0,
}  # audit event: argument with the path
PARTIAL = re.compile(r"\.partial-[0-9a-f]{8}.*")


def stopped_at_new(prepare: Callable[[], object], folder: Path, seen: Path, number: int, group: bool) -> None:
    """In the new process and those that it forks: at the first moment that the file `seen` does not list, add it there,
    and send signal `number` to the new process, or to its `group`, which is its own.

    Args:
        prepare: is called first.
    """
    prepare()
    process, known = os.getpid(), set(seen.read_text("utf-8").splitlines())
    inside = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal inside
        if inside or event not in EVENTS:
            return
        inside = True
        try:
            moment = _moment(event, arguments, folder)
            if moment is not None and moment not in known:
                with seen.open("a", encoding="utf-8") as file:
                    file.write(f"{moment}\n")
                known.add(moment)
                (os.killpg if group else os.kill)(process, number)
                if number == signal.SIGKILL:
                    signal.pause()  # where it is another process that was killed, until that is noticed
        finally:
            inside = False

    sys.addaudithook(hook)


def _moment(event: str, arguments: tuple[Any, ...], folder: Path) -> str | None:
    path = arguments[EVENTS[event]]
    if not isinstance(path, (str, os.PathLike)) or (event == "open" and not arguments[2] & WRITES):
        return None
    try:
        inner = Path(path).relative_to(folder)
    except ValueError:
        return None
    return f"{event} {PARTIAL.sub('.partial', str(inner))}"
