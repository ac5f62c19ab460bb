"""How a command ends: `main` turns an exception into one line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Callable

import typer

from regsurgery.cli.signals import EndedBySignal, ended_by_signals, forget
from regsurgery.errors import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, EXIT_OK, EXIT_USER_ERROR, RegsurgeryError

NOTHING_LEFT = (
    "nothing is left half written: run the same command again (a search for neurons continues where it stopped)"
)


def exit_code_of(command: Callable[[], int | None]) -> int:
    """Run `command`, which returns its exit code or raises; print one line for a user's error, or for a signal.

    Any other exception is a bug and passes through.
    """
    try:
        with ended_by_signals():
            code = command() or EXIT_OK
            sys.stdout.flush()
    except RegsurgeryError as error:
        _print_error(str(error))
        return error.exit_code
    except typer.TyperException as error:
        _print_error(_usage(error))
        return error.exit_code
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        code = EXIT_BROKEN_PIPE
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and "No usable temporary directory" not in str(error):  # tempfile's wording; torch needs one, too
            raise
        where = error.filename or "the output, or a temporary file"
        _print_error(f"{where}: {error.strerror}; free some space, or set TMPDIR to a folder that has it")
        forget(sys.stdout)
        return EXIT_USER_ERROR
    except EndedBySignal as end:
        _print_error(f"ended by {end.signal.name}; {NOTHING_LEFT}")
        return end.exit_code
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        code = EXIT_BROKEN_PIPE  # typer and rich exit with 1, which means a failed verification here
    if code == EXIT_INTERRUPTED:
        _print_error(f"interrupted; {NOTHING_LEFT}")
    if code == EXIT_BROKEN_PIPE:
        forget(sys.stdout)
        forget(sys.stderr)
    return code


def _print_error(message: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)


def _usage(error: typer.TyperException) -> str:
    """Typer's complaint about the command line, worded like all other errors."""
    context = getattr(error, "ctx", None)
    message = " ".join(error.format_message().split()).removesuffix(".")
    message = f"{message[:1].lower()}{message[1:]}{'' if message.endswith('?') else ';'}"
    if context is None:  # typer's parser does not say which command it was parsing
        return f"regsurgery: {message} see --help of the command"
    return f"{context.command_path}: {message} see {context.command_path} --help"
