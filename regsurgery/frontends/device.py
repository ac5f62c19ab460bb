"""Devices: check that the machine has them, and put a model there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regsurgery.errors import UserError, in_short

if TYPE_CHECKING:
    from torch import nn


def check_device(device_map: str | None) -> None:
    """Raise `UserError` for a device map that does not name a device of this machine."""
    if device_map is None or device_map == "auto":
        return
    import torch

    try:
        kind = torch.device(device_map).type
    except RuntimeError as error:
        raise UserError(
            f"device map {device_map}: not a device; give auto, cpu, cuda or cuda:1, for example"
        ) from error
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    present = ["cpu", *([accelerator.type] if accelerator else [])]
    if kind not in present:
        raise UserError(f"device map {device_map}: torch finds no {kind} here; give auto or {' or '.join(present)}")


def place(model: nn.Module, device_map: str | None) -> nn.Module:
    """Put a loaded model where `device_map` says; over several devices through accelerate.

    Raises:
        UserError: no such device.
    """
    if device_map is None:
        return model
    import accelerate
    from torch import nn

    # Blocks (members of a module list) hold residual adds, whose operands must be on one device.
    lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    whole = sorted({type(member).__name__ for members in lists for member in members})
    try:
        if device_map != "auto":
            return model.to(device_map)
        return accelerate.dispatch_model(model, accelerate.infer_auto_device_map(model, no_split_module_classes=whole))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"device map {device_map}: {in_short(error, 200)}") from error
