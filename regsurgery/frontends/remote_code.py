"""Model classes that come with a checkpoint: Python files in its folder, which its config names. They run on trust."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regsurgery.checkpoints.limits import BROKEN
from regsurgery.errors import CheckpointError, in_short


def custom_class(folder: Path, config_path: Path, auto_map: Any, architecture: str | None) -> Any:
    """The model class of `folder` that `auto_map` names: `architecture`, or that of `AutoModel`, or the only one.

    Runs the folder's code.

    Raises:
        CheckpointError: it names none, the code is in another repository, or cannot be run.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    named = {key: value for key, value in auto_map.items() if key.startswith("AutoModel") and isinstance(value, str)}
    own = [value for value in named.values() if value.split(".")[-1] == architecture]
    reference = next(iter(own), named.get("AutoModel", next(iter(named.values()), None)))
    if reference is None:
        raise CheckpointError(f"{config_path}: 'auto_map' names no model class; add an entry 'AutoModel'")
    if "--" in reference:
        raise CheckpointError(
            f"{config_path}: 'auto_map' names code in another repository ({reference[:200]}); copy its files into the "
            "folder and name them without the repository"
        )
    try:
        return get_class_from_dynamic_module(reference, str(folder))
    except (*BROKEN, SyntaxError) as error:
        raise CheckpointError(f"{folder}: its code cannot be run ({reference[:200]}): {in_short(error)}") from error


def code_file(cls: type) -> str | None:
    """The name, without suffix, of the file in a checkpoint folder that defines `cls`; None for a library's class."""
    package, _, name = cls.__module__.rpartition(".")
    return name if package.split(".")[0] == "transformers_modules" else None
