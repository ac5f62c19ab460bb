"""`check`: is the surgery still in effect in a folder, one that was trained on and saved again, say?"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from regsurgery.checkpoints.limits import read_json
from regsurgery.errors import UserError
from regsurgery.formats import LIBRARIES
from regsurgery.options import CheckOptions, takes
from regsurgery.verification.live import still_patched
from regsurgery.verification.pair import pixels_of
from regsurgery.verification.patched import at_home, folder_format, read_patched_config, reloaded

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from regsurgery.verification.live import StillPatched

# Where the libraries' configs have the size of images: transformers, timm, open_clip.
SIZES = (
    ("image_size",),
    ("vision_config", "image_size"),
    ("model_args", "img_size"),
    ("pretrained_cfg", "input_size"),
    ("model_cfg", "vision_cfg", "image_size"),
)


@takes(CheckOptions)
def check(folder: str | Path, options: CheckOptions) -> StillPatched:
    """Load a patched folder, or one on the Hub (USER/NAME, see `load`), and look whether its surgery is in effect.

    Unlike `verify` it needs no original and no SHA256SUMS, so it takes what a library saved after training; see
    `still_patched` for a model in memory. All images go through the model at once.

    Args:
        options: see `options.CheckOptions`; its fields are the keyword arguments.

    Raises:
        UserError: the folder holds a program, whose inside cannot be seen.
        CheckpointError: the folder is incomplete, or code in it is not trusted.
    """
    root = at_home(folder, options.revision)
    fmt = folder_format(root)
    if fmt not in LIBRARIES:
        raise UserError(f"{root}: its format is {fmt}, whose modules cannot be looked at; use regsurgery verify")
    images = options.image_set()
    options.progress.stage("load")
    config = read_patched_config(root, fmt)
    model = reloaded(root, fmt, trusted=options.trust_remote_code, config=config)
    side = options.image_size
    size = _image_size(root, config) if side is None else (side, side)
    preprocess = partial(_pixels, size=size, settings=_normalisation(root, config))
    options.progress.stage("images")
    batches = [*images.batches(images.num_images, preprocess)]
    return still_patched(model, torch.cat(batches).to(next(model.parameters()).dtype), folder=root)


def _image_size(root: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) in pixels, by the library's config."""
    for path in SIZES:
        size: Any = config
        for key in path:
            size = size.get(key) if isinstance(size, Mapping) else None
        if isinstance(size, list) and len(size) > 1 and all(type(side) is int for side in size):
            return size[-2], size[-1]
        if type(size) is int:
            return size, size
    raise UserError(f"{root}: its config names no image size; give --image-size")


def _normalisation(root: Path, config: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the channels, as the library's config or its image processor's has them; 0.5."""
    path = root / "preprocessor_config.json"
    saved = read_json(path, "correct or remove it") if path.is_file() else {}
    for settings in (saved, config.get("pretrained_cfg"), config.get("preprocess_cfg")):
        if isinstance(settings, Mapping):
            mean, std = (settings.get(f"image_{name}", settings.get(name)) for name in ("mean", "std"))
            if isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3:
                return mean, std
    return [0.5] * 3, [0.5] * 3


def _pixels(pictures: list[Image], *, size: tuple[int, int], settings: tuple[list[float], list[float]]) -> Tensor:
    """`[B, 3, H, W]`, float32: resized and normalised, which is enough for norms."""
    height, width = size
    resized = [picture.convert("RGB").resize((width, height)) for picture in pictures]
    pixels_BCHW = torch.stack([pixels_of(picture) for picture in resized])
    mean_C11, std_C11 = (torch.tensor(values).reshape(3, 1, 1) for values in settings)
    return (pixels_BCHW - mean_C11) / std_C11
