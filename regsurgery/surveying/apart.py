"""A process of its own for every stage: it may crash, and its peak memory is the stage's.

It is forked from a server that has imported the libraries and done nothing else, so that it begins at once and with
nothing of earlier stages in its memory. It ends with the process that started it, however that ends; where that is
ended by a signal, it removes first what it has half written.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from regsurgery.errors import UserError

IMPORTED = ("torch", "transformers", "timm", "open_clip", "regsurgery.surveying.work")
ENDED_BY_USER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TIDYING_SECONDS = 5.0  # to remove what is half written


def run_apart(function: Callable[..., None], *arguments: Any, log: Path) -> int:
    """Call `function(*arguments)` in a process of its own, which prints into the file `log`; its exit code.

    The code is that of `multiprocessing`: 0, 1 after an exception, minus the number of a signal that killed it; or 128
    and the number of a signal after which it tidied up.

    Raises:
        UserError: somebody ended the process, by a signal such as a shell sends.
    """
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload(list(IMPORTED))  # which `spawn` does not use
    process = context.Process(target=_called, args=(function, arguments, str(log)))
    process.start()
    try:
        process.join()
    finally:
        _end(process)
    code = process.exitcode
    assert code is not None
    if -code in ENDED_BY_USER or code - 128 in ENDED_BY_USER:
        raise UserError(f"{log}: its process was ended by {ended(code)}; run the same command again to continue")
    return code


def ended(code: int) -> str:
    """How a process ended, from its exit code: the signal's name, or the code."""
    number = -code if code < 0 else code - 128
    return signal.Signals(number).name if number in set(signal.Signals) else f"exit code {code}"


def _end(process: BaseProcess) -> None:
    """End a process that may have ended, letting it tidy up first."""
    process.terminate()
    process.join(TIDYING_SECONDS)
    process.kill()
    process.join()


def _called(function: Callable[..., None], arguments: tuple[Any, ...], log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):  # also what libraries print from C
        os.dup2(file, stream)
    for number in ENDED_BY_USER:  # Ctrl-C goes to all of the group
        signal.signal(number, _tidy_up)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        function(*arguments)
    finally:
        atexit._run_exitfuncs()  # which remove temporary folders; processes of `multiprocessing` do not call them


def _tidy_up(number: int, frame: FrameType | None) -> None:
    """End the process by an exception that nothing catches: what is half written is removed on its way."""
    for each in ENDED_BY_USER:
        signal.signal(each, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise that workers have got the signal too
    sys.exit(128 + number)


def _end_with_parent() -> None:
    """Otherwise a stage would go on after `kill -9` of the survey, beside the one that continues it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
