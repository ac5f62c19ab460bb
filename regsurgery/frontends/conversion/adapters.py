"""A PEFT adapter (LoRA and the like) -> the checkpoint that it was trained on, with the adapter merged into it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regsurgery.checkpoints.containers import refuse_pickle
from regsurgery.checkpoints.limits import BROKEN, read_json, refuse_links_out
from regsurgery.checkpoints.whole import scratch_folder
from regsurgery.errors import CheckpointError, UserError
from regsurgery.frontends.conversion.files import Scratch, digest
from regsurgery.frontends.conversion.layout import copy_side_files
from regsurgery.frontends.loaded import Converted, Loaded
from regsurgery.options import LoadOptions

CONFIG_NAME, WEIGHTS_NAME, PICKLED_NAME = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MERGE = "merge it with peft: PeftModel.from_pretrained(model, ADAPTER).merge_and_unload().save_pretrained(FOLDER)"

Load = Callable[[str, LoadOptions], Loaded]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    return (folder / CONFIG_NAME).is_file() and not (folder / "config.json").is_file()


def merge_adapter(folder: Path, options: LoadOptions, load: Load) -> Scratch:
    """The adapter's base model, which its config names, with the adapter merged into it by peft.

    Raises:
        CheckpointError: the adapter or its base model cannot be read, or is not of transformers.
        UserError: peft is not installed.
    """
    refuse_links_out(folder)
    base = read_json(folder / CONFIG_NAME).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{folder}: an adapter whose {CONFIG_NAME} does not name the base model; {MERGE}")
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{folder}: is an adapter of {base}; install peft (pip install peft), or {MERGE}")
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        weights = folder / PICKLED_NAME
        if not weights.is_file():
            raise CheckpointError(f"{weights.with_name(WEIGHTS_NAME)}: missing, so the adapter has no weights; add it")
        if not options.allow_pickle:
            refuse_pickle(weights)
    loaded = load(base, LoadOptions(allow_pickle=options.allow_pickle, trust_remote_code=options.trust_remote_code))
    if loaded.library != "transformers":
        raise CheckpointError(f"{folder}: is an adapter of {base}, a {loaded.library} checkpoint; {MERGE}")
    with scratch_folder() as home:
        merged = home.path / "converted"
        merged.mkdir()
        copy_side_files(loaded.folder, merged)
        _merged(loaded.model, folder).save_pretrained(merged)
        copy_side_files(folder, merged)
        (merged / CONFIG_NAME).unlink()
    name = Path(base).name if Path(base).is_absolute() else base
    note = f"an adapter, merged into {name} (weights sha256 {loaded.source.sha256})"
    options.progress.say(f"{folder.name}: {note}")
    return Scratch(merged, "transformers", Converted(weights, digest((weights,)), (note,)), home)


def _merged(model: Any, folder: Path) -> Any:
    import peft  # pyright: ignore[reportMissingImports]  # not everybody needs it

    try:
        return peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()  # type: ignore[operator]
    except BROKEN as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder}: peft cannot merge it: {reason}; {MERGE}") from error
