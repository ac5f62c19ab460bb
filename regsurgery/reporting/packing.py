"""Arrays as compact text for the page: base64 of small integers, which `report.js` decodes."""

from __future__ import annotations

import base64
import math
from typing import Any

import torch
from torch import Tensor

from regsurgery.emit.picture import palette


def packed_norms(norms: Tensor) -> dict[str, Any]:
    """Positive numbers of any shape as 16-bit steps of their logarithm: `low` and `high` are its ends.

    A value comes back within half a step, a factor of `exp((high - low) / 131070)`.
    """
    log = norms.double().clamp_min(1e-12).log()
    low, high = float(log.min()), float(log.max())
    steps = ((log - low) / max(high - low, 1e-12) * 65535).round().to(torch.int32)
    return {"low": low, "high": high, "data": _base64(steps.numpy().astype("<u2").tobytes())}


def packed_maps(maps_MN: Tensor) -> dict[str, Any]:
    """Non-negative maps `[..., N]` as bytes, 255 being the largest of each map, which is in `scale` (flattened)."""
    largest_M1 = maps_MN.amax(dim=-1, keepdim=True)
    steps = (maps_MN / largest_M1.clamp_min(1e-12) * 255).round().to(torch.uint8)
    scale = [_significant(value) for value in largest_M1.flatten().tolist()]
    return {"scale": scale, **packed_bytes(steps)}


def packed_activations(values_KIN: Tensor) -> dict[str, Any]:
    """Each neuron's activations `[K, I, N]` as bytes, 0 to 255 from the neuron's smallest to its largest, which are in
    `low` and `high`.
    """
    low = values_KIN.amin(dim=(1, 2), keepdim=True)
    high = values_KIN.amax(dim=(1, 2), keepdim=True)
    steps = ((values_KIN - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8)
    ends = {
        name: [_significant(value) for value in end.flatten().tolist()] for name, end in (("low", low), ("high", high))
    }
    return {**ends, **packed_bytes(steps)}


def packed_bytes(levels: Tensor) -> dict[str, str]:
    """A uint8 tensor of any shape."""
    return {"data": _base64(levels.contiguous().numpy().tobytes())}


def packed_palette() -> dict[str, str]:
    """The colours of maps, 256 of them from low to high: red, green, blue."""
    return packed_bytes(torch.frombuffer(bytearray(palette().tobytes()), dtype=torch.uint8))


def size_of_maps(shape: tuple[int, ...]) -> int:
    """Bytes that maps of this shape take in the page, both models, base64 included."""
    return 2 * math.prod(shape) * 4 // 3


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _significant(value: float) -> float:
    return float(f"{value:.4g}")
