"""Signals to `patch` while it writes."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import time
from pathlib import Path

from regsurgery.checkpoints.sums import check_sums
from tests.drills import Row, drill, tries
from tests.drills.running import ENDING, ended, is_writing, patch, wait

DELAYS = (0.0, 0.2)  # seconds after the first byte is written


def clean(place: Path) -> tuple[Path, Path]:
    """New folders for output and temporary files."""
    shutil.rmtree(place, ignore_errors=True)
    for name in ("target", "tmp"):
        (place / name).mkdir(parents=True)
    return place / "target", place / "tmp"


@drill
def ended_by_signals(place: Path) -> Row:
    """SIGTERM, SIGHUP and SIGINT, to a process or its group, remove what is half written; the exit code names it."""
    tried = 0
    for number, code in ENDING.items():
        for delay in DELAYS[: tries(1, 2)]:
            for group in (False, True):
                target, tmp = clean(place / "run")
                process = patch("demo", target / "out", env={"TMPDIR": str(tmp)}, start_new_session=True)
                assert wait(is_writing(target), process), process.communicate()
                time.sleep(delay)
                (os.killpg if group else os.kill)(process.pid, number)
                found, said = ended(process)
                assert found == code and said.startswith("error: ") and said.count("\n") == 1, (found, said)
                assert not list(target.iterdir()) and not list(tmp.iterdir()), list(place.rglob("*"))
                tried += 1
    return Row(tried, "exit codes 143, 129, 130; one line; nothing left beside the output or in TMPDIR")


@drill
def ended_twice(place: Path) -> Row:
    """A second SIGTERM at once, as `timeout` sends it, does not cut off the removal."""
    count = tries(2, 5)
    for _ in range(count):
        target, tmp = clean(place / "run")
        process = patch("demo", target / "out", env={"TMPDIR": str(tmp)})
        assert wait(is_writing(target), process)
        for _ in range(20):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.005)
        assert ended(process)[0] == 143
        assert not list(target.iterdir()) and not list(tmp.iterdir()), list(place.rglob("*"))
    return Row(count, "exit code 143, nothing left")


@drill
def the_terminal_is_closed(place: Path) -> Row:
    """A terminal that is closed ends a run with its progress bar; one under `nohup` goes on."""
    target, tmp = clean(place / "run")

    def opened(ignored: bool) -> int:
        process, terminal = pty.fork()
        if process == 0:
            signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
            os.environ["TMPDIR"] = str(tmp)
            arguments = ["-m", "regsurgery", "patch", "demo", "--recipe", "demo", "--num-images", "8", "-o", "out"]
            if ignored:
                arguments = [*arguments, "-q"]
            os.chdir(target)
            os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
            import sys

            os.execv(sys.executable, [sys.executable, *arguments])
        until = time.monotonic() + 60
        while not is_writing(target)() and time.monotonic() < until:
            time.sleep(0.002)
        os.close(terminal)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    assert opened(ignored=False) == 129
    assert not list(target.iterdir()) and not list(tmp.iterdir()), list(place.rglob("*"))
    assert opened(ignored=True) == 0
    check_sums(target / "out")
    return Row(2, "closed: exit code 129, nothing left; with SIGHUP ignored: the folder is whole")


@drill
def stopped_and_continued(place: Path) -> Row:
    """SIGSTOP and SIGCONT at any moment change nothing, and meanwhile another run takes nothing for abandoned."""
    target, tmp = clean(place / "run")
    process, stops = patch("demo", target / "out", env={"TMPDIR": str(tmp)}), 0
    assert wait(is_writing(target), process)
    while process.poll() is None and stops < 20:
        process.send_signal(signal.SIGSTOP)
        stops += 1
        if stops == 1:
            other = patch("demo", target / "out", env={"TMPDIR": str(tmp)})
            assert ended(other)[0] == 0
            check_sums(target / "out")
            (target / "out").rename(target / "other")
            assert is_writing(target)()
        time.sleep(0.02)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.03)
    assert ended(process)[0] == 0
    check_sums(target / "out")
    assert (target / "out" / "SHA256SUMS").read_bytes() == (target / "other" / "SHA256SUMS").read_bytes()
    assert sorted(path.name for path in target.iterdir()) == ["other", "out"] and not list(tmp.iterdir())
    return Row(stops, "the folder is whole; another run beside it wrote the same")
