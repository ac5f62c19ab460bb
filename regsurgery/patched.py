"""Reading patched folders: their format, their config, their module and the tensors that were added."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery import backends, checkpoint_io
from regsurgery.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from regsurgery.surgery import Surgery


def load(folder: str | Path) -> nn.Module:
    """The patched model of a folder that regsurgery wrote, in eval mode. Runs the folder's own loader file."""
    root = existing_folder(folder)
    fmt = folder_format(root)
    return backends.backend(fmt, patched_mode(root, fmt)).reload(root, read_patched_config(root, fmt))


def existing_folder(folder: str | Path) -> Path:
    """`folder` as a path; `UserError` where there is none."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give one that regsurgery patch wrote")
    return root


def folder_format(folder: Path) -> str:
    """The format in which a patched folder was written."""
    from regsurgery.loading import read_config

    if (folder / backends.backend("pt2").CONFIG_NAME).is_file():
        return "pt2"
    library, name, config = read_config(folder)
    if "regsurgery" not in config:
        raise UserError(f"{folder / name}: has no 'regsurgery' entry; it is no patched checkpoint: patch it first")
    return library


def read_patched_config(folder: Path, fmt: str) -> dict[str, Any]:
    return json.loads((folder / backends.backend(fmt).CONFIG_NAME).read_text("utf-8"))


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
        for path in checkpoint_io.weight_files(folder, backends.backend(fmt).WEIGHTS_NAME):
            with safe_open(path, framework="pt") as file:
                for name in filter(_is_ours, file.keys()):
                    added.copy_(file.get_tensor(name))
