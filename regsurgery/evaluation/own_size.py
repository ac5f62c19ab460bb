"""Patch features of images at their own size, cut to whole patches: what dense tasks are measured on.

A graph holds for one image size, and a folder of photos has dozens; so the module form runs here, and is read, not
changed: what linears give is seen on its way through torch, in every library alike.

Shape suffixes: B batch, T tokens, N patches, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regsurgery import backends
from regsurgery.errors import UnsupportedModelError, UserError
from regsurgery.image_sources import UNREADABLE, decode
from regsurgery.loading import Loaded
from regsurgery.sites import Block, Sites

PROJECTIONS = ("queries", "keys", "values")
TOKENS = "tokens"  # the stream after the block, at mean 0 and variance 1 as the norm behind the last block has it
BATCH_PATCHES = 6144  # patches of one batch; more are no faster on a CPU
Wanted = tuple[int, str]  # block, and one of PROJECTIONS or TOKENS


@dataclass(frozen=True)
class Model:
    """A model that can take any image size.

    Attributes:
        loaded: the stock model.
        operate: makes of a stock model the patched one, in place; None for the original and in native mode.
    """

    loaded: Loaded
    sites: Sites
    operate: Callable[[nn.Module], object] | None = None

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        height, width = self.loaded.image_size
        return round((height * width / (self.sites.num_tokens - self.sites.num_prefix)) ** 0.5)


@dataclass(frozen=True)
class Batch:
    """Images of one size.

    Attributes:
        indices: their places in the list of paths.
        grid: rows and columns of patches.
        pixels: RGB `[B, 3, H, W]`, 0 to 1.
    """

    indices: list[int]
    grid: tuple[int, int]
    pixels: Tensor


def batches(paths: Sequence[Path], patch: int) -> Iterator[Batch]:
    """The images in batches of equal size, cut at the right and at the bottom to whole patches.

    Raises:
        UserError: an image cannot be read, or is smaller than a patch.
    """
    from torchvision.transforms.v2 import functional

    by_grid: dict[tuple[int, int], list[int]] = {}
    for index, path in enumerate(paths):
        by_grid.setdefault(_grid(path, patch), []).append(index)
    for (rows, columns), indices in sorted(by_grid.items()):
        size = max(1, BATCH_PATCHES // (rows * columns))
        for start in range(0, len(indices), size):
            chosen = indices[start : start + size]
            pictures = [functional.pil_to_tensor(_read(paths[index])) for index in chosen]
            pixels = torch.stack([picture[:, : rows * patch, : columns * patch] for picture in pictures])
            yield Batch(chosen, (rows, columns), functional.to_dtype(pixels, torch.float32, scale=True))


def _grid(path: Path, patch: int) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            width, height = image.size
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable image ({error}); take it out of the folder") from error
    if min(width, height) < patch:
        raise UserError(f"{path}: {width}x{height} pixels, less than one patch of {patch}; take it out of the folder")
    return height // patch, width // patch


def _read(path: Path) -> Image.Image:
    try:
        return decode(path)
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable image ({error}); take it out of the folder") from error


class Reader:
    """Runs a model at the images' sizes and reads features off it."""

    def __init__(self, model: Model) -> None:
        self.stock, self.sites, self.operate = model.loaded, model.sites, model.operate
        self.scale, self.offset = _colours(model.loaded)
        self.resized: Loaded | None = None

    @torch.no_grad()
    def __call__(self, batch: Batch, wanted: Sequence[Wanted]) -> dict[Wanted, Tensor]:
        """Float32 features `[B, N, D]` of the patches, row by row, for each block and kind that is wanted.

        Raises:
            UnsupportedModelError: the model takes no other image size, or its projections cannot be told apart.
        """
        loaded = self._at_size((batch.pixels.shape[2], batch.pixels.shape[3]))
        parameter = next(loaded.model.parameters())
        pixels = (batch.pixels * self.scale + self.offset).to(parameter)
        blocks = [self.sites.blocks[index] for index in sorted({index for index, _ in wanted})]
        weights = {name: loaded.model.get_parameter(name) for block in blocks for name in block.attention_weights}
        streams: dict[int, Tensor] = {}
        hooks = [
            loaded.model.get_submodule(block.path).register_forward_hook(
                lambda module, args, output, index=block.index: streams.update(
                    {index: output[0] if isinstance(output, tuple) else output}
                )
            )
            for block in blocks
            if (block.index, TOKENS) in wanted
        ]
        try:
            with _Linears(weights) as linears:
                loaded.call(loaded.model, pixels)
        finally:
            for hook in hooks:
                hook.remove()
        return {
            (index, kind): self._patches(
                F.layer_norm(streams[index].float(), streams[index].shape[-1:])
                if kind == TOKENS
                else projection(linears.given, self.sites.blocks[index], kind).float(),
                batch.grid,
            )
            for index, kind in wanted
        }

    def _at_size(self, size: tuple[int, int]) -> Loaded:
        before = self.resized or self.stock
        resized = backends.library(before.library).at_size(before, size)
        if self.operate is not None and resized.model is self.stock.model:
            resized = replace(resized, model=copy.deepcopy(resized.model))  # others use the stock one
        if self.operate is not None and (self.resized is None or resized.model is not self.resized.model):
            self.operate(resized.model)
        self.resized = resized
        return resized

    def _patches(self, tokens_BTD: Tensor, grid: tuple[int, int]) -> Tensor:
        """Registers stand behind the patches, or before them, where the stream's sites say that placement."""
        num_patches = grid[0] * grid[1]
        behind = self.sites.placement == "prefix"
        first = tokens_BTD.shape[1] - num_patches if behind else self.sites.num_prefix
        return tokens_BTD[:, first : first + num_patches]


