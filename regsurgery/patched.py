"""Reading patched folders: their format, their config, their module and the tensors that were added."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery import backends, checkpoint_io
from regsurgery.errors import CheckpointError, UserError
from regsurgery.limits import BROKEN, bounded_model, read_json, refuse_links_out
from regsurgery.recipe import MODES

if TYPE_CHECKING:
    from torch import nn

    from regsurgery.surgery import Surgery


def load(folder: str | Path) -> nn.Module:
    """The patched model of a folder that regsurgery wrote, in eval mode. Runs the folder's own loader file."""
    root = existing_folder(folder)
    return reloaded(root, folder_format(root))


def rebuilt(folder: Path, config: dict[str, Any], fmt: str, *, stored: bool) -> nn.Module:
    """The patched model of a folder, as a user would get it; `stored`: its weights stay on disk where they can."""
    backend = backends.backend(fmt, config["regsurgery"]["mode"])
    if stored and fmt in backends.LIBRARIES:
        return backend.reload(folder, config, stored=True)
    return backend.reload(folder, config)


def reloaded(folder: Path, fmt: str, *, stored: bool = False) -> nn.Module:
    """The patched model of a folder that may be broken; `stored`: see `rebuilt`.

    Raises:
        CheckpointError: the folder's own loader file, or the stock host, cannot build it.
    """
    config = read_patched_config(folder, fmt)
    backend = backends.backend(fmt, config["regsurgery"]["mode"])
    name = backends.WEIGHTS_NAMES.get(fmt)
    headers = [checkpoint_io.read_header(path) for path in checkpoint_io.weight_files(folder, name)] if name else []
    try:
        if not headers:
            return rebuilt(folder, config, fmt, stored=stored)
        with bounded_model(folder / backend.CONFIG_NAME, headers):
            return rebuilt(folder, config, fmt, stored=stored)
    except getattr(backend, "UNLOADABLE", BROKEN) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{folder}: its model cannot be built: {reason}; patch the model again") from error


def existing_folder(folder: str | Path) -> Path:
    """`folder` as a path; `UserError` where there is none."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give one that regsurgery patch wrote")
    refuse_links_out(root)
    return root


def folder_format(folder: Path) -> str:
    """The format in which a patched folder was written."""
    from regsurgery.loading import read_config

    program = folder / backends.backend("pt2").CONFIG_NAME
    if program.is_file():
        return read_json(program, "patch the model again").get("format", "pt2")  # pt2 folders had no such key once
    library, name, config = read_config(folder)
    if "regsurgery" not in config:
        raise UserError(f"{folder / name}: has no 'regsurgery' entry; it is no patched checkpoint: patch it first")
    return library


def read_patched_config(folder: Path, fmt: str) -> dict[str, Any]:
    """The config of a patched folder; its `regsurgery` entry has a mode and a source.

    Raises:
        CheckpointError: the config is missing, broken, or its `regsurgery` entry is none.
    """
    path = folder / backends.backend(fmt).CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; patch the model again")
    config = read_json(path, "patch the model again")
    block = config.get("regsurgery")
    source = block.get("source") if isinstance(block, dict) else None
    texts = [source.get(key) for key in ("id", "sha256")] if isinstance(source, dict) else [None]
    if not isinstance(block, dict) or block.get("mode") not in MODES or not all(isinstance(t, str) for t in texts):
        raise CheckpointError(f"{path}: its 'regsurgery' entry is not one that regsurgery wrote; patch the model again")
    return config


def patched_mode(folder: Path, fmt: str) -> str:
    """The mode in which a patched folder was written."""
    return read_patched_config(folder, fmt)["regsurgery"]["mode"]


def _is_ours(name: str) -> bool:
    from regsurgery.surgery import ATTENTION_CONSTANTS, REGISTER_TOKENS

    return name.split(".")[-1] in (REGISTER_TOKENS, ATTENTION_CONSTANTS)


def take_our_tensors(surgery: Surgery, folder: Path, fmt: str) -> None:
    """Give the graph the folder's register tokens (zero unless somebody trained them) or attention constants."""
    import torch
    from safetensors import safe_open

    if not surgery.plan.num_added:
        return
    added = surgery.graph_module.get_parameter(surgery.added_name)
    with torch.no_grad():
        if fmt not in backends.LIBRARIES:
            added.copy_(backends.backend(fmt).state(folder)[surgery.added_name])
            return
        for path in checkpoint_io.weight_files(folder, backends.WEIGHTS_NAMES[fmt]):
            with safe_open(path, framework="pt") as file:
                for name in filter(_is_ours, file.keys()):
                    added.copy_(file.get_tensor(name))
