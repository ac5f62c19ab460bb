"""timm: `config.json` + `model.safetensors`; a patched folder has a loader file beside timm's own config."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from regsurgery.backends import WEIGHTS_NAMES, host_timm
from regsurgery.backends.modeling import import_modeling, modeling_source, write_folder
from regsurgery.checkpoint_io import weight_files, weights_dtype
from regsurgery.errors import CheckpointError, UnsupportedModelError
from regsurgery.limits import BROKEN, MAX_SIDE
from regsurgery.loading import Checkpoint, Loaded, LoadOptions, place
from regsurgery.stored import assign, stored_state, without_memory

if TYPE_CHECKING:
    from regsurgery.surgery import Surgery

WEIGHTS_NAME = WEIGHTS_NAMES["timm"]
UNLOADABLE = (*BROKEN, SafetensorError)  # what timm raises on broken folders
CONFIG_NAME = "config.json"
SNIPPET = """\
import sys; sys.path.insert(0, "{folder}")
from modeling_regsurgery import load

model = load("{folder}")
"""


def load(checkpoint: Checkpoint, options: LoadOptions) -> Loaded:
    """Load a timm folder."""
    folder = checkpoint.folder
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    dtype = weights_dtype(checkpoint.weights)
    try:
        if checkpoint.stored:
            model: Any = stored_model(folder, checkpoint.weights, dtype)
        else:
            model = timm.create_model(f"local-dir:{folder}", pretrained=True).to(dtype)
        data = resolve_model_data_config(model)
        image_size = data["input_size"][1], data["input_size"][2]
        if not 0 < max(image_size) / data["crop_pct"] <= MAX_SIDE:
            raise ValueError(f"crop_pct {data['crop_pct']} of {max(image_size)} pixels")
        transform: Any = create_transform(**data, is_training=False)
    except UNLOADABLE as error:
        raise CheckpointError(f"{folder}: timm cannot load it: {' '.join(str(error).split())[:300]}") from error
    output = "logits" if getattr(model, "num_classes", 0) else "output"
    return Loaded(
        **vars(checkpoint),
        architecture=checkpoint.config["architecture"],
        model=place(model.eval(), options.device_map),
        image_size=image_size,
        preprocess=lambda images: torch.stack([transform(image.convert("RGB")) for image in images]).to(dtype),
        preprocess_note="the model's own pretrained_cfg",
        inputs=lambda images: ((images,), {}),
        name_outputs=lambda value: {output: value},
        disk_name=lambda name: name,
    )


def stored_model(folder: Path, weights: Sequence[Path], dtype: torch.dtype, **options: Any) -> nn.Module:
    """The stock model of `folder`, whose `weights` stay on disk; `options` go to `timm.create_model`."""
    import timm

    with without_memory():
        model = timm.create_model(f"local-dir:{folder}", pretrained=False, **options)
    state: Any = stored_state(weights, dtype)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    assign(model, state if convert is None else convert(state, model))
    return model


def at_size(loaded: Loaded, size: tuple[int, int]) -> Loaded:
    """`loaded` for images of another size: built again with a position embedding that is interpolated.

    Raises:
        UnsupportedModelError: the architecture takes one size only.
    """
    import timm

    if getattr(loaded.model, "dynamic_img_size", False):  # it interpolates by itself
        return replace(loaded, image_size=size)
    reference = next(loaded.model.parameters())
    try:
        if loaded.stored:
            model = stored_model(loaded.folder, loaded.weights, reference.dtype, dynamic_img_size=True)
        else:
            model = timm.create_model(f"local-dir:{loaded.folder}", pretrained=True, dynamic_img_size=True).to(
                reference
            )
    except UNLOADABLE as error:
        raise UnsupportedModelError(f"{loaded.architecture}: takes no other image size") from error
    return replace(loaded, model=model.eval(), image_size=size)


def emit(surgery: Surgery, folder: Path, target: Path) -> None:
    """Write config, weights and `modeling_regsurgery.py`."""
    write_folder(surgery, folder, CONFIG_NAME, modeling_source(host_timm))


def snippet(surgery: Surgery, folder: str) -> str:
    return SNIPPET.format(folder=folder)


def reload(folder: Path, config: dict[str, Any], *, stored: bool = False) -> nn.Module:
    """The patched model of `folder`, built by the folder's own file; `stored`: its weights stay on disk."""
    if not stored:
        return import_modeling(folder).load(folder)
    with without_memory():
        return import_modeling(folder).load(folder, state=stored_state(weight_files(folder, WEIGHTS_NAME)))
