"""What a command takes as a process of its own: seconds, CPU seconds, and resident memory.

Memory is that of the command's process and of every process that it starts, added up. `/proc` is looked at ten times a
second; of the command's own process, the kernel's peak (VmHWM) counts where it is more. `peak_mb` has every resident
page, those of mapped files too, which the kernel can take back at any time; `own_mb` has anonymous and shared memory
alone. Linux only.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PERIOD = 0.1  # seconds between two looks
LINE = re.compile(r"^(VmHWM|VmRSS|RssAnon|RssShmem):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class Cost:
    """What a command took.

    Attributes:
        exit: its status; the negative number of the signal that ended it.
        cpu_seconds: of all its processes, user and system.
        peak_mb, own_mb: the most memory at one time in MiB, with and without pages of mapped files.
    """

    exit: int
    seconds: float
    cpu_seconds: float
    peak_mb: float
    own_mb: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(command: Sequence[str], output: Path) -> Cost:
    """Run `command` to its end; its stdout goes to the file `output`, its stderr beside it (`.stderr`)."""
    began = time.monotonic()
    with output.open("wb") as out, output.with_suffix(".stderr").open("wb") as err:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        looks = _Looks(child.pid)
        looks.start()
        try:
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = code = os.waitstatus_to_exitcode(status)
        finally:
            looks.over.set()
            looks.join()
            if child.returncode is None:
                child.kill()
                child.wait()
    seconds = time.monotonic() - began
    return Cost(code, seconds, usage.ru_utime + usage.ru_stime, looks.peak / 1024, looks.own / 1024)


class _Looks(threading.Thread):
    """Looks at the memory of a process and its descendants until `over` is set; peaks in KiB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.over, self.peak, self.own = pid, threading.Event(), 0, 0

    def run(self) -> None:
        while True:
            found = [memory for pid in _processes(self.pid) if (memory := _memory(pid))]
            resident = sum(memory["VmRSS"] for memory in found)
            own = sum(memory["RssAnon"] + memory["RssShmem"] for memory in found)
            self.peak = max(self.peak, resident, found[0]["VmHWM"] if found else 0)
            self.own = max(self.own, own)
            if self.over.wait(PERIOD):
                return


def _processes(pid: int) -> Iterator[int]:
    """`pid`, then its descendants, as far as they still run."""
    yield pid
    for task in Path("/proc", str(pid), "task").glob("*/children"):
        for child in _text(task).split():
            yield from _processes(int(child))


def _memory(pid: int) -> dict[str, int]:
    """The figures of `LINE` in KiB; none of a process that has ended."""
    return {name: int(size) for name, size in LINE.findall(_text(Path("/proc", str(pid), "status")))}


def _text(path: Path) -> str:
    """Of a file that may vanish with its process."""
    try:
        return path.read_text("utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return ""
