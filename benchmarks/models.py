"""The models that are timed: stock timm ViTs with random weights, and what `regsurgery patch` makes of them.

Random weights take as long as trained ones. The recipes are made by hand: as many neurons, in as many blocks, as the
published models have.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import regsurgery
from benchmarks.hooks import hooked
from regsurgery.images.image_set import image_set
from regsurgery.recipe import Recipe

ORIGINAL, HOOKS = "original", "hooks"
NOTHING = Recipe({}, num_registers=0, scale=())  # what exports the original by the same way as the patched model
FIT_IMAGES = 8  # native and bias are fitted; how well does not change how long they run
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """A ViT: `[B, 3, side, side]` in; T tokens, width D, H hidden units and L blocks inside.

    Attributes:
        fits: native mode is fitted and written; else what it writes is made anew with random weights (`stock_host`),
            since the fit of a large model takes longer than the measuring.
    """

    name: str
    timm_name: str
    side: int
    num_tokens: int
    width: int
    hidden_size: int
    num_blocks: int
    patch: int
    register_neurons: Mapping[int, tuple[int, ...]]
    fits: bool = True
    num_registers: int = 1

    @property
    def floor(self) -> float:
        """Patched over original, in multiplications of the forward with the registers and of the one without."""
        return self._multiplications(self.num_tokens + self.num_registers) / self._multiplications(self.num_tokens)

    def _multiplications(self, num_tokens: int) -> int:
        """Of one image: linears of the blocks (4 D² + 2 D H a token), attention (2 T² D), the patch embedding."""
        linears = (4 * self.width + 2 * self.hidden_size) * self.width * num_tokens
        blocks = self.num_blocks * (linears + 2 * num_tokens**2 * self.width)
        return blocks + (self.num_tokens - 1) * 3 * self.patch**2 * self.width


def _neurons(step: int, count: int) -> tuple[int, ...]:
    return tuple(range(7, 7 + step * count, step))


SHAPES = {
    "Ti": Shape("ViT-Ti/16", "vit_tiny_patch16_224", 224, 197, 192, 768, 12, 16, {5: _neurons(61, 10)}),
    "B": Shape("ViT-B/16", "vit_base_patch16_224", 224, 197, 768, 3072, 12, 16, {5: _neurons(263, 10)}),
    "L": Shape(
        "ViT-L/14", "vit_large_patch14_224", 224, 257, 1024, 4096, 24, 14,
        {11: _neurons(401, 8), 12: _neurons(389, 9), 13: _neurons(409, 8)}, fits=False,
    ),
    "Ti4": Shape("ViT-Ti/16 R = 4", "vit_tiny_patch16_224", 224, 197, 192, 768, 12, 16, {5: _neurons(61, 10)},
                 num_registers=4),
    "B4": Shape("ViT-B/16 R = 4", "vit_base_patch16_224", 224, 197, 768, 3072, 12, 16, {5: _neurons(263, 10)},
                num_registers=4),
    "smoke": Shape("smoke", "test_vit", 160, 101, 64, 192, 6, 16, {2: _neurons(11, 4)}),
}  # fmt: skip


@dataclass
class Workshop:
    """Folders of one shape: the original, and what `patch` writes of it, each made when first asked for."""

    shape: Shape
    root: Path
    _made: dict[tuple[str, str], Path] = field(default_factory=dict)

    def source(self) -> Path:
        folder = self.root / "original"
        if not folder.is_dir():
            torch.manual_seed(0)
            model = timm.create_model(self.shape.timm_name, pretrained=False)
            with contextlib.redirect_stdout(io.StringIO()):
                timm.models.save_for_hf(model, str(folder), safe_serialization=True)
        return folder

    def patched(self, mode: str, fmt: str) -> Path:
        """What `patch --mode MODE --format FMT` writes; of `ORIGINAL` a program that has no surgery in it."""
        key = (mode, fmt)
        if key not in self._made:
            folder = self.root / f"{mode}-{fmt}"
            recipe = NOTHING if mode == ORIGINAL else self._recipe()
            regsurgery.patch(
                str(self.source()),
                folder,
                recipe=recipe,
                mode="shift" if mode == ORIGINAL else mode,
                format=fmt,
                calibrate=False,
                images=image_set(None, FIT_IMAGES),
                link=True,
                verification=False,
            )
            self._made[key] = folder
        return self._made[key]

    def _recipe(self) -> Recipe:
        return Recipe(self.shape.register_neurons, num_registers=self.shape.num_registers)

    def stock(self) -> nn.Module:
        """The original, as timm loads it."""
        return timm.create_model(f"local-dir:{self.source()}", pretrained=True).eval()

    def module(self, mode: str, fmt: str) -> nn.Module:
        """The model of a mode as its folder is loaded; `fmt` is `timm`, `pt2` or `onnx`."""
        if fmt != "timm":
            return regsurgery.load(self.patched(mode, fmt))
        if mode == ORIGINAL:
            return self.stock()
        if mode == HOOKS:
            return hooked(self.stock(), self.shape.register_neurons)
        if mode == "native" and not self.shape.fits:
            return stock_host(self.shape, self.stock())
        return regsurgery.load(self.patched(mode, fmt)).eval()


def stock_host(shape: Shape, original: nn.Module) -> nn.Module:
    """The class that native mode writes for a timm ViT, as timm builds it, with the original's weights, none edited."""
    host = timm.create_model(shape.timm_name, reg_tokens=1).eval()
    shapes = {name: value.shape for name, value in host.state_dict().items()}
    given = {name: value for name, value in original.state_dict().items() if shapes.get(name) == value.shape}
    host.load_state_dict(given, strict=False)
    return host


def share_weights(original: nn.Module, other: nn.Module) -> int:
    """Let `other` have the original's own tensors where it has equal ones: how fast a weight is read depends on where
    it happens to lie in memory, which would be taken for a cost of the surgery, or a gain.

    Returns:
        How many are shared.
    """
    ours, shared = dict(original.named_parameters()), 0
    for name, parameter in other.named_parameters():
        if name in ours and torch.equal(ours[name], parameter):
            parameter.data = ours[name].data
            shared += 1
    return shared


def on_device(module: nn.Module, fmt: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """`module` where and in what it is to run; programs stay on the CPU, in the dtype of the checkpoint."""
    if fmt == "timm":
        return module.to(device, dtype)
    assert (device.type, dtype) == ("cpu", torch.float32), "programs are written for the CPU and in float32"
    return module


def runner(module: Callable[[Tensor], Any], pixels: Tensor) -> Callable[[], Any]:
    return lambda: module(pixels)
