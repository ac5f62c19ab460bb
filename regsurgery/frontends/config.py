"""The config file of a checkpoint folder, which identifies its library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regsurgery.checkpoints.limits import read_json
from regsurgery.errors import CheckpointError

CONFIG_NAMES = ("open_clip_config.json", "config.json")


def read_config(folder: Path) -> tuple[str, str, dict[str, Any]]:
    """The library, config file name and parsed config of a checkpoint folder; see `Loaded`."""
    for name in CONFIG_NAMES:
        path = folder / name
        if not path.is_file():
            continue
        config = read_json(path)
        if name == "open_clip_config.json":
            return "open_clip", name, config
        if "model_type" in config:
            return "transformers", name, config
        if isinstance(config.get("architecture"), str):
            return "timm", name, config
        raise CheckpointError(
            f"{path}: has neither 'model_type' (transformers) nor 'architecture' (timm); give a folder that one of "
            "these libraries saved"
        )
    names = " or ".join(reversed(CONFIG_NAMES))
    raise CheckpointError(f"{folder}: has no {names}; give a folder that transformers, timm or open_clip saved")
