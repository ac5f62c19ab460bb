"""The command line as tests call it, and what one run gave."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

PROGRAM = Path(sys.executable).parent / "regsurgery"


class Done(NamedTuple):
    """Exit code, stdout and stderr."""

    code: int
    out: str
    err: str
