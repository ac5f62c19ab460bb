"""open_clip: `open_clip_config.json` + `open_clip_model.safetensors`; the text tower passes through untouched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from regsurgery.backends import WEIGHTS_NAMES, Snippets, host_open_clip
from regsurgery.backends.modeling import import_modeling, is_source, modeling_source, write_folder
from regsurgery.checkpoint_io import weight_files
from regsurgery.errors import CheckpointError, UnsupportedModelError
from regsurgery.limits import BROKEN
from regsurgery.loading import Checkpoint, Loaded, LoadOptions, place
from regsurgery.stored import assign, stored_state, without_memory

if TYPE_CHECKING:
    from regsurgery.surgery import Surgery

WEIGHTS_NAME = WEIGHTS_NAMES["open_clip"]
CONFIG_NAME = "open_clip_config.json"
UNLOADABLE = (*BROKEN, SafetensorError)  # what open_clip raises on broken folders
OUTPUT_NAMES = ("image_features", "text_features", "logit_scale", "logit_bias")
TOWER_NAMES = ("image_features", "image_tokens")
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


def load(checkpoint: Checkpoint, options: LoadOptions) -> Loaded:
    """Load an open_clip folder."""
    folder = checkpoint.folder
    try:
        model = _model(checkpoint)
        transform = host_open_clip.image_transform(model)
    except UNLOADABLE as error:
        raise CheckpointError(f"{folder}: open_clip cannot load it: {' '.join(str(error).split())[:300]}") from error
    size = model.visual.image_size

    def preprocess_at(size: tuple[int, int]) -> Any:
        other = host_open_clip.image_transform(model, size)
        return lambda images: torch.stack([other(image) for image in images])

    context = getattr(model, "context_length", 77)

    # A tower that returns its tokens as well: open_clip's CLIP cannot be called with it, CoCa adds a text decoder.
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


def _model(checkpoint: Checkpoint, **options: Any) -> Any:
    import open_clip

    if not checkpoint.stored:
        model = host_open_clip.stock_model(checkpoint.folder, **options)
        open_clip.load_checkpoint(model, str(checkpoint.weights[0]), strict=True)  # type: ignore[arg-type]
        return model
    return stored_model(checkpoint.folder, checkpoint.weights, **options)


def stored_model(folder: str | Path, weights: Sequence[Path], **options: Any) -> Any:
    """The stock model of `folder`, whose `weights` stay on disk; `options` go to `open_clip.create_model`."""
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    with without_memory():
        model = host_open_clip.stock_model(folder, **options)
    state = stored_state(weights, torch.float32)
    resize_pos_embed(state, model)
    resize_text_pos_embed(state, model)
    assign(model, state)
    return model


def at_size(loaded: Loaded, size: tuple[int, int]) -> Loaded:
    """`loaded` for images of another size: built again at it, its position embedding resized by open_clip.

    Raises:
        UnsupportedModelError: the tower takes one size only.
    """
    reference = next(loaded.model.parameters())
    try:
        model = _model(loaded, force_image_size=size)
    except UNLOADABLE as error:
        raise UnsupportedModelError(f"{loaded.architecture}: takes no other image size") from error
    return loaded.resized((model if loaded.stored else model.to(reference)).eval(), size)


def emit(surgery: Surgery, folder: Path, target: Path) -> None:
    """Write config, weights and `modeling_regsurgery.py`."""
    write_folder(surgery, folder, CONFIG_NAME, modeling_source(host_open_clip))


def is_own_source(text: str) -> bool:
    """Whether `text` is the `modeling_regsurgery.py` that this version writes, for one model or another."""
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
