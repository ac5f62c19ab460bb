"""One part in its own process: `python -m benchmarks.part NAME FORM DEVICE SECONDS FILE MORE`; `suite.py` starts it.

MORE is a JSON object: the keywords of its `measure` besides those of every part.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from benchmarks.machine import gpu
from benchmarks.suite import PARTS


def main() -> int:
    """Writes the figures to FILE whenever there are more; 1 where some of them failed."""
    name, form, device, seconds, file, more = sys.argv[1:]
    figures: dict = {}
    measure = importlib.import_module(PARTS[name].module).measure
    for figures in measure(form, device, float(seconds), print, **json.loads(more)):
        extra = {"gpu": gpu()} if device.startswith("cuda") else {}
        Path(file).write_text(json.dumps({**figures, **extra}), "utf-8")
    for group, error in figures.get("failed", {}).items():
        print(f"{group}: {error}", file=sys.stderr)
    return 1 if figures.get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
