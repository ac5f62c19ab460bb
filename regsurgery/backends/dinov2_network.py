"""The network of facebook's DINOv2 code, by its names: what a folder of format `dinov2` is run with here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH_SIZE, NORM_EPS = 14, 1e-6


@dataclass(frozen=True)
class Entry:
    """A function of that code's `hubconf.py`.

    Attributes:
        gated: whether its MLPs are SwiGLU.
    """

    name: str
    width: int
    depth: int
    num_heads: int
    gated: bool = False

    @property
    def hidden(self) -> int:
        """Hidden units of an MLP."""
        return (int(4 * self.width * 2 / 3) + 7) // 8 * 8 if self.gated else 4 * self.width


ENTRIES = (
    Entry("dinov2_vits14", 384, 12, 6),
    Entry("dinov2_vitb14", 768, 12, 12),
    Entry("dinov2_vitl14", 1024, 24, 16),
    Entry("dinov2_vitg14", 1536, 40, 24, gated=True),
)


@dataclass(frozen=True)
class Interpolation:
    """How positions are resized for other images: by default as for the weights without registers."""

    antialias: bool = False
    offset: float = 0.1

    def __call__(self, position_1ND: Tensor, size: tuple[int, int]) -> Tensor:
        """Positions of a square of patches for (rows, columns) of them."""
        num_patches, width = position_1ND.shape[1:]
        side = int(num_patches**0.5)
        if size == (side, side):
            return position_1ND
        scale = tuple((count + self.offset) / side for count in size)
        how: dict[str, Any] = {"scale_factor": scale} if self.offset else {"size": size}
        grid_1DHW = position_1ND.float().reshape(1, side, side, width).permute(0, 3, 1, 2)
        resized_1DHW = F.interpolate(grid_1DHW, mode="bicubic", antialias=self.antialias, **how)
        return resized_1DHW.flatten(2).transpose(1, 2).to(position_1ND.dtype)


class SwiGLU(nn.Module):
    """The gated MLP, its two input matrices in one."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class PatchEmbed(nn.Module):
    """Patches as tokens `[B, N, D]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH_SIZE, PATCH_SIZE)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2] % PATCH_SIZE or images.shape[-1] % PATCH_SIZE:
            raise ValueError(f"images of {tuple(images.shape[-2:])} are not whole patches of {PATCH_SIZE} pixels")
        return self.proj(images).flatten(2).transpose(1, 2)


class DINOv2(nn.Module):
    """`DinoVisionTransformer`: the same state dict and outputs; of its methods `forward` and `forward_features`."""

    def __init__(self, entry: Entry, num_patches: int, num_registers: int, interpolation: Interpolation) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        width = entry.width
        self.interpolation = interpolation
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, width)) if num_registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.patch_embed = PatchEmbed(width)
        norm: Any = partial(nn.LayerNorm, eps=NORM_EPS)
        blocks = [
            Block(width, entry.num_heads, qkv_bias=True, init_values=1.0, norm_layer=norm) for _ in range(entry.depth)
        ]
        if entry.gated:
            for block in blocks:
                block.mlp = SwiGLU(width, entry.hidden)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm(width)

    @property
    def num_registers(self) -> int:
        """Register tokens, those that the model was trained with among them."""
        return 0 if self.register_tokens is None else self.register_tokens.shape[1]

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        """The normed tokens, as that code names them."""
        size = (images.shape[-2] // PATCH_SIZE, images.shape[-1] // PATCH_SIZE)
        position_1ND = self.interpolation(self.pos_embed[:, 1:], size)
        patches_BND = self.patch_embed(images) + position_1ND
        prefix = [
            self.cls_token + self.pos_embed[:, :1],
            *([] if self.register_tokens is None else [self.register_tokens]),
        ]
        tokens_BTD = torch.cat([*(token.expand(patches_BND.shape[0], -1, -1) for token in prefix), patches_BND], dim=1)
        for block in self.blocks:
            tokens_BTD = block(tokens_BTD)
        normed_BTD, behind = self.norm(tokens_BTD), 1 + self.num_registers
        return {
            "x_norm_clstoken": normed_BTD[:, 0],
            "x_norm_regtokens": normed_BTD[:, 1:behind],
            "x_norm_patchtokens": normed_BTD[:, behind:],
            "x_prenorm": tokens_BTD,
        }

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_features(images)["x_norm_clstoken"]


def build(entry: Entry, tensors: Mapping[str, Tensor], interpolation: Interpolation) -> DINOv2:
    """The network of `entry` for the positions and registers in `tensors`, without weights."""
    registers_1RD = tensors.get("register_tokens")
    num_registers = 0 if registers_1RD is None else registers_1RD.shape[1]
    with torch.device("meta"):
        return DINOv2(entry, tensors["pos_embed"].shape[1] - 1, num_registers, interpolation)
