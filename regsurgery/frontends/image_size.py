"""Image sizes other than the model's own: which sizes it takes, and the model at another size."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from regsurgery.errors import UnsupportedModelError, UserError, in_short
from regsurgery.frontends.bounds import MAX_SIDE
from regsurgery.frontends.libraries import frontend
from regsurgery.frontends.loaded import Loaded

if TYPE_CHECKING:
    from PIL.Image import Image

LARGER = (1.5, 2.0)  # times the model's own size
# What a model raises for images of a size that it does not take.
REFUSES = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, NotImplementedError, IndexError)


class Ran(NamedTuple):
    """The preprocessed images, `[B, C, H, W]`, and the model's outputs."""

    images_BCHW: Tensor
    outputs: dict[str, Tensor]


def at_image_size(loaded: Loaded, side: int | None) -> Loaded:
    """`loaded` for square images of `side` pixels, preprocessed like its own; None: unchanged.

    Its tensors are those of the checkpoint, and its position embedding is interpolated as its library does that.

    Raises:
        UserError: the model does not take such images; the message says which sizes work.
    """
    if side is None or (side, side) == loaded.image_size:
        return loaded
    own = text(loaded.image_size)
    patch = patch_size(loaded)
    if not 0 < side <= MAX_SIDE:
        raise UserError(f"--image-size {side}: must be from 1 to {MAX_SIDE}; {loaded.source.id} was made for {own}")
    if patch is not None and (side % patch[0] or side % patch[1]):
        step = max(patch) if max(patch) % min(patch) == 0 else patch[0] * patch[1]
        below = max(step, side // step * step)
        raise UserError(
            f"--image-size {side}: {loaded.source.id} cuts images into patches of {text(patch)}; give a multiple of "
            f"{step}, such as {below} or {below + step}"
        )
    import PIL.Image

    try:
        resized = frontend(loaded.library).at_size(loaded, (side, side))
        run_on(resized, [PIL.Image.new("RGB", (side, side))])
    except (UnsupportedModelError, *REFUSES) as error:
        reason = in_short(error, 200)
        raise UserError(
            f"--image-size {side}: {loaded.architecture} takes only images of {own} ({reason}); leave out --image-size"
        ) from error
    return resized


def larger_sizes(loaded: Loaded, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Two larger image sizes (height, width) of whole patches, 1.5 times and twice `size`; empty if the patch size is
    not known.
    """
    patch = patch_size(loaded)
    if patch is None:
        return ()
    height, width = size
    return tuple((_whole(by * height, patch[0]), _whole(by * width, patch[1])) for by in LARGER)


def takes(loaded: Loaded, size: tuple[int, int], images: list[Image]) -> tuple[Loaded, Ran] | None:
    """`loaded` for images of `size` (height, width), and its run on `images`; None if it takes none of that size."""
    try:
        resized = frontend(loaded.library).at_size(loaded, size)
        return resized, run_on(resized, images)
    except (UnsupportedModelError, *REFUSES):
        return None


def patch_size(loaded: Loaded) -> tuple[int, int] | None:
    """(height, width) of a patch in pixels, or None if the patch embedding is not a convolution without overlap."""
    for module in loaded.model.get_submodule(loaded.entry).modules():
        if isinstance(module, nn.Conv2d):
            kernel = (module.kernel_size[0], module.kernel_size[1])
            return kernel if module.stride == kernel else None
    return None


def text(size: tuple[int, int]) -> str:
    """A size as text."""
    return f"{size[0]}x{size[1]} pixels"


def _whole(pixels: float, patch: int) -> int:
    return max(1, round(pixels / patch)) * patch


def run_on(loaded: Loaded, images: list[Image]) -> Ran:
    """Run images through the preprocessing and the model; exceptions pass through."""
    images_BCHW = pixels(loaded, images)
    with torch.no_grad():
        return Ran(images_BCHW, loaded.call(loaded.model, images_BCHW))


def pixels(loaded: Loaded, images: list[Image]) -> Tensor:
    """Images as the model takes them, `[B, C, H, W]`, where it is."""
    images_BCHW = loaded.preprocess(images)
    if tuple(images_BCHW.shape[-2:]) != loaded.image_size:
        returned = text((images_BCHW.shape[-2], images_BCHW.shape[-1]))
        raise UnsupportedModelError(f"its preprocessing returns images of {returned}")
    return images_BCHW.to(next(loaded.model.parameters()).device)
