"""The process of the command line: `regsurgery`, `python -m regsurgery`, and so `torchrun -m regsurgery find ...`."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
import traceback

from regsurgery.errors import EXIT_BROKEN_PIPE, EXIT_BUG, EXIT_INTERRUPTED, EXIT_NO_MEMORY
from regsurgery.garbage import collect_seldom
from regsurgery.memory import shortage

TORCH_BYTES = 4 << 30  # of address space, with all that a command imports


def run() -> None:
    """Entry point of the console script: `cli.main`, without Python's final garbage collection.

    That would walk all of torch and take 2 s. An exception that nothing handles ends with `EXIT_BUG`, not with
    Python's 1, which means a failed verification here.
    """
    _open_standard_streams()
    _note_small_limit()
    collect_seldom()
    code = 0
    try:
        from regsurgery.cli.app import main

        main()
    except KeyboardInterrupt:  # while the command line was imported
        print("error: interrupted before anything was done; run the same command again", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except SystemExit as end:
        if "torch" not in sys.modules or not (end.code is None or isinstance(end.code, int)):
            raise
        code = end.code or 0
    except Exception as error:
        code = _crashed(error)
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = EXIT_BROKEN_PIPE
    except OSError:  # the command has said it, or cannot
        code = code or EXIT_BUG
    os._exit(code)


def _open_standard_streams() -> None:
    """Send closed standard streams (`>&-`) to the null device.

    Otherwise the next file that is opened would take the stream's number, and what libraries print would go into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
        elif number == 1 and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(
                errors="backslashreplace"
            )  # what the terminal's encoding lacks; stderr does so itself


def _note_small_limit() -> None:
    """Say what a limit means under which torch cannot be imported: its C++ may abort without a word of ours."""
    if sys.platform == "win32":
        return
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit not in (resource.RLIM_INFINITY, -1) and limit < TORCH_BYTES:
        with contextlib.suppress(OSError):
            print(
                f"note: the limit of {limit >> 20} MiB (ulimit -v) is less than torch takes to start", file=sys.stderr
            )


def _crashed(error: Exception) -> int:
    """Say what an exception that nothing handled means; the exit code."""
    short = shortage(error)
    with contextlib.suppress(OSError):
        if short is None:
            traceback.print_exception(error)
            print(
                f"error: this is a bug in regsurgery (exit code {EXIT_BUG}): please report the lines above",
                file=sys.stderr,
            )
        else:
            print(f"error: {short}", file=sys.stderr)
    return EXIT_BUG if short is None else EXIT_NO_MEMORY


if __name__ == "__main__":
    run()
