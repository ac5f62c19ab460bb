"""Test-time registers by forward hooks, as the paper's code does it: what a patched model is timed against.

Hooks insert the register behind the embedding, clone and edit the whole activation of every MLP that has register
neurons, and cut the register off behind the last block. Unlike the reference code, each image of a batch gets its own
extremes; without that the outputs would be others, and the comparison none.

Shape suffixes: B batch, T tokens (class token + patches + register), H hidden units, K register neurons of one block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def hooked(model: nn.Module, neurons: Mapping[int, Sequence[int]]) -> nn.Module:
    """Register the hooks on a timm ViT with one prefix token; returns `model`."""
    model.pos_drop.register_forward_hook(_append)  # type: ignore[union-attr]
    for block, listed in neurons.items():
        model.blocks[block].mlp.act.register_forward_hook(_Shift(listed))  # type: ignore[index,union-attr]
    model.blocks[-1].register_forward_hook(_cut)  # type: ignore[index,union-attr]
    return model


def _append(module: nn.Module, args: tuple, tokens_BTD: Tensor) -> Tensor:
    zeros_B1D = torch.zeros_like(tokens_BTD[:, :1])
    return torch.cat([tokens_BTD, zeros_B1D], dim=1)


def _cut(module: nn.Module, args: tuple, tokens_BTD: Tensor) -> Tensor:
    return tokens_BTD[:, :-1]


class _Shift:
    def __init__(self, neurons: Sequence[int]) -> None:
        self.neurons = list(neurons)

    def __call__(self, module: nn.Module, args: tuple, output_BTH: Tensor) -> Tensor:
        edited_BTH = output_BTH.clone()
        picked_BTK = edited_BTH[:, :, self.neurons]
        at_B1K = picked_BTK.abs().argmax(dim=1, keepdim=True)
        edited_BTH[:, 1:, self.neurons] = 0
        edited_BTH[:, -1, self.neurons] = picked_BTK.gather(1, at_B1K)[:, 0]
        return edited_BTH
