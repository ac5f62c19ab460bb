"""The exception tree and its exit codes.

Every error that a user can cause or act on is a `UserError`: one line that says what went wrong, where, and what to
do next. The command line prints it without a traceback. Anything else is a bug: it keeps its traceback, and the process
ends with `EXIT_BUG`.
"""

from __future__ import annotations

import re
from typing import Any

EXIT_OK = 0
EXIT_VERIFICATION_FAILED = 1
EXIT_DIFFERENT = 1  # for `diff`, as for the Unix tool
EXIT_USER_ERROR = 2
EXIT_NOTHING_TO_FIX = 3
EXIT_BUG = 70  # as in sysexits.h: EX_SOFTWARE
EXIT_NO_MEMORY = 71  # EX_OSERR
EXIT_INTERRUPTED = 130  # as in shells: 128 plus the number of the signal
EXIT_BROKEN_PIPE = 141
ENDLESS = re.compile(r"\S{1024,}")  # a config may name a class of any length

LISTED = "regsurgery families lists what is supported"  # what next, for a model that is refused


class RegsurgeryError(Exception):
    """Root of the project's own errors. Of a name that is endless its message has the beginning and the end."""

    exit_code = EXIT_USER_ERROR

    def __init__(self, message: str = "") -> None:
        super().__init__(ENDLESS.sub(lambda found: f"{found[0][:200]}[…]{found[0][-100:]}", message))


class UserError(RegsurgeryError):
    """The user's input, machine or files are at fault; the message says what, where and what next."""


class ModelNotFoundError(UserError):
    """No folder, Hub repository or library entry has the given model id."""


class CheckpointError(UserError):
    """A checkpoint file is broken, incomplete or of a refused kind; the message names the file and the tensor."""


class RecipeError(UserError):
    """A recipe is malformed or does not fit the model."""


class OutputError(UserError):
    """The output folder cannot be written."""


class HubError(UserError):
    """The Hugging Face Hub refuses, fails or cannot be reached; no half-finished checkpoint is left there."""


class UnsupportedModelError(UserError):
    """The model's graph has no site for the surgery; the message names the reason and the node."""


class SeveralStreamsError(UnsupportedModelError):
    """Several streams of tokens match, and none was named; the message lists the modules that they are in."""


class VerificationError(RegsurgeryError):
    """The patched model fails its verification; nothing is left on disk."""

    exit_code = EXIT_VERIFICATION_FAILED


class BrokenModelError(VerificationError):
    """What was written cannot be loaded or run, which no recipe is to blame for; nothing is left on disk."""


class NothingToFixError(RegsurgeryError):
    """Surgery would not help: there are no outliers, or no neurons cause them; `diagnosis` says which.

    Attributes:
        diagnosis: a `search.diagnosis.Diagnosis`; not imported, because every other file imports this one.
    """

    exit_code = EXIT_NOTHING_TO_FIX

    def __init__(self, diagnosis: Any) -> None:
        super().__init__(diagnosis.reason)
        self.diagnosis = diagnosis

    def __reduce__(self) -> Any:
        return type(self), (self.diagnosis,)


class PassError(RegsurgeryError):
    """A pass produced a graph that breaks the graph spec. This is a bug in regsurgery; the message names the pass."""


def in_short(error: BaseException, most: int = 300) -> str:
    """What a library says is wrong, on one line of at most `most` characters; the kind of error if it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def library_fails(library: str, where: object, error: BaseException) -> CheckpointError:
    """The error for what a `library` cannot load from the folder or file `where`, with what to do."""
    return CheckpointError(
        f"{where}: {library} cannot load it: {in_short(error)}; correct what this names, or get the files again (if "
        f"{library} alone loads them, please report this)"
    )


def did_you_mean(word: str, known: list[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest of `known`, or an empty string."""
    import difflib

    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def several(paths: list[str]) -> str:
    """What a `SeveralStreamsError` says of the modules with these paths."""
    return f"{len(paths)} streams of tokens match; name the one to patch: --tower {' or --tower '.join(paths)}"
