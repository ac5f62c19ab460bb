"""The Hub's own client, silenced, with its errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from regsurgery.errors import HubError, in_short
from regsurgery.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def check_name(repo: str) -> None:
    """Raise `HubError` if `repo` is not a USER/NAME that the Hub accepts."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
        reason = None if repo.count("/") == 1 else "it must be USER/NAME"
    except HFValidationError as error:
        reason = in_short(error)
    if reason is not None:
        raise HubError(f"{repo}: not a valid repository name: {reason}")


@contextmanager
def client() -> Iterator[HfApi]:
    """The Hub's client, without progress bars and without warnings about retries."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    verbosity, silent = logging.get_verbosity(), are_progress_bars_disabled()
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        yield HfApi(library_name="regsurgery", library_version=__version__)
    finally:
        logging.set_verbosity(verbosity)
        if not silent:
            enable_progress_bars()


@contextmanager
def told(repo: str, again: str = "run it again") -> Iterator[None]:
    """Errors of the Hub or its client in the block become one line that says what to do; `again`: how to continue.

    Raises:
        HubError: instead of the client's errors.
    """
    from huggingface_hub import errors

    # The base error of the client's HTTP library, which is httpx in 1.x and httpx2 in 2.x. The client wraps upload
    # errors in a RuntimeError, and raises ValueError for answers that it does not understand.
    http_error: Any = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except (http_error, OSError, RuntimeError, ValueError) as error:
        raise HubError(f"{repo}: {_reason(error, again)}") from error


def _reason(error: BaseException, again: str) -> str:
    from huggingface_hub import errors

    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    text = in_short(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "no token; log in with `hf auth login`, or set HF_TOKEN"
    if not isinstance(error, errors.HfHubHTTPError):
        kept = (
            "the upload failed" if isinstance(error, (RuntimeError, ValueError)) else "the connection to the Hub broke"
        )
        return f"{kept} ({text}); {again}"
    status, said = error.response.status_code, (error.server_message or "").strip()
    said = " ".join(said.split())[:300]
    told = {
        401: "the Hub does not accept the token; log in again with `hf auth login`, or correct HF_TOKEN",
        403: "the token has no permission to write there; log in (hf auth login) with one that has",
        404: f"the repository or branch was not found; {again}",
        409: f"the repository has changed in the meantime; {again}",
        412: f"the repository has changed in the meantime; {again}",
        429: f"the Hub received too many requests; wait a few minutes, then: {again}",
    }.get(status)
    if told is None:
        told = f"the Hub failed; {again}" if status >= 500 else f"the Hub refuses: {said or text}; {again}"
    return f"{told} (HTTP {status}{': ' + said if said and said not in told else ''})"
