"""SIGTERM and SIGHUP end the command line as Ctrl-C does: everything half written is removed on the way out."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from io import UnsupportedOperation
from types import FrameType
from typing import TextIO

ENDING = (signal.SIGTERM, signal.SIGHUP)
ONE_SIGNAL_SECONDS = 10.0  # coreutils' `timeout` sends two at once; the second must not cut off the removal


class EndedBySignal(SystemExit):
    """A signal ends the process; its exit code is 128 plus the signal's number, as in shells.

    It is no KeyboardInterrupt: with that, a user ends calibration and keeps its result.
    """

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__(self.exit_code)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """In the block, a signal of `ENDING` raises `EndedBySignal`, unless it was ignored before (`nohup`).

    Only in the main thread, which is the one that Python gives signals to; elsewhere nothing changes. After such a
    signal they stay, since the process ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last = None

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if last is not None and time.monotonic() - last < ONE_SIGNAL_SECONDS:
            return
        last = time.monotonic()
        _forget_lost_terminal()
        # Workers that got the signal as well, with all of the process group, may die of it: torch would raise that.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise EndedBySignal(number)

    before = {number: signal.getsignal(number) for number in ENDING}
    heard = [number for number in ENDING if before[number] is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, end)
    try:
        yield
    finally:
        if last is None:
            for number in heard:
                signal.signal(number, before[number])


def forget(stream: TextIO) -> None:
    """Discard what is still to be written to `stream`, without a message when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _forget_lost_terminal() -> None:
    """A progress bar on a terminal that was closed, which is what SIGHUP says, would end in another error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            os.write(stream.fileno(), b"")
        except UnsupportedOperation:  # no file
            continue
        except OSError:
            forget(stream)
