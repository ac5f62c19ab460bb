"""How timm checkpoints are read."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from regsurgery.checkpoints.limits import BROKEN
from regsurgery.checkpoints.safetensors_file import weights_dtype
from regsurgery.checkpoints.stored import assign, stored_state, without_memory
from regsurgery.errors import CheckpointError, UnsupportedModelError, library_fails
from regsurgery.frontends.bounds import MAX_SIDE
from regsurgery.frontends.channels import mode_for, with_channels
from regsurgery.frontends.device import place
from regsurgery.frontends.loaded import Checkpoint, Loaded
from regsurgery.options import LoadOptions

UNLOADABLE = (*BROKEN, SafetensorError)  # what timm raises on broken folders


def load(checkpoint: Checkpoint, options: LoadOptions) -> Loaded:
    """Load a timm folder."""
    folder = checkpoint.folder
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    dtype = weights_dtype(checkpoint.weights)
    _check_preprocessing(folder / checkpoint.config_name, checkpoint.config)
    try:
        if checkpoint.stored:
            model: Any = stored_model(folder, checkpoint.weights, dtype)
        else:
            model = timm.create_model(f"local-dir:{folder}", pretrained=True).to(dtype)
        data = resolve_model_data_config(model)
        image_size = data["input_size"][1], data["input_size"][2]
        if not 0 < max(image_size) / data["crop_pct"] <= MAX_SIDE:
            raise ValueError(f"crop_pct {data['crop_pct']} of {max(image_size)} pixels")
        channels, mode = data["input_size"][0], mode_for(data["mean"])

        def preprocess_at(size: tuple[int, int]) -> Any:
            transform: Any = create_transform(**{**data, "input_size": (channels, *size)}, is_training=False)

            def preprocess(images: Any) -> Any:
                pixels = torch.stack([transform(image.convert(mode)) for image in images])
                return with_channels(pixels, channels).to(dtype)

            return preprocess

        preprocess = preprocess_at(image_size)

    except UNLOADABLE as error:
        raise library_fails("timm", folder, error) from error
    output = "logits" if getattr(model, "num_classes", 0) else "output"
    return Loaded(
        **vars(checkpoint),
        architecture=checkpoint.config["architecture"],
        model=place(model.eval(), options.device_map),
        image_size=image_size,
        preprocess=preprocess,
        preprocess_at=preprocess_at,
        preprocess_note="the model's own pretrained_cfg",
        inputs=lambda images: ((images,), {}),
        name_outputs=lambda value: {output: value},
        disk_name=lambda name: name,
        channels=channels,
    )


def _check_preprocessing(path: Path, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for preprocessing that makes no images of one size, naming the key."""
    from timm.data.transforms import str_to_interp_mode

    given = config.get("pretrained_cfg", config)
    settings = given if isinstance(given, dict) else {}
    size = settings.get("input_size", [3, 1, 1])
    if not isinstance(size, (list, tuple)) or len(size) != 3 or not all(type(n) is int and n > 0 for n in size):
        raise CheckpointError(f"{path}: 'input_size' is {size!r:.80}; correct it to [channels, height, width]")
    interpolation = settings.get("interpolation") or "bicubic"
    try:
        str_to_interp_mode(interpolation)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: 'interpolation' is {interpolation!r:.80}, which timm does not know; correct it, for example to "
            "'bicubic'"
        ) from error


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
        UnsupportedModelError: the architecture takes only one size.
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
        raise UnsupportedModelError(f"{loaded.architecture}: takes only one image size") from error
    return loaded.resized(model.eval(), size)