def _colours(loaded: Loaded) -> tuple[Tensor, Tensor]:
    """Factor and summand, `[3, 1, 1]`, by which the model's own preprocessing maps colours from 0..1."""
    size = (loaded.image_size[1], loaded.image_size[0])
    black, white = (
        loaded.preprocess([Image.new("RGB", size, (level,) * 3)])[0].float().mean(dim=(1, 2)) for level in (0, 255)
    )
    return (white - black)[:, None, None], black[:, None, None]


class _Linears(TorchFunctionMode):
    """Keeps what linears with some weights gave: name -> `[B, T, out]`."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(weight): name for name, weight in weights.items()}
        self.given: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.linear:
            name = self.names.get(id(args[1] if len(args) > 1 else kwargs["weight"]))
            if name is not None:
                self.given[name] = output
        elif func in (F.multi_head_attention_forward, torch._native_multi_head_attention):
            weight, bias = args[5:7]
            name = self.names.get(id(weight))
            if name is not None:
                given = torch.cat(
                    [F.linear(*each) for each in zip(args[:3], weight.chunk(3), bias.chunk(3), strict=True)], dim=-1
                )
                # The first of the two functions takes tokens before images, whatever the module does.
                self.given[name] = given.transpose(0, 1) if func is F.multi_head_attention_forward else given
        return output


def projection(given: Mapping[str, Tensor], block: Block, kind: str) -> Tensor:
    """The queries, keys or values `[B, T, D]` of all heads of a block, as its projections give them.

    Args:
        given: weight -> what the linear with that weight gave.

    Raises:
        UnsupportedModelError: the block's projections are not called as linears, or cannot be told apart.
    """
    names = block.attention_weights
    missing = [name for name in names if name not in given]
    if not names or missing:
        raise UnsupportedModelError(
            f"block {block.index}: its {kind} cannot be read: "
            + (f"the model calls no linear with {missing[0]}" if missing else "no projections were found")
        )
    if len(names) == 1 and given[names[0]].shape[-1] % len(PROJECTIONS) == 0:
        return given[names[0]].chunk(len(PROJECTIONS), dim=-1)[PROJECTIONS.index(kind)]
    by_initial = {name.split(".")[-2][:1]: name for name in names}  # query, q_proj, to_q is unknown
    if set(by_initial) != {each[0] for each in PROJECTIONS}:
        raise UnsupportedModelError(f"block {block.index}: which of {', '.join(names)} gives the {kind} is not known")
    return given[by_initial[kind[0]]]
