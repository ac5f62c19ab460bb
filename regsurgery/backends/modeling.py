"""`modeling_regsurgery.py`: the self-contained loader file of a patched folder, put together and imported."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import regsurgery.runtime
from regsurgery.errors import CheckpointError

FILE_NAME = "modeling_regsurgery.py"
MARK = "# --- below: the host library's part ---\n"


def modeling_source(host: ModuleType, tail: str = "") -> str:
    """The source of the loader file: `runtime.py`, what follows `MARK` in the host's loader module, and `tail`."""
    runtime = Path(regsurgery.runtime.__file__).read_text("utf-8")
    assert host.__file__ is not None
    host_part = Path(host.__file__).read_text("utf-8").split(MARK, 1)[1]
    return f"{runtime.rstrip()}\n\n\n{host_part.strip()}\n{tail}"


def import_modeling(folder: Path) -> ModuleType:
    """Import a patched folder's own loader file; it runs code, so the folder must be one that the user trusts."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; {folder} is not a folder that regsurgery wrote")
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    # Compiled here, not imported: an import would leave __pycache__ in the folder.
    exec(compile(path.read_text("utf-8"), str(path), "exec"), module.__dict__)
    return module
