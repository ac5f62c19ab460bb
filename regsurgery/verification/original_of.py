"""The original of a patched folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from regsurgery.errors import CheckpointError
from regsurgery.formats import LIBRARIES
from regsurgery.frontends.loaded import Loaded
from regsurgery.models import load_model
from regsurgery.options import READING, LoadOptions
from regsurgery.verification.original import restore_original
from regsurgery.verification.patched import PatchedFolder


def original_of(patched: PatchedFolder, original: str | None, options: LoadOptions, scratch: Path) -> Loaded:
    """The model that was patched: restored into the new folder `scratch / "original"` if `patched` has all its tensors
    and `original` is not given (whole files become links to its own); otherwise loaded from `original`, or from its
    recorded source.

    Raises:
        CheckpointError: the folder is incomplete, or `original` is not what was patched.
    """
    block = patched.config["regsurgery"]
    recorded = block["source"]
    if original is None and patched.format in LIBRARIES and not patched.recipe.kind.stock:
        restored = scratch / "original"
        record = restore_original(patched.root, restored, patched.format, known=patched.files.digests)
        own = replace(options, **{**dict.fromkeys((*READING, "revision")), "library": patched.format})
        return load_model(str(restored), own, known={file.name: file.sha256 for file in record.files})
    own = replace(options, **recorded_reading(recorded))
    if original is None:
        own = replace(own, revision=None, commit=recorded.get("revision"))
    loaded = load_model(original or recorded["id"], own)
    if loaded.source.sha256 != recorded["sha256"]:
        raise CheckpointError(
            f"{loaded.source.id}: its weights are not the ones that were patched into {patched.root} "
            "(sha256 differs); give the original with --original"
        )
    return loaded


def recorded_reading(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """How the source of a patched folder was read, as options; see `LoadOptions.reading`."""
    return {name: recorded[name] for name in READING if isinstance(recorded.get(name), (str, bool))}
