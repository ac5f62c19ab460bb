"""timm: `config.json` + `model.safetensors`; a patched folder has a loader file beside timm's own config."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from regsurgery.backends import WEIGHTS_NAMES, Snippets, host_timm
from regsurgery.backends.modeling import import_modeling, is_source, modeling_source, write_folder
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
FEATURES = """\
import sys; sys.path.insert(0, "{folder}")
import torch
from modeling_regsurgery import load

model = load("{folder}")
images = torch.zeros(1, 3, {height}, {width}, dtype=next(model.parameters()).dtype)  # preprocessed photos
with torch.no_grad():
    tokens = model.forward_features(images)
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

        def preprocess_at(size: tuple[int, int]) -> Any:
            other: Any = create_transform(**{**data, "input_size": (3, *size)}, is_training=False)
            return lambda images: torch.stack([other(image.convert("RGB")) for image in images]).to(dtype)

    except UNLOADABLE as error:
        raise CheckpointError(f"{folder}: timm cannot load it: {' '.join(str(error).split())[:300]}") from error
    output = "logits" if getattr(model, "num_classes", 0) else "output"
    return Loaded(
        **vars(checkpoint),
        architecture=checkpoint.config["architecture"],
        model=place(model.eval(), options.device_map),
        image_size=image_size,
        preprocess=lambda images: torch.stack([transform(image.convert("RGB")) for image in images]).to(dtype),
        preprocess_at=preprocess_at,
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
    return loaded.resized(model.eval(), size)


def emit(surgery: Surgery, folder: Path, target: Path) -> None:
    """Write config, weights and `modeling_regsurgery.py`."""
    write_folder(surgery, folder, CONFIG_NAME, modeling_source(host_timm))


def is_own_source(text: str) -> bool:
    """Whether `text` is the `modeling_regsurgery.py` that this version writes, for one model or another."""
    return is_source(text, host_timm)


def snippets(surgery: Surgery, folder: str) -> Snippets:
    height, width = surgery.traced.image_size
    return (
        ("timm, through the folder's own loader file", SNIPPET.format(folder=folder)),
        ("Tokens as features", FEATURES.format(folder=folder, height=height, width=width)),
    )


def reload(
    folder: Path, config: dict[str, Any], *, stored: bool = False, image_size: tuple[int, int] | None = None
) -> nn.Module:
    """The patched model of `folder`, built by the folder's own file; `stored`: its weights stay on disk."""
    options: dict[str, Any] = {} if image_size is None else {"dynamic_img_size": True}
    if not stored:
        return import_modeling(folder).load(folder, **options)
    with without_memory():
        state = stored_state(weight_files(folder, WEIGHTS_NAME))
        return import_modeling(folder).load(folder, state=state, **options)
