"""open_clip: `open_clip_config.json` + `open_clip_model.safetensors`; the text tower passes through untouched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from regsurgery.backends import modeling
from regsurgery.backends.modeling import CALL, modeling_source, write_folder
from regsurgery.checkpoints.reading import weight_files
from regsurgery.checkpoints.stored import stored_state, without_memory
from regsurgery.formats import WEIGHTS_NAMES, Snippets
from regsurgery.runtime import open_clip as host_open_clip

if TYPE_CHECKING:
    from regsurgery.compiler.surgery import Surgery
    from regsurgery.frontends.loaded import Loaded

WEIGHTS_NAME = WEIGHTS_NAMES["open_clip"]
CONFIG_NAME = "open_clip_config.json"
SNIPPET = """\
import sys; sys.path.insert(0, "{folder}")
from modeling_regsurgery import image_transform, load

model = load("{folder}")
preprocess = image_transform(model)
"""
FEATURES = """\
import sys; sys.path.insert(0, "{folder}")
import torch
from PIL import Image
from modeling_regsurgery import image_transform, load

model = load("{folder}")
photo = Image.new("RGB", (640, 480))  # or Image.open("photo.jpg")
with torch.no_grad():
    features = model.encode_image(image_transform(model)(photo).unsqueeze(0))
"""


def emit(surgery: Surgery, folder: Path, target: Path) -> None:
    """Write config, weights and `modeling_regsurgery.py`."""
    write_folder(surgery, folder, CONFIG_NAME, modeling_source(host_open_clip))


def call(loaded: Loaded, folder: str) -> str:
    return CALL.format(folder=folder)


def loader_digest() -> str:
    """The digest of the loader file that this version writes."""
    return modeling.loader_digest(modeling_source(host_open_clip))


def snippets(surgery: Surgery, folder: str) -> Snippets:
    return (
        ("open_clip, through the folder's own loader file", SNIPPET.format(folder=folder)),
        ("Features of a photo", FEATURES.format(folder=folder)),
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
    options: dict[str, Any] = {} if image_size is None else {"force_image_size": image_size}
    loader = modeling.import_modeling(folder, loader_digest(), trusted=trusted)
    if not stored:
        return loader.load(folder, **options)
    state = stored_state(weight_files(folder, WEIGHTS_NAME), torch.float32)
    with without_memory():
        return loader.load(folder, state=state, **options)


def foreign_code(folder: Path) -> str | None:
    """The folder's loader file, if neither this regsurgery nor a released one writes it."""
    return modeling.foreign_loader(folder, loader_digest())
