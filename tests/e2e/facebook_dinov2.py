"""The network of facebook's DINOv2 code with plain tensor operations, written from its description; nothing is shared
with the project. Stands in for `torch.hub.load`, which needs the internet.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# width, blocks, heads, whether the MLP is SwiGLU
SHAPES = {
    "dinov2_vits14": (384, 12, 6, False),
    "dinov2_vitb14": (768, 12, 12, False),
    "dinov2_vitl14": (1024, 24, 16, False),
    "dinov2_vitg14": (1536, 40, 24, True),
    "dinov2_pico14": (64, 4, 4, False),
    "dinov2_gated14": (96, 4, 4, True),
}


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, gated: bool) -> None:
        super().__init__()
        self.heads, self.gated = heads, gated
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.ls1, self.ls2 = Scale(width), Scale(width)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        if gated:
            hidden = {96: 256, 1536: 4096}[width]
            self.mlp.w12, self.mlp.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)
        else:
            self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1.gamma * self.attention(self.norm1(x))
        return x + self.ls2.gamma * self.feed_forward(self.norm2(x))

    def attention(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        head = width // self.heads
        q, k, v = self.attn.qkv(x).reshape(batch, tokens, 3, self.heads, head).permute(2, 0, 3, 1, 4)
        weights = ((q * head**-0.5) @ k.transpose(-1, -2)).softmax(dim=-1)
        return self.attn.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))

    def feed_forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.mlp.fc2(F.gelu(self.mlp.fc1(x)))
        both = self.mlp.w12(x)
        half = both.shape[-1] // 2
        return self.mlp.w3(F.silu(both[..., :half]) * both[..., half:])


class Network(nn.Module):
    def __init__(
        self,
        shape: tuple[int, int, int, bool],
        img_size: int = 518,
        num_register_tokens: int = 0,
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
    ) -> None:
        super().__init__()
        width, depth, heads, gated = shape
        self.side, self.antialias, self.offset = img_size // 14, interpolate_antialias, interpolate_offset
        self.num_registers = num_register_tokens
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, 14, 14)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.side**2, width))
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.empty(1, num_register_tokens, width))
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.blocks = nn.ModuleList([Block(width, heads, gated) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Identity()

    def positions(self, rows: int, columns: int) -> Tensor:
        if rows * columns == self.side**2 and rows == columns:
            return self.pos_embed
        width = self.pos_embed.shape[-1]
        grid = self.pos_embed[:, 1:].float().reshape(1, self.side, self.side, width).permute(0, 3, 1, 2)
        how: dict[str, Any] = {"size": (rows, columns)}
        if self.offset:
            how = {"scale_factor": ((rows + self.offset) / self.side, (columns + self.offset) / self.side)}
        grid = F.interpolate(grid, mode="bicubic", antialias=self.antialias, **how)
        assert grid.shape[-2:] == (rows, columns)
        patches = grid.permute(0, 2, 3, 1).reshape(1, -1, width)
        return torch.cat((self.pos_embed[:, :1].float(), patches), dim=1).to(self.pos_embed.dtype)

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        x = self.patch_embed.proj(images)
        rows, columns = x.shape[-2:]
        x = torch.cat((self.cls_token.expand(len(images), -1, -1), x.flatten(2).transpose(1, 2)), dim=1)
        x = x + self.positions(rows, columns)
        if self.num_registers:
            x = torch.cat((x[:, :1], self.register_tokens.expand(len(images), -1, -1), x[:, 1:]), dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        behind = 1 + self.num_registers
        return {"x_norm_clstoken": x[:, 0], "x_norm_regtokens": x[:, 1:behind], "x_norm_patchtokens": x[:, behind:]}

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images)["x_norm_clstoken"])


def hub_load(repo: str, entry: str, *, pretrained: bool = True, **arguments: Any) -> Network:
    """`torch.hub.load`, as the cards call it."""
    assert repo == "facebookresearch/dinov2" and not pretrained
    return Network(SHAPES[entry], **arguments)
