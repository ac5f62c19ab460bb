"""The parts of the suite: each is a process of its own, so that one that fails, or hangs, leaves the others alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

ROOT = Path(__file__).resolve().parents[1]
TAIL = 25  # lines of a part's output that are kept, for when it fails
GRACE = 150  # seconds that a part may take beyond those it is told, for what it has begun


@dataclass(frozen=True)
class Part:
    """Attributes:
    module: has `measure`; `seconds`: what it is told to keep to, by form.
    devices: where it means something.
    asked: it is run only where `--only` names it, and is told its seconds, however long the suite has run.
    """

    title: str
    module: str
    seconds: dict[str, float]
    devices: tuple[str, ...] = ("cpu",)
    asked: bool = False


# In the order in which they run: of those that nobody has to ask for, the last one takes as much time as there is.
PARTS = {
    "startup": Part("Start-up", "benchmarks.startup", {"full": 60, "short": 30}),
    "depth": Part("Time against depth", "benchmarks.depth", {"full": 60, "short": 20}),
    "patch": Part("`patch` against the size of the checkpoint", "benchmarks.write", {"full": 150, "short": 40}),
    "find": Part("`find`", "benchmarks.find", {"full": 300, "short": 60}),
    "latency": Part(
        "Forward: patched over original", "benchmarks.latency", {"full": 780, "short": 90}, ("cpu", "cuda")
    ),
    "rehearsal": Part("A rehearsal at full size", "benchmarks.rehearsal", {"full": 86400, "short": 3600}, asked=True),
}
LEAST = {
    "full": 400.0,
    "short": 45.0,
    "smoke": 60.0,
}  # seconds that a part may count on, also where others took too long
TOTAL = {"full": 1130.0, "short": 145.0, "smoke": 600.0}  # seconds of the whole suite, but for what then still runs


@dataclass(frozen=True)
class Order:
    """What a part is to do; `more`: keywords of its `measure`, besides those of every part."""

    name: str
    form: str
    device: str
    threads: int
    seconds: float
    large: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)


def allowed(name: str, form: str, elapsed: float) -> float:
    """Seconds that part `name` is told to keep to, once the suite has run for `elapsed`."""
    wanted = PARTS[name].seconds.get(form, TOTAL[form])
    if PARTS[name].asked:
        return wanted
    return min(wanted, max(LEAST[form], TOTAL[form] - elapsed))


def run_part(order: Order, say: Callable[[str], None]) -> dict[str, Any]:
    """Run one part in a process; its record: figures (those before it failed), status, error, machine and load."""
    record: dict[str, Any] = {
        "form": order.form,
        "device": order.device,
        "machine": machine(order.threads),
        "load_average": [_load()],
    }
    began = time.monotonic()
    limit = (3600.0 if order.large else order.seconds) + GRACE
    with tempfile.TemporaryDirectory(prefix="regsurgery-") as scratch:
        file = Path(scratch) / "figures.json"
        form = f"{order.form}-large" if order.large else order.form
        command = [
            sys.executable,
            "-m",
            "benchmarks.part",
            order.name,
            form,
            order.device,
            str(order.seconds),
            str(file),
            json.dumps(order.more),
        ]
        status, error = _watched(command, order.threads, limit, say)
        record["figures"] = json.loads(file.read_text("utf-8")) if file.is_file() else None
    record["seconds"] = time.monotonic() - began
    record["load_average"].append(_load())
    record["gpu"] = (record["figures"] or {}).pop("gpu", None)
    return {**record, "status": status, "error": error}


def _watched(command: list[str], threads: int, limit: float, say: Callable[[str], None]) -> tuple[str, str | None]:
    """Run `command` to its end, or for `limit` seconds; its lines are said. Status and, where it failed, the error."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1",
           "PYTHONUNBUFFERED": "1"}  # fmt: skip
    lines: deque[str] = deque(maxlen=TAIL)
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env,
        start_new_session=True,
    )  # fmt: skip
    too_long = threading.Event()

    def stop() -> None:
        too_long.set()
        _kill(child)

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        assert child.stdout is not None
        for line in child.stdout:
            lines.append(line.rstrip("\n"))
            say(lines[-1])
        code = child.wait()
    finally:
        timer.cancel()
        _kill(child)
    if too_long.is_set():
        return "failed", f"it took more than {limit:.0f} s and was ended; its last lines:\n" + "\n".join(lines)
    return ("ok", None) if code == 0 else ("failed", f"exit status {code}:\n" + "\n".join(lines))


def _kill(child: subprocess.Popen[str]) -> None:
    """End the part and what it started, which is a process group of its own."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    child.wait()


def _load() -> float:
    return round(os.getloadavg()[0], 2)
