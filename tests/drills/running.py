"""The command line in a process of its own, for drills: a run of a second, at a moment that the drill picks.

The process is forked from one that has imported everything: importing takes five times as long as the run.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import psutil

PARTIAL = ".out.partial-*"
ENDING = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 130}  # exit codes
COMMAND = [sys.executable, "-m", "regsurgery"]


class Process(Protocol):
    """What drills need of a process; that of `subprocess` has it too."""

    pid: int

    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def send_signal(self, number: int, /) -> None: ...
    def communicate(self, *, timeout: float | None = None) -> tuple[str, str]: ...


class Forked:
    """`regsurgery ARGUMENTS` in a new process.

    Args:
        env: added to the environment.
        cwd: its working directory; this process's by default.
        prepare: called in the new process before anything else; a function of a module.
        start_new_session: in a process group of its own.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        prepare: Callable[[], object] | None = None,
        start_new_session: bool = False,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.drills.preloaded"])
        self.streams = Path(tempfile.mkdtemp(prefix="drill-"))
        (self.streams / "stderr").touch()
        how = (list(arguments), str(self.streams), dict(env or {}), cwd or Path.cwd(), prepare, start_new_session)
        self.process = context.Process(target=_run, args=how)
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int, /) -> None:
        if self.process.is_alive():
            os.kill(self.pid, number)

    def communicate(self, *, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to stdout and stderr, after its end.

        Raises:
            TimeoutError: it does not end in `timeout` seconds.
        """
        self.process.join(timeout)
        if self.process.is_alive():
            raise TimeoutError(f"process {self.pid} has not ended after {timeout} s")
        out, err = ((self.streams / name).read_text("utf-8") for name in ("stdout", "stderr"))
        shutil.rmtree(self.streams)
        return out, err


def _run(
    arguments: list[str],
    streams: str,
    env: dict[str, str],
    cwd: Path,
    prepare: Callable[[], object] | None,
    start_new_session: bool,
) -> None:
    from regsurgery.__main__ import run

    if start_new_session:
        os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(streams) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
        setattr(sys, name, open(number, "w", encoding="utf-8", buffering=1, closefd=False))  # noqa: SIM115
    os.environ.update(env)
    tempfile.tempdir = None  # as TMPDIR says now
    os.chdir(cwd)
    if prepare is not None:
        prepare()
    sys.argv = ["regsurgery", *arguments]
    run()


def heard_signals() -> None:
    """In the new process: signals are as a terminal gives them, whatever this one was started with."""
    for number in ENDING:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def at_the_hub() -> None:
    """In the new process, huggingface_hub reads the environment again; see `tests.hub.commands.environment`."""
    import huggingface_hub.constants

    heard_signals()
    importlib.reload(huggingface_hub.constants)


def forked_stages() -> None:
    """In the new process, stages of a survey are forked from it, which has imported everything, and not from a server,
    which would import it again.
    """
    heard_signals()
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork  # type: ignore[assignment]


def patch(
    source: Path | str,
    out: Path,
    *more: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    prepare: Callable[[], object] = heard_signals,
    start_new_session: bool = False,
    before: Sequence[str] = (),
) -> Process:
    """Start `regsurgery patch SOURCE --recipe demo -o OUT`; see `Forked`.

    Args:
        before: words before the command, which is then started anew, not forked.
    """
    words = [str(word) for word in ("patch", source, "--recipe", "demo", "--num-images", 8, "-q", "-o", out, *more)]
    if not before:
        return Forked(words, env, cwd, prepare, start_new_session)
    return subprocess.Popen(
        [*before, *COMMAND, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **(env or {})},
        cwd=cwd,
    )


def gone(group: int, seconds: float = 30.0) -> None:
    """Wait until no process of the group runs.

    Raises:
        TimeoutError: one does not end.
    """
    until = time.monotonic() + seconds
    while any(_group(process) == group for process in psutil.process_iter()):
        if time.monotonic() > until:
            raise TimeoutError(f"a process of the group {group} has not ended after {seconds} s")
        time.sleep(0.01)


def _group(process: psutil.Process) -> int | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else os.getpgid(process.pid)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None


def ended(process: Process) -> tuple[int, str]:
    """Exit code and stderr, of which an error has one line and no traceback."""
    _, said = process.communicate(timeout=120)
    assert "Traceback" not in said, said
    assert process.returncode is not None
    return process.returncode, said


def wait(condition: Callable[[], object], process: Process, seconds: float = 60.0) -> bool:
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
