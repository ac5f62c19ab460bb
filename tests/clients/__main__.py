"""`python -m tests.clients [PYTEST ARGUMENTS]`: run the tools, and print the table of `docs/tools.md`."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.clients.conftest import MODES, figures

COLUMNS = ("stock", *MODES)


def table() -> str:
    """Markdown: a row for each tool and check, a column for each mode."""
    lines = ["| tool | check | " + " | ".join(COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for (tool, check), by_mode in sorted(figures.items()):
        package, _, what = tool.partition(" ")
        cells = [f"{by_mode[mode]:.2g}" if mode in by_mode else "" for mode in COLUMNS]
        lines.append(f"| {package} {version(package)} {what}".rstrip() + f" | {check} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    here = str(Path(__file__).parent)
    code = pytest.main(["-n", "0", "-q", "-m", "slow", "--disable-warnings", *sys.argv[1:], here])
    print(table())
    sys.exit(code)
