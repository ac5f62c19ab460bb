"""One part in its own process: `python -m benchmarks.part NAME FORM DEVICE SECONDS FILE`; `suite.py` starts it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from benchmarks.machine import gpu
from benchmarks.suite import PARTS


def main() -> int:
    """Writes the figures to FILE whenever there are more; 1 where some of them failed."""
    name, form, device, seconds, file = sys.argv[1:]
    figures: dict = {}
    for figures in importlib.import_module(PARTS[name].module).measure(form, device, float(seconds), print):
        extra = {"gpu": gpu()} if device.startswith("cuda") else {}
        Path(file).write_text(json.dumps({**figures, **extra}), "utf-8")
    for group, error in figures.get("failed", {}).items():
        print(f"{group}: {error}", file=sys.stderr)
    return 1 if figures.get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
