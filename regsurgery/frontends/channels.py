"""Models of images with other than three channels: pictures are given as many as a model takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow


def mode_for(mean: Any) -> str:
    """The mode of pictures that are normalised with `mean`, a number for each channel; otherwise RGB."""
    return MODES.get(len(mean), "RGB") if isinstance(mean, list | tuple) else "RGB"


def with_channels(pixels: Tensor, channels: int) -> Tensor:
    """`[B, C, H, W]` with `channels` channels: their mean for one, else the given ones over and over."""
    given = pixels.shape[1]
    if given == channels:
        return pixels
    if channels == 1:
        return pixels.mean(dim=1, keepdim=True)
    return pixels[:, [channel % given for channel in range(channels)]]
