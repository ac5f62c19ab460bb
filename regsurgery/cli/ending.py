"""How a command ends: `main` turns an exception into one line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Callable

import typer

from regsurgery.cli.signals import EndedBySignal, ended_by_signals, forget
from regsurgery.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_INTERRUPTED,
    EXIT_NO_MEMORY,
    EXIT_OK,
    EXIT_USER_ERROR,
    RegsurgeryError,
)
from regsurgery.memory import shortage
from regsurgery.plain import line

NOTHING_LEFT = (
    "nothing is left half written: run the same command again (a search for neurons continues where it stopped)"
)


def exit_code_of(command: Callable[[], int | None]) -> int:
    """Run `command`, which returns its exit code or raises; print one line for an error, little memory or a signal.

    Any other exception is a bug and passes through; see `__main__.run`.
    """
    try:
        with ended_by_signals():
            code = command() or EXIT_OK
            sys.stdout.flush()
    except RegsurgeryError as error:
        short = shortage(error)
        print_error(str(error) if short is None else f"{short} ({error})")
        return error.exit_code if short is None else EXIT_NO_MEMORY
    except typer.TyperException as error:
        print_error(_usage(error))
        return error.exit_code
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        code = EXIT_BROKEN_PIPE
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and "No usable temporary directory" not in str(error):  # tempfile's wording; torch needs one, too
            return _short_of_memory(error)
        where = error.filename or "standard output, or a temporary file"  # a folder may be there all the same
        remedy = "free some space, or set TMPDIR to a folder that has it; what was to be written is whole, or not there"
        print_error(f"{where}: {error.strerror}; {remedy}")
        forget(sys.stdout)
        return EXIT_USER_ERROR
    except EndedBySignal as end:
        print_error(f"ended by {end.signal.name}; {NOTHING_LEFT}")
        return end.exit_code
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        code = EXIT_BROKEN_PIPE  # typer and rich exit with 1, which means a failed verification here
    except (ImportError, MemoryError, RuntimeError) as error:
        return _short_of_memory(error)
    if code == EXIT_INTERRUPTED:
        print_error(f"interrupted; {NOTHING_LEFT}")
    if code == EXIT_BROKEN_PIPE:
        forget(sys.stdout)
        forget(sys.stderr)
    return code


def _short_of_memory(error: Exception) -> int:
    """Say that memory is short, if that is what `error` means; otherwise raise it again."""
    short = shortage(error)
    if short is None:
        raise error
    print_error(short)
    return EXIT_NO_MEMORY


def print_error(message: str) -> None:
    """One line on stderr, in which nothing acts on a terminal."""
    with contextlib.suppress(OSError):  # stderr is closed or full
        print(f"error: {line(message)}", file=sys.stderr)


def _usage(error: typer.TyperException) -> str:
    """Typer's complaint about the command line, worded like all other errors."""
    context = getattr(error, "ctx", None)
    message = " ".join(error.format_message().split()).removesuffix(".")
    message = f"{message[:1].lower()}{message[1:]}{'' if message.endswith('?') else ';'}"
    if context is None:  # typer's parser does not say which command it was parsing
        return f"regsurgery: {message} see --help of the command"
    return f"{context.command_path}: {message} see {context.command_path} --help"
