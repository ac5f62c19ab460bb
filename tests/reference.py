"""The surgery as a person would do it with runtime hooks: the independent reference of the parity gate.

Nothing is shared with `regsurgery.runtime`; the shift is written neuron by neuron.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def naive_shift(
    hidden: Tensor, neurons: Sequence[int], num_registers: int, num_prefix: int, scale: Sequence[float]
) -> Tensor:
    """DESIGN 3 with `fill: zero`, `prefix: keep`, one item and one neuron at a time."""
    hidden = hidden.clone()
    first_register = hidden.shape[1] - num_registers
    for item in hidden:
        for neuron in neurons:
            column = item[:, neuron].clone()
            peak = column[column.abs().argmax()]
            item[num_prefix:first_register, neuron] = 0
            for register in range(num_registers):
                item[first_register + register, neuron] = scale[register] * peak
    return hidden


def hook(
    model: nn.Module,
    *,
    insert: str,
    last: str,
    down: str,
    neurons: Mapping[int, Sequence[int]],
    num_registers: int,
    num_prefix: int,
    scale: Sequence[float],
) -> None:
    """Register the hooks on `model`; registers start at zero."""

    def append(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        tokens = args[0] if args else kwargs["hidden_states"]
        zeros = torch.zeros(tokens.shape[0], num_registers, tokens.shape[2], dtype=tokens.dtype)
        tokens = torch.cat([tokens, zeros], dim=1)
        return ((tokens, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": tokens})

    def strip(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        tokens = output[0] if isinstance(output, tuple) else output
        tokens = tokens[:, : tokens.shape[1] - num_registers]
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

    model.get_submodule(insert).register_forward_pre_hook(append, with_kwargs=True)
    model.get_submodule(last).register_forward_hook(strip)
    for block, listed in neurons.items():

        def shift(module: nn.Module, args: tuple, listed: Sequence[int] = listed) -> tuple:
            return (naive_shift(args[0], listed, num_registers, num_prefix, scale), *args[1:])

        model.get_submodule(down.format(block)).register_forward_pre_hook(shift)
