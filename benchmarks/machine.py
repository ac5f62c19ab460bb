"""The machine that measures."""

from __future__ import annotations

import os
import platform
from typing import Any

from regsurgery.machine import cpu, version


def machine(threads: int) -> dict[str, Any]:
    """Its processor, cores and versions; no name of its own, and no date."""
    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "timm", "transformers", "onnxruntime")},
    }


def gpu() -> str:
    import torch

    return torch.cuda.get_device_name()
