"""Pickled weights (only with `--allow-pickle`): read without running code, and without unpacking a zip bomb."""

from __future__ import annotations

import argparse
import pathlib
import pickle  # nosec B403 # its error
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.checkpoints import torchscript
from regsurgery.checkpoints.limits import BROKEN
from regsurgery.errors import CheckpointError, in_short

if TYPE_CHECKING:
    from torch import Tensor

REMEDY = "convert it to safetensors"
SHARING = 4  # tensors may take this many times the file's size, since tied weights are stored once
SPARE_BYTES = 1 << 20
FOREIGN = re.compile(r"(?:Unsupported global: (?:GLOBAL )?|unsupported GLOBAL )([\w.]+)")  # torch's words, and ours


def unpickled(path: Path) -> Any:
    """What a file of `torch.save` holds, read with `weights_only`; of a TorchScript archive its tensors by name.

    Besides tensors and plain data it may hold what training scripts put next to the weights, none of which runs code:
    their arguments (`argparse.Namespace`), paths, and NumPy's numbers.

    Raises:
        CheckpointError: it is broken, would run code, or unpacks to much more than its size.
    """
    import torch

    names = _entries(path)
    try:
        if torchscript.is_torchscript(names):
            return torchscript.read_torchscript(path)
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (*BROKEN, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: cannot be read as plain weights ({_reason(error)}); {REMEDY}") from error


def plain_state(value: Any, path: Path, size: int | None = None) -> dict[str, Tensor]:
    """`value`, what `path` holds or a part of it, if it is a state dict.

    Args:
        size: in bytes of the files that it came from; by default that of `path`.

    Raises:
        CheckpointError: it is not, or its tensors are not plain, or take much more than the file's size.
    """
    import torch

    if (
        not isinstance(value, dict)
        or not value
        or not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items())
    ):
        raise CheckpointError(f"{path}: is not a plain state dict; {REMEDY}")
    total, size = 0, path.stat().st_size if size is None else size
    for name, tensor in value.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise CheckpointError(f"{path}: tensor {name!r} is sparse, quantised or has no data; {REMEDY}")
        total += tensor.numel() * tensor.element_size()
    if total > SHARING * size + SPARE_BYTES:
        raise CheckpointError(f"{path}: its tensors take {total} bytes, the file has {size}; {REMEDY}")
    return value


def _harmless() -> list[Any]:
    """Types in training checkpoints that only hold data, for `weights_only`; see `unpickled`."""
    import numpy as np

    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    numbers = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    return [
        argparse.Namespace,
        pathlib.PosixPath,
        np.dtype,
        *numbers,
        scalar,
        (scalar, "numpy.core.multiarray.scalar"),  # as NumPy 1 wrote it
    ]


def _reason(error: BaseException) -> str:
    """The first line of an error; for a type that `weights_only` refuses, its name."""
    text = str(error)
    foreign = FOREIGN.search(text)
    if foreign is not None:
        return f"it holds a {foreign[1]}, which is not data"
    return (text.splitlines() or [type(error).__name__])[0][:300]


def _entries(path: Path) -> list[str]:
    """The names in an archive, [] for another file.

    Torch stores its archives uncompressed, so the parts together are no larger than the file.

    Raises:
        CheckpointError: it unpacks to more than that.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return []
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, *BROKEN) as error:
        raise CheckpointError(f"{path}: a broken archive ({in_short(error, 200)}); get the file again") from error
    names = [entry.filename for entry in entries]
    if torchscript.is_torchscript(names):
        entries = [entry for entry in entries if torchscript.is_read(entry.filename)]  # its code may be compressed
    unpacked, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if unpacked > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path}: an archive of {size} bytes that unpacks to {unpacked}; {REMEDY}")
    return names
