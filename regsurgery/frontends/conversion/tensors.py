"""Tensors of a file: their dtype, and their shapes as a header says them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from regsurgery.checkpoints.safetensors_file import SafetensorsFile, TensorEntry

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def common_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of all floating-point tensors; float32 if they have several."""
    import torch

    found = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    return found.pop() if len(found) == 1 else torch.float32


def shapes_of(path: Path, tensors: Mapping[str, Tensor]) -> SafetensorsFile:
    """A header with the names and shapes of `tensors`, which came from `path`."""
    entries = [TensorEntry(name, "F32", tuple(tensor.shape), 0, 0) for name, tensor in tensors.items()]
    return SafetensorsFile(path, tuple(entries), {}, 0)
