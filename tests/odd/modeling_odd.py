"""Models that are on no list: code that comes with a checkpoint, as on the Hub. Tests copy this file into folders."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel


class OddConfig(PretrainedConfig):
    model_type = "odd"

    def __init__(
        self,
        width: int = 64,
        depth: int = 4,
        side: int = 64,
        patch: int = 8,
        channels: int = 3,
        kept: int = 0,
        **rest: Any,
    ) -> None:
        self.width, self.depth, self.patch, self.channels, self.kept = width, depth, patch, channels, kept
        self.img_size = side
        super().__init__(**rest)


class Mixer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.three, self.back = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        q, k, v = self.three(x).reshape(batch, count, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.back(mixed.transpose(1, 2).reshape(batch, count, width))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixer, self.grow, self.shrink = Mixer(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.before(x))
        return x + self.shrink(self.act(self.grow(self.between(x))))


class Eyes(nn.Module):
    """A tower that is no PreTrainedModel; `kept` register tokens of its own are thrown away at the end."""

    def __init__(self, config: OddConfig) -> None:
        super().__init__()
        self.cut = nn.Conv2d(config.channels, config.width, config.patch, config.patch)
        self.img_size, self.kept = config.img_size, config.kept
        self.place = nn.Parameter(0.1 * torch.randn(1, (config.img_size // config.patch) ** 2, config.width))
        if config.kept:
            self.register_tokens = nn.Parameter(0.1 * torch.randn(1, config.kept, config.width))
        self.first = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(Layer(config.width) for _ in range(config.depth))
        self.last = nn.LayerNorm(config.width)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.cut(pictures).flatten(2).transpose(1, 2) + self.place
        if self.kept:
            x = torch.cat((self.register_tokens.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)[:, self.kept :]


class OddBase(PreTrainedModel):
    config_class = OddConfig
    main_input_name = "pictures"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)


class OddRater(OddBase):
    """A pre-norm and a custom head: a weighted mean of all patches, and a score."""

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.eyes, self.weigh, self.rate = Eyes(config), nn.Linear(config.width, 1), nn.Linear(config.width, 3)
        self.post_init()

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        x = self.eyes(pictures)
        return {"score": self.rate((self.weigh(x).softmax(dim=1) * x).sum(dim=1)), "map": x}


class Core(nn.Module):
    def __init__(self, config: OddConfig) -> None:
        super().__init__()
        self.eyes, self.bridge = Eyes(config), nn.Linear(config.width, 32)


class OddCaptioner(OddBase):
    """A tower two levels down, beside a text decoder with a cache."""

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.core, self.words = Core(config), nn.Embedding(50, 32)
        self.speak, self.say = nn.GRU(32, 32, batch_first=True), nn.Linear(32, 50)
        self.post_init()

    def forward(self, input_ids: Tensor, pixel_values: Tensor, past_key_values: Any = None) -> dict[str, Any]:
        seen = self.core.bridge(self.core.eyes(pixel_values)).mean(dim=1)
        state = seen[None] if past_key_values is None else past_key_values
        spoken, state = self.speak(self.words(input_ids), state)
        return {"logits": self.say(spoken), "past_key_values": state}
