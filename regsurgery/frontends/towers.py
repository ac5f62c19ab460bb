"""Which modules of a transformers model are towers: found by their structure and signatures, without a trace.

A **tower** takes pixels and nothing else, and holds a patch embedding and a stack of blocks. A model that generates, or
takes several kinds of input, is not traced whole but through its tower. Nothing here reads a weight: a model on the
`meta` device will do.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

PIXELS = ("pixel_values", "pixel_values_videos")  # inputs of transformers that are images
TEXT_INPUTS = ("input_ids", "decoder_input_ids")
CACHE = "past_key_values"  # an input of models that decode step by step
SIZE_KEYS = ("image_size", "img_size", "input_size", "crop_size")
FRAME_KEYS = ("num_frames", "frames_per_clip")
NO_VISION = ("text", "decoder", "qformer", "audio", "vq")  # in the names of nested configs that are not a tower's
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Tower:
    """A module that can be called with images alone.

    Attributes:
        path: in the model, "" for the whole model.
        pixels: the name of its parameter that takes images.
        image_size: (height, width) that it was made for; None if neither its modules nor its config say.
        channels: of its images.
        frames: the number of frames of its videos; 0 for a model of images.
    """

    path: str
    module: nn.Module
    pixels: str
    image_size: tuple[int, int] | None
    channels: int
    frames: int

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of its forward."""
        return inspect.signature(self.module.forward).parameters


def towers(model: nn.Module) -> tuple[Tower, ...]:
    """What can be traced of `model`, in the order in which to try: from the outside inwards.

    The whole model is left out if it decodes step by step.
    """
    inner = [tower for path, module in model.named_modules() if path and (tower := _tower(path, module)) is not None]
    pixels = pixel_input(model)
    if pixels is None or decodes(model):
        return tuple(inner)
    return (_described("", model, pixels), *inner)


def pixel_input(module: nn.Module) -> str | None:
    """The name of the parameter of `module.forward` that takes images, or None."""
    parameters = inspect.signature(module.forward).parameters
    named = next((name for name in PIXELS if name in parameters), None)
    if named is not None:
        return named
    main = getattr(module, "main_input_name", None)
    if main in parameters and main not in TEXT_INPUTS:
        return str(main)
    first = next((each for each in parameters.values() if each.kind is each.POSITIONAL_OR_KEYWORD), None)
    if first is None or first.name in TEXT_INPUTS or patch_embedding(module) is None:
        return None
    return first.name


def patch_embedding(module: nn.Module) -> nn.Conv2d | nn.Conv3d | None:
    """The first convolution of `module` without overlap, if it is the first of all."""
    first = next((each for each in module.modules() if isinstance(each, CONVOLUTIONS)), None)
    return first if first is not None and first.kernel_size == first.stride and math.prod(first.stride) > 1 else None


def _tower(path: str, module: nn.Module) -> Tower | None:
    """`module` as a tower, if it is one: it needs pixels only, and has blocks."""
    pixels = pixel_input(module)
    if pixels is None or not _has_blocks(module):
        return None
    parameters = inspect.signature(module.forward).parameters
    required = [
        name
        for name, each in parameters.items()
        if each.default is each.empty and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    if any(name in parameters for name in TEXT_INPUTS) or not set(required) <= {pixels}:
        return None
    return _described(path, module, pixels)


def _has_blocks(module: nn.Module) -> bool:
    """Whether `module` holds a list of modules of one class with two linears each."""
    return any(
        isinstance(each, nn.ModuleList | nn.Sequential)
        and len({type(block) for block in each}) == 1
        and sum(isinstance(part, nn.Linear) for part in each[0].modules()) > 1
        for each in module.modules()
    )


def decodes(model: nn.Module) -> bool:
    """Whether `model` generates text, or keeps a cache from one call to the next."""
    generates = getattr(model, "can_generate", bool)()
    return bool(generates) or CACHE in inspect.signature(model.forward).parameters


def _described(path: str, module: nn.Module, pixels: str) -> Tower:
    convolution = patch_embedding(module)
    config = getattr(module, "config", None)
    channels = convolution.in_channels if convolution is not None else _found(config, ("num_channels",), _count)
    video = isinstance(convolution, nn.Conv3d) or pixels == PIXELS[1]
    own = {key: getattr(config, key, None) for key in FRAME_KEYS}  # of the module itself, not of a part
    frames = next(filter(None, map(_count, own.values())), None)
    return Tower(path, module, pixels, _image_size(module), channels or 3, frames or int(video))


def _image_size(module: nn.Module) -> tuple[int, int] | None:
    """(height, width) of the position embedding: from what holds the patch embedding, else from the config."""
    convolution = patch_embedding(module)
    for holder in module.modules():
        if convolution is not None and any(child is convolution for child in holder.children()):
            for key in SIZE_KEYS:
                size = _size(getattr(holder, key, None))
                if size is not None:
                    return size
    return _found(getattr(module, "config", None), SIZE_KEYS, _size)


def _found(config: Any, keys: Sequence[str], read: Any) -> Any:
    """What `read` makes of the first of `keys` in a config or, level by level, in those nested in it; or None."""
    level = [config]
    while level:
        entries = [dict(_entries(each)) for each in level]
        for each in entries:
            for key in keys:
                if (value := read(each.get(key))) is not None:
                    return value
        level = [
            value
            for each in entries
            for key, value in each.items()
            if not any(word in key for word in NO_VISION) and (isinstance(value, dict) or hasattr(value, "to_dict"))
        ]
    return None


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(config, dict):
        yield from ((key, value) for key, value in config.items() if isinstance(key, str))
    elif config is not None:
        yield from vars(config).items()


def _size(value: Any) -> tuple[int, int] | None:
    """A side, (height, width), or (channels, height, width) as (height, width)."""
    if isinstance(value, Mapping):
        value = (value.get("height"), value.get("width"))
    if isinstance(value, int):
        value = (value, value)
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) in (2, 3):
        height, width = value[-2:]
        if _count(height) and _count(width):
            return height, width
    return None


def _count(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
