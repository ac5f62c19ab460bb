"""timm: `config.json` + `model.safetensors`; a patched folder has a loader file next to timm's own config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from regsurgery.backends import modeling
from regsurgery.backends.modeling import CALL, REFUSAL, modeling_source, refusal, write_folder
from regsurgery.checkpoints.reading import weight_files
from regsurgery.checkpoints.stored import stored_state, without_memory
from regsurgery.formats import WEIGHTS_NAMES, Snippets
from regsurgery.runtime import timm as host_timm

if TYPE_CHECKING:
    from regsurgery.compiler.surgery import Surgery
    from regsurgery.frontends.loaded import Loaded

WEIGHTS_NAME = WEIGHTS_NAMES["timm"]
CONFIG_NAME = "config.json"
SNIPPET = """\
import sys; sys.path.insert(0, "{folder}")
from modeling_regsurgery import load

model = load("{folder}")
"""
FEATURES = """\
import sys; sys.path.insert(0, "{folder}")
import torch
from modeling_regsurgery import load

model = load("{folder}")
images = torch.zeros(1, 3, {height}, {width}, dtype=next(model.parameters()).dtype)  # preprocessed photos
with torch.no_grad():
    tokens = model.forward_features(images)
"""


def emit(surgery: Surgery, folder: Path, target: Path) -> None:
    """Write config, weights and `modeling_regsurgery.py`."""
    # timm refuses a tensor that it does not know; transformers, which opens timm's folders, must be told.
    words = refusal(call(surgery.loaded, "FOLDER"))
    write_folder(surgery, folder, CONFIG_NAME, modeling_source(host_timm), **{REFUSAL: words})


def call(loaded: Loaded, folder: str) -> str:
    return CALL.format(folder=folder)


def loader_digest() -> str:
    """The digest of the loader file that this version writes."""
    return modeling.loader_digest(modeling_source(host_timm))


def snippets(surgery: Surgery, folder: str) -> Snippets:
    height, width = surgery.traced.image_size
    return (
        ("timm, through the folder's own loader file", SNIPPET.format(folder=folder)),
        ("Tokens as features", FEATURES.format(folder=folder, height=height, width=width)),
    )


def reload(
    folder: Path,
    config: dict[str, Any],
    *,
    trusted: bool = False,
    stored: bool = False,
    image_size: tuple[int, int] | None = None,
) -> nn.Module:
    """The patched model of `folder`, built by the folder's own file; `stored`: its weights stay on disk."""
    options: dict[str, Any] = {} if image_size is None else {"dynamic_img_size": True}
    loader = modeling.import_modeling(folder, loader_digest(), trusted=trusted)
    if not stored:
        return loader.load(folder, **options)
    with without_memory():
        state = stored_state(weight_files(folder, WEIGHTS_NAME))
        return loader.load(folder, state=state, **options)


def foreign_code(folder: Path) -> str | None:
    """The folder's loader file, if neither this regsurgery nor a released one writes it."""
    return modeling.foreign_loader(folder, loader_digest())
