"""The config file of a checkpoint folder, which identifies its library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regsurgery.checkpoints.limits import read_json
from regsurgery.checkpoints.reading import weight_files
from regsurgery.errors import CheckpointError
from regsurgery.formats import WEIGHTS_NAMES
from regsurgery.frontends.hints import where_to_look

CONFIG_NAMES = ("open_clip_config.json", "config.json")


def read_config(folder: Path, library: str | None = None) -> tuple[str, str, dict[str, Any]]:
    """The library, config file name and parsed config of a checkpoint folder; see `Loaded`.

    Some repositories hold the files of two libraries. Then that of `library` is taken; without one, the first that has
    safetensors, for these win over pickles.

    Raises:
        CheckpointError: there is no config, or none of `library`, or it is broken.
    """
    found = _configs(folder)
    if not found:
        names = " or ".join(reversed(CONFIG_NAMES))
        raise CheckpointError(
            f"{folder}: has no {names}{where_to_look(folder)}; give a folder that transformers, timm or open_clip saved"
        )
    if library is not None:
        if library not in found:
            raise CheckpointError(
                f"{folder}: has the config of {' and '.join(found)}, none of {library}; give --library {min(found)}"
            )
        return library, *found[library]
    chosen = next((name for name in found if weight_files(folder, WEIGHTS_NAMES[name])), next(iter(found)))
    return chosen, *found[chosen]


def _configs(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Library -> name and content of its config, for each that `folder` has."""
    found = {}
    for name in CONFIG_NAMES:
        path = folder / name
        if not path.is_file():
            continue
        config = read_json(path)
        if name == "open_clip_config.json":
            found["open_clip"] = name, config
        elif "model_type" in config:
            found["transformers"] = name, config
        elif isinstance(config.get("architecture"), str):
            found["timm"] = name, config
        elif not found:
            raise CheckpointError(
                f"{path}: has neither 'model_type' (transformers) nor 'architecture' (timm)"
                f"{where_to_look(folder)}; give a folder that one of these libraries saved"
            )
    return found
