"""open_clip: `open_clip_config.json` + `open_clip_model.safetensors`; the text tower passes through untouched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from regsurgery.backends.modeling import foreign_loader, import_modeling, is_source, modeling_source, write_folder
from regsurgery.checkpoints.reading import weight_files
from regsurgery.checkpoints.stored import stored_state, without_memory
from regsurgery.formats import WEIGHTS_NAMES, Snippets
from regsurgery.runtime import open_clip as host_open_clip

if TYPE_CHECKING:
    from regsurgery.compiler.surgery import Surgery

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


def is_own_source(text: str) -> bool:
    """Whether `text` is a `modeling_regsurgery.py` that this version writes, for any model."""
    return is_source(text, host_open_clip)


def snippets(surgery: Surgery, folder: str) -> Snippets:
    return (
        ("open_clip, through the folder's own loader file", SNIPPET.format(folder=folder)),
        ("Features of a photo", FEATURES.format(folder=folder)),
    )


def reload(
    folder: Path, config: dict[str, Any], *, stored: bool = False, image_size: tuple[int, int] | None = None
) -> nn.Module:
    """The patched model of `folder`, built by the folder's own file; `stored`: its weights stay on disk."""
    options: dict[str, Any] = {} if image_size is None else {"force_image_size": image_size}
    if not stored:
        return import_modeling(folder).load(folder, **options)
    state = stored_state(weight_files(folder, WEIGHTS_NAME), torch.float32)
    with without_memory():
        return import_modeling(folder).load(folder, state=state, **options)


def foreign_code(folder: Path) -> str | None:
    """The folder's loader file, if it is not one that this regsurgery writes."""
    return foreign_loader(folder, is_own_source)
