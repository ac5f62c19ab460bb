"""A transformers folder's own preprocessing, as one function: pictures -> `[B, C, H, W]`.

Processors return tiles, videos, or images of any aspect; a tower takes one image of one size. Tiling is switched off
where a processor has a switch, and otherwise the first tile, the whole picture, is taken. Where the size of the result
depends on the picture, pictures are resized to the model's own size first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from regsurgery.checkpoints.limits import BROKEN, read_json
from regsurgery.errors import CheckpointError, UnsupportedModelError, in_short, library_fails
from regsurgery.frontends.bounds import check_numbers
from regsurgery.frontends.channels import mode_for, with_channels
from regsurgery.frontends.towers import PIXELS, Tower
from regsurgery.options import LoadOptions

FILES = ("preprocessor_config.json", "processor_config.json")
UNTILED = {"do_image_splitting": False, "crop_to_patches": False}  # switches of processors that cut tiles
PROBES = ((64, 48), (48, 64))  # (width, height)
# Settings that decide whether what a processor returns has one size, or is an image at all.
SIZING = (
    "image_processor_type", "size", "do_resize", "crop_size", "do_center_crop", "do_pad", "size_divisor",
    "keep_aspect_ratio", "ensure_multiple_of", "min_pixels", "max_pixels", "patch_size", "max_num_patches",
)  # fmt: skip


@dataclass(frozen=True)
class Preprocessing:
    """How pictures become images of a tower.

    Attributes:
        at: image size (height, width), or None for the model's own -> pictures -> `[B, C, H, W]`.
        image_size: the model's own, in pixels.
        note: one line that says where the preprocessing comes from.
        fixed: the folder's own processor decides the size, not the model.
    """

    at: Callable[[tuple[int, int] | None], Callable[[list[Image.Image]], Tensor]]
    image_size: tuple[int, int]
    note: str
    fixed: bool = False


def preprocessing(folder: Path, tower: Tower, dtype: torch.dtype, options: LoadOptions) -> Preprocessing:
    """The preprocessing of the folder's image processor, or a plain one if it has none.

    Raises:
        CheckpointError: the processor cannot be loaded, or makes no images of one size.
        UnsupportedModelError: nothing says what size images have.
    """
    settings = [folder / name for name in FILES if (folder / name).is_file()]
    processor = _loaded(settings, folder, options) if settings else None
    if processor is not None and (found := _own(settings[0], processor, tower, dtype)) is not None:
        return found
    if tower.image_size is None:
        raise UnsupportedModelError(
            f"{folder}: neither its config nor an image processor says for which image size it was made; add "
            "'image_size' to its config"
        )
    return _plain(tower, dtype, processor)


def _own(path: Path, processor: Any, tower: Tower, dtype: torch.dtype) -> Preprocessing | None:
    """The preprocessing of `processor`, which `path` describes, or None if it needs more than pictures.

    Raises:
        CheckpointError: it makes no images of one size, even of pictures that have the model's.
    """
    own, note = _Own(processor, tower, dtype), f"the model's own {type(processor).__name__}"
    size = own.usual_size()
    if size is not None:
        return Preprocessing(own.at, size, note, fixed=True)
    if tower.image_size is None or _needs_more(processor):
        return None
    for first in (replace(own, resized=tower.image_size), replace(own, resized=tower.image_size, told=True)):
        if first.usual_size() == tower.image_size:
            return Preprocessing(first.at, tower.image_size, f"{note}, on pictures resized to one size")
    height, width = tower.image_size
    keys = ", ".join(f"'{key}'" for key in SIZING if key in read_json(path))
    raise CheckpointError(
        f"{path}: {type(processor).__name__} with its {keys or 'defaults'} makes no images of {height}x{width} pixels, "
        f"which the model takes ({own.problem()}); correct them, or remove the file: then pictures are resized, with "
        "mean and std 0.5"
    )


def _loaded(settings: list[Path], folder: Path, options: LoadOptions) -> Any:
    from transformers import AutoImageProcessor

    for path in settings:
        check_numbers(path, read_json(path))
    try:
        trusted = options.trust_remote_code
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=trusted)  # nosec B615 # a folder
    except BROKEN as error:
        raise library_fails("transformers", settings[0], error) from error


@dataclass(frozen=True)
class _Own:
    """A processor as a function for one tower.

    Attributes:
        resized: the size (height, width) that pictures are resized to first; None: they are not.
        told: the processor is told the image size, although it is the model's own.
    """

    processor: Any
    tower: Tower
    dtype: torch.dtype
    resized: tuple[int, int] | None = None
    told: bool = False

    def usual_size(self) -> tuple[int, int] | None:
        """(height, width) of what the processor returns; None if that depends on the picture, or is no image."""
        try:
            shapes = {tuple(self.at(None)([Image.new("RGB", probe)]).shape) for probe in PROBES}
        except BROKEN:
            return None  # `problem` says it
        shape = shapes.pop()
        return None if shapes or len(shape) != 4 else (shape[2], shape[3])

    def problem(self) -> str:
        """Why there is no `usual_size`."""
        try:
            shapes = [list(self.at(None)([Image.new("RGB", probe)]).shape[1:]) for probe in PROBES]
        except BROKEN as error:
            return in_short(error)
        return f"it returns {' or '.join(map(str, shapes))}, by the picture"

    def at(self, size: tuple[int, int] | None) -> Callable[[list[Image.Image]], Tensor]:
        """The preprocessing at an image size; None: the model's own."""
        target = size or self.resized
        other = sizes_at(self.processor, target) if target is not None and (size or self.told) else {}
        switches = {name: value for name, value in UNTILED.items() if hasattr(self.processor, name)}
        mode = mode_for(getattr(self.processor, "image_mean", None))

        def returned(pictures: list[Any]) -> Tensor:
            output = self.processor(pictures, return_tensors="pt", **switches, **other)
            return next(output[name] for name in PIXELS if name in output)

        def processed(images: list[Image.Image]) -> Tensor:
            pictures: list[Any] = [image.convert(mode) for image in images]
            if self.resized is not None and target is not None:
                pictures = [image.resize(target[::-1], Image.Resampling.BICUBIC) for image in pictures]
            given = [[picture] for picture in pictures] if self.tower.frames else pictures
            pixels = returned(given)
            if len(pixels) != len(pictures):  # it took a list of pictures for those of one text, or for one video
                pixels = returned([[picture] for picture in pictures])
            if len(pixels) != len(pictures):
                raise ValueError(f"it returns {len(pixels)} images for {len(pictures)}")
            while pixels.ndim > 4:
                pixels = pixels[:, 0]
            return with_channels(pixels, self.tower.channels).to(self.dtype)

        return processed


