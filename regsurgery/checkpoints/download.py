"""Downloads through huggingface_hub, and what it recorded on disk about the files it downloaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from regsurgery.errors import ModelNotFoundError

SHA256 = re.compile(r"[0-9a-f]{64}")
BELOW_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)/([\w./-]*[\w.-])/*")
CLOCK_SECONDS = 1.0  # a file may be this much newer than its metadata; huggingface_hub allows the same


def published_sha256(path: Path) -> str | None:
    """The sha256 under which the Hub published the file `path`, if a download recorded it; `path` is not read.

    In the cache a large file is a symbolic link to `blobs/SHA256`. `hf download --local-dir DIR` writes
    `DIR/.cache/huggingface/download/NAME.metadata`: commit, etag and time, one per line. The etag of a large file is
    its sha256. A file that was changed later counts as unknown, like one that never came from the Hub.
    """
    if path.is_symlink():
        blob = path.resolve()
        return blob.name if blob.parent.name == "blobs" and SHA256.fullmatch(blob.name) else None
    metadata = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    try:
        _, etag, written = metadata.read_text("utf-8").splitlines()
        known = path.stat().st_mtime - CLOCK_SECONDS <= float(written)
    except (OSError, ValueError):
        return None
    return etag if known and SHA256.fullmatch(etag) else None


def snapshot(
    repo: str,
    named: str,
    revision: str | None,
    patterns: Sequence[str] | None = None,
    ignored: Sequence[str] | None = None,
) -> tuple[Path, str]:
    """The files of a Hub repository, in the cache, and their commit.

    Args:
        named: the user's name for it, for the message.
        patterns: for the files that are needed; default: all. `*` matches `/` too.
        ignored: for those of them that are not.

    Raises:
        ModelNotFoundError: there is no such repository or revision, or it needs a token, or it cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    named = named[:300]
    try:
        path = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=None if patterns is None else list(patterns),
            ignore_patterns=None if ignored is None else list(ignored),
        )
    except errors.HFValidationError as error:
        below = BELOW_REPOSITORY.fullmatch(repo)
        inside = f"; is {below[2]} a folder inside {below[1]}? Give it as --subfolder {below[2]}" if below else ""
        raise ModelNotFoundError(
            f"{named}: no such file or folder, and not a Hub id, which is USER/NAME{inside or '; check the spelling'}"
        ) from error
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{named}: the Hub gives it only to those who accepted its terms: accept them on "
            f"{huggingface_hub.constants.ENDPOINT}/{repo}, and log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{named}: no such file or folder, and no such model on the Hub; check the spelling, or, if it is private, "
            "log in with `hf auth login`"
        ) from error
    except (errors.RevisionNotFoundError, UnicodeEncodeError) as error:  # the latter: half a pair of surrogates
        raise ModelNotFoundError(f"{named}: {repo} has no revision {revision!r}; check its name") from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise ModelNotFoundError(
                f"{named}: no such file or folder, and not in the Hub's cache either; HF_HUB_OFFLINE is set: unset it, "
                "check the spelling, or give a folder"
            ) from error
        failed = isinstance(error, errors.HfHubHTTPError)
        reason = f"HTTP {error.response.status_code}" if failed else type(error).__name__
        raise ModelNotFoundError(
            f"{named}: no such file or folder, and the Hub could not be reached ({reason}); "
            "check the spelling and the network, or give a folder"
        ) from error
    return Path(path), Path(path).name
