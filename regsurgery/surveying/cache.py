"""The Hub's cache: whether a model is there, and how it is removed."""

from __future__ import annotations

from pathlib import Path

from regsurgery.errors import UserError
from regsurgery.frontends.model_id import DEMO, repository_of


def cached_repository(model: str) -> Path | None:
    """Where the cache has the repository of MODEL; None if it does not, or MODEL is not on the Hub."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    if model == DEMO or Path(model).exists():
        return None
    try:
        name = repo_folder_name(repo_id=repository_of(model), repo_type="model")
    except (UserError, HFValidationError):  # no name on the Hub, a path that is not there, say: `doctor` says so
        return None
    folder = Path(HF_HUB_CACHE, name)
    return folder if folder.is_dir() else None


def free(model: str) -> int:
    """Remove the repository of MODEL from the cache, with all its revisions; how many bytes that frees."""
    from huggingface_hub import scan_cache_dir

    folder = cached_repository(model)
    if folder is None:
        return 0
    scanned = scan_cache_dir()
    revisions = [one.commit_hash for repo in scanned.repos if repo.repo_path == folder for one in repo.revisions]
    strategy = scanned.delete_revisions(*revisions)
    strategy.execute()
    return strategy.expected_freed_size