def _needs_more(processor: Any) -> bool:
    """Whether a processor needs more than pictures, such as boxes."""
    parameters = [*inspect.signature(processor.preprocess).parameters.values()][1:]
    return any(each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)


def _plain(tower: Tower, dtype: torch.dtype, processor: Any = None) -> Preprocessing:
    """Pictures resized to the tower's size, with the mean and std of `processor` if there is one."""
    from torchvision.transforms import v2

    assert tower.image_size is not None
    own_size, channels = tower.image_size, tower.channels
    mean, std = (getattr(processor, name, None) or [0.5] * 3 for name in ("image_mean", "image_std"))
    note = "no preprocessor_config.json in the folder: resized, mean and std 0.5"
    if processor is not None:
        note = f"resized, with the mean and std of {type(processor).__name__}, which takes more than pictures"

    def resized_at(size: tuple[int, int] | None) -> Callable[[list[Image.Image]], Tensor]:
        plain = v2.Compose(
            [
                v2.PILToTensor(),
                v2.Resize(size or own_size, antialias=True),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(mean), list(std)),
            ]
        )
        return lambda images: with_channels(torch.stack([plain(image) for image in images]), channels).to(dtype)

    return Preprocessing(resized_at, own_size, note)


def sizes_at(processor: Any, size: tuple[int, int]) -> dict[str, dict[str, int]]:
    """Arguments with which `processor` makes images of `size`: its resize size scales with its crop size."""
    height, width = size
    target = {"height": height, "width": width}
    if not getattr(processor, "do_center_crop", False):
        return {"size": target}
    own = _crop_size(processor)
    given = dict(processor.size)
    edges = {name: value for name, value in given.items() if value is not None}
    factors = {"height": height / own[0], "width": width / own[1]} if own else {}
    shorter = min(factors.values(), default=1.0)
    resized = {name: max(min(size), round(value * factors.get(name, shorter))) for name, value in edges.items()}
    return {"size": resized, "crop_size": target}


def _crop_size(processor: Any) -> tuple[int, int] | None:
    crop = processor.crop_size
    height, width = (
        crop.get(key) if isinstance(crop, dict) else getattr(crop, key, None) for key in ("height", "width")
    )
    return (height, width) if height and width else None
