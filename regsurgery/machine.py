"""The machine that a figure was measured on, and the memory that a process took."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "timm", "transformers", "open_clip_torch")


def cpu() -> str:
    """The processor's model as Linux has it; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def hardware(gpu: str | None) -> dict[str, Any]:
    """Processor, cores, memory in GB and `gpu`, with the versions of Python and `PACKAGES`; no name of its own, and no
    date.
    """
    import psutil

    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "gpu": gpu,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def peak_rss_mb() -> float:
    """The most memory that this process has had resident so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)
