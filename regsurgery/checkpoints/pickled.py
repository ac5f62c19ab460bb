"""Pickled weights (only with `--allow-pickle`): read without running code, and without unpacking a zip bomb."""

from __future__ import annotations

import pickle  # nosec B403 # its error
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from regsurgery.checkpoints.limits import BROKEN
from regsurgery.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

REMEDY = "convert it to safetensors"
SHARING = 4  # tensors may take this many times the file's size, since tied weights are stored once
SPARE_BYTES = 1 << 20


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of `torch.save`, read with `weights_only`.

    Raises:
        CheckpointError: it is not a state dict, is broken, would run code, or unpacks to much more than its size.
    """
    import torch

    _refuse_bomb(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (*BROKEN, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise CheckpointError(f"{path}: cannot be read as plain weights ({reason}); {REMEDY}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise CheckpointError(f"{path}: is not a plain state dict; {REMEDY}")
    total = 0
    for name, value in state.items():
        if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise CheckpointError(f"{path}: tensor {name!r} is sparse, quantised or has no data; {REMEDY}")
        total += value.numel() * value.element_size()
    if total > SHARING * path.stat().st_size + SPARE_BYTES:
        raise CheckpointError(f"{path}: its tensors take {total} bytes, the file has {path.stat().st_size}; {REMEDY}")
    return state


def _refuse_bomb(path: Path) -> None:
    """Torch stores its archives uncompressed, so the parts together are no larger than the file."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, *BROKEN) as error:
        raise CheckpointError(f"{path}: a broken archive ({str(error)[:200]}); get the file again") from error
    unpacked, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if unpacked > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path}: an archive of {size} bytes that unpacks to {unpacked}; {REMEDY}")
