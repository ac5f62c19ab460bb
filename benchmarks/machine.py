"""The machine that measures."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any


def machine(threads: int) -> dict[str, Any]:
    """Its processor, cores and versions; no name of its own, and no date."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "timm", "transformers", "onnxruntime")},
    }


def gpu() -> str:
    import torch

    return torch.cuda.get_device_name()


def _cpu() -> str:
    """The model as Linux has it; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
