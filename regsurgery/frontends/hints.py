"""Folders that hold a checkpoint further down: where it is, for the message that asks for `--subfolder`."""

from __future__ import annotations

import re
from pathlib import Path

from regsurgery.checkpoints.limits import read_json
from regsurgery.errors import CheckpointError

MAX_SUBFOLDERS = 200
VISION_KEYS = ("vision_config", "image_size", "patch_size", "architecture")  # of models that take images
TRAINER = re.compile(r"checkpoint-(\d+)")  # the folders of transformers' Trainer


def where_to_look(folder: Path) -> str:
    """A clause for an error message that names the subfolder with the checkpoint; "" if there is none."""
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    configs = {path: config for path in below[:MAX_SUBFOLDERS] if (config := _config(path)) is not None}
    steps = {int(step[1]): path for path in configs if (step := TRAINER.fullmatch(path.name)) is not None}
    if steps:
        newest = steps[max(steps)].name
        return f"; its newest checkpoint is in {newest}/: add --subfolder {newest}"
    vision = [path.name for path in configs if any(key in configs[path] for key in VISION_KEYS)]
    if len(vision) == 1:
        return f"; its vision model is in {vision[0]}/: add --subfolder {vision[0]}"
    if vision:
        return f"; models are in {', '.join(f'{name}/' for name in vision[:8])}: choose one with --subfolder"
    return ""


def _config(folder: Path) -> dict[str, object] | None:
    """The config of a model in `folder`, if it has one that can be read."""
    for name in ("open_clip_config.json", "config.json"):
        if (folder / name).is_file():
            try:
                config = read_json(folder / name)
            except CheckpointError:  # not what is looked for
                return None
            return {**config, "vision_config": {}} if name.startswith("open_clip") else config
    return None
