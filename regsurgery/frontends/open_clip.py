"""How open_clip checkpoints are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from regsurgery.checkpoints.limits import BROKEN
from regsurgery.checkpoints.stored import assign, stored_state, without_memory
from regsurgery.errors import CheckpointError, UnsupportedModelError, library_fails
from regsurgery.frontends.device import place
from regsurgery.frontends.loaded import Checkpoint, Loaded
from regsurgery.options import LoadOptions
from regsurgery.runtime.open_clip import image_transform, stock_model

UNLOADABLE = (*BROKEN, SafetensorError)  # what open_clip raises on broken folders
OUTPUT_NAMES = ("image_features", "text_features", "logit_scale", "logit_bias")
PREPROCESSING = {"mode": ("RGB",), "resize_mode": ("shortest", "longest", "squash"),
                 "interpolation": ("bicubic", "bilinear", "random")}  # fmt: skip
TOWER_NAMES = ("image_features", "image_tokens")


def load(checkpoint: Checkpoint, options: LoadOptions) -> Loaded:
    """Load an open_clip folder."""
    folder = checkpoint.folder
    _check_preprocessing(folder / checkpoint.config_name, checkpoint.config)
    try:
        model = _model(checkpoint)
        transform = image_transform(model)
    except UNLOADABLE as error:
        raise library_fails("open_clip", folder, error) from error
    size = model.visual.image_size

    def preprocess_at(size: tuple[int, int]) -> Any:
        other = image_transform(model, size)
        return lambda images: torch.stack([other(image) for image in images])

    context = getattr(model, "context_length", 77)

    # If the tower also returns its tokens, open_clip's CLIP cannot be called, and CoCa adds a text decoder.
    entry, names = ("visual", TOWER_NAMES) if getattr(model.visual, "output_tokens", False) else ("", OUTPUT_NAMES)

    def inputs(images: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if entry:
            return (images,), {}
        text = torch.zeros(images.shape[0], context, dtype=torch.int64, device=images.device)
        text[:, 0] = 1
        return (images, text), {}

    def name_outputs(output: Any) -> dict[str, Tensor]:
        if isinstance(output, dict):
            return {name: value for name, value in output.items() if isinstance(value, Tensor)}
        return {name: value for name, value in zip(names, output, strict=False) if isinstance(value, Tensor)}

    return Loaded(
        **vars(checkpoint),
        architecture=f"{type(model).__name__}/{type(model.visual).__name__}",
        model=place(model.eval(), options.device_map),
        image_size=tuple(size) if isinstance(size, (tuple, list)) else (size, size),
        preprocess=lambda images: torch.stack([transform(image) for image in images]),
        preprocess_at=preprocess_at,
        preprocess_note="the model's own preprocess_cfg",
        inputs=inputs,
        name_outputs=name_outputs,
        disk_name=lambda name: name,
        entry=entry,
    )


def _check_preprocessing(path: Path, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for a way to resize that open_clip does not know, naming the key."""
    given = config.get("preprocess_cfg")
    for key, known in PREPROCESSING.items():
        value = given.get(key) if isinstance(given, dict) else None
        if value is not None and value not in known:
            raise CheckpointError(
                f"{path}: {key!r} is {value!r:.80}, which open_clip does not know; correct it to one of "
                f"{', '.join(known)}"
            )


def _model(checkpoint: Checkpoint, **options: Any) -> Any:
    import open_clip

    if not checkpoint.stored:
        model = stock_model(checkpoint.folder, **options)
        open_clip.load_checkpoint(model, str(checkpoint.weights[0]), strict=True)  # type: ignore[arg-type]
        return model
    return stored_model(checkpoint.folder, checkpoint.weights, **options)


def stored_model(folder: str | Path, weights: Sequence[Path], **options: Any) -> Any:
    """The stock model of `folder`, whose `weights` stay on disk; `options` go to `open_clip.create_model`."""
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    with without_memory():
        model = stock_model(folder, **options)
    state = stored_state(weights, torch.float32)
    resize_pos_embed(state, model)
    resize_text_pos_embed(state, model)
    assign(model, state)
    return model


def at_size(loaded: Loaded, size: tuple[int, int]) -> Loaded:
    """`loaded` for images of another size: built again at it, its position embedding resized by open_clip.

    Raises:
        UnsupportedModelError: the tower takes only one size.
    """
    reference = next(loaded.model.parameters())
    try:
        model = _model(loaded, force_image_size=size)
    except UNLOADABLE as error:
        raise UnsupportedModelError(f"{loaded.architecture}: takes only one image size") from error
    return loaded.resized((model if loaded.stored else model.to(reference)).eval(), size)
