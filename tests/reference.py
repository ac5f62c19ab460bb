"""The surgery as a person would do it with runtime hooks: the independent reference of the parity gate.

Nothing is shared with `regsurgery.runtime.surgery`; the shift is written neuron by neuron.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def outlier_patches(norms_BN: Tensor) -> Tensor:
    """Which patches have more than 5 times the median norm of their image, `[B, N]`."""
    return norms_BN > 5 * norms_BN.median(dim=1, keepdim=True).values


def naive_shift(
    hidden: Tensor,
    neurons: Sequence[int],
    num_registers: int,
    num_prefix: int,
    scale: Sequence[float],
    inside: bool = False,
) -> Tensor:
    """DESIGN 3 with `fill: zero`, `prefix: keep`, one item and one neuron at a time."""
    hidden = hidden.clone()
    first_register = num_prefix if inside else hidden.shape[1] - num_registers
    for item in hidden:
        for neuron in neurons:
            column = item[:, neuron].clone()
            peak = column[column.abs().argmax()]
            item[num_prefix:, neuron] = 0  # the registers as well, which are set next
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
    inside: bool = False,
    prefixed: str = "",
    bias: str = "",
    masked: str = "",
    collector: str | None = None,
) -> None:
    """Register the hooks on `model`; registers start at zero. `inside` and what follows: see `Pico`."""

    def append(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        tokens = args[0] if args else kwargs["hidden_states"]
        zeros = torch.zeros(tokens.shape[0], num_registers, tokens.shape[2], dtype=tokens.dtype)
        behind = num_prefix if inside else tokens.shape[1]
        tokens = torch.cat([tokens[:, :behind], zeros, tokens[:, behind:]], dim=1)
        return ((tokens, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": tokens})

    def strip(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        tokens = output[0] if isinstance(output, tuple) else output
        behind = num_prefix if inside else tokens.shape[1] - num_registers
        tokens = torch.cat([tokens[:, :behind], tokens[:, behind + num_registers :]], dim=1)
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

    model.get_submodule(insert).register_forward_pre_hook(append, with_kwargs=True)
    model.get_submodule(last).register_forward_hook(strip)

    def strip_states(module: nn.Module, args: tuple, output: dict) -> None:
        own = output["last_hidden_state"].shape[1]
        output["hidden_states"] = tuple(
            state if state.shape[1] == own else strip(module, args, state) for state in output["hidden_states"]
        )

    if collector is not None:
        model.get_submodule(collector).register_forward_hook(strip_states)
    for block, listed in neurons.items():

        def shift(module: nn.Module, args: tuple, listed: Sequence[int] = listed) -> tuple:
            return (naive_shift(args[0], listed, num_registers, num_prefix, scale, inside), *args[1:])

        model.get_submodule(down.format(block)).register_forward_pre_hook(shift)

    count = 0
    while prefixed and _has(model, prefixed.format(count)):
        model.get_submodule(prefixed.format(count)).num_prefix_tokens += num_registers  # type: ignore[operator]
        count += 1
    for pattern, pad in ((bias, pad_what_it_makes), (masked, _pad_what_it_takes)):
        paths = {pattern.format(block) for block in range(len(neurons) + 2)} if pattern else set()
        for path in paths:
            pad(model.get_submodule(path), num_registers)


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def pad_what_it_makes(module: nn.Module, num_registers: int) -> None:
    """Zero bias for registers at the end; timm's modules are not called, they are asked."""

    def padded(bias: Tensor) -> Tensor:
        return nn.functional.pad(bias, (0, num_registers, 0, num_registers))

    for method in ("_get_rel_pos_bias", "get_bias"):
        if hasattr(module, method):
            stock = getattr(module, method)
            setattr(module, method, lambda: padded(stock()))  # noqa: B023
            return
    module.register_forward_hook(lambda module, args, output: padded(output))


def _pad_what_it_takes(module: nn.Module, num_registers: int) -> None:
    """Registers are not masked."""

    def taken(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        mask = kwargs.get("attention_mask")
        if mask is not None:
            value = True if mask.dtype == torch.bool else 0.0
            mask = nn.functional.pad(mask, (0, num_registers, 0, num_registers), value=value)
        return args, {**kwargs, "attention_mask": mask}

    module.register_forward_pre_hook(taken, with_kwargs=True)
