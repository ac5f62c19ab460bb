"""Headers of safetensors files, checked before anything is read, without loading a tensor."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.errors import CheckpointError

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 16 << 20  # enough for 100,000 tensors; parsed, it takes many times as much memory
MAX_RANK, MAX_DIMENSION = 16, 1 << 48
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
               "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1,
               "F8_E5M2FNUZ": 1, "C64": 8}  # fmt: skip

TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
               "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "U16": "uint16", "U32": "uint32",
               "U64": "uint64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
               "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "C64": "complex64"}  # fmt: skip

DTYPE_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,30}")
OTHER_DTYPE = "give the checkpoint in float32, bfloat16 or float16"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file; `start` and `stop` are byte offsets from the beginning of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A checked header."""

    path: Path
    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: Path, *, any_dtype: bool = False) -> SafetensorsFile:
    """Read and check the header of a safetensors file against the file's size.

    Args:
        any_dtype: accept dtypes that are not in `DTYPE_BYTES`; only whole bytes of such tensors mean anything.

    Raises:
        CheckpointError: the file is cut off, misstates its size, or its tensors overlap, leave holes or have a size
            that is not shape x dtype; the message names the file, the tensor and the remedy.
    """

    def fail(problem: str, remedy: str = "get an intact copy of the file") -> CheckpointError:
        return CheckpointError(f"{path}: {problem}; {remedy}")

    size = path.stat().st_size
    with path.open("rb") as file:
        if size < 8:
            raise fail(f"cut off: {size} bytes, too short for a safetensors header")
        (header_size,) = struct.unpack("<Q", file.read(8))
        if header_size > min(size - 8, MAX_HEADER_BYTES):
            raise fail(f"cut off or not a safetensors file: the header claims {header_size} bytes, the file has {size}")
        raw = file.read(header_size)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise fail(f"the header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise fail("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise fail("__metadata__ must map text to text")
    entries = (_entry(name, value, fail, any_dtype) for name, value in header.items())
    tensors = sorted(entries, key=lambda tensor: (tensor.start, tensor.stop))
    expected = 0
    for tensor in tensors:
        if tensor.start != expected:
            raise fail(f"tensor {tensor.name!r} starts at byte {tensor.start}, expected {expected}")
        expected = tensor.stop
    if 8 + header_size + expected != size:
        raise fail(f"the header describes {8 + header_size + expected} bytes, the file has {size}")
    return SafetensorsFile(path, tuple(tensors), metadata, 8 + header_size)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name {name!r} is given twice")
        result[name] = value
    return result


def _entry(name: str, value: Any, fail: Callable[..., CheckpointError], any_dtype: bool) -> TensorEntry:
    try:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise fail(f"tensor {name!r} has no dtype, shape and data_offsets") from error
    if not isinstance(dtype, str) or not (dtype in DTYPE_BYTES or (any_dtype and DTYPE_NAME.fullmatch(dtype))):
        raise fail(f"tensor {name!r} has the dtype {repr(dtype)[:60]}, which is not supported", OTHER_DTYPE)
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise fail(f"tensor {name!r} has a shape or offsets that are not whole numbers")
    if len(shape) > MAX_RANK or max(*shape, start, stop) > MAX_DIMENSION:
        raise fail(f"tensor {name!r} has a shape or offsets beyond any file")
    num_bytes = DTYPE_BYTES.get(dtype, 0)
    for n in shape:
        num_bytes *= n
    if start > stop or (dtype in DTYPE_BYTES and stop - start != num_bytes):
        raise fail(f"tensor {name!r} has {stop - start} bytes, its shape and dtype need {num_bytes}")
    return TensorEntry(name, dtype, tuple(shape), start, stop)


@dataclass(frozen=True)
class LocatedTensor:
    """A tensor and where its data begins: `start` bytes into `path`."""

    path: Path
    entry: TensorEntry
    start: int

    @property
    def num_bytes(self) -> int:
        return self.entry.stop - self.entry.start

    @property
    def type(self) -> tuple[str, tuple[int, ...]]:
        """The dtype as safetensors writes it, and the shape."""
        return self.entry.dtype, self.entry.shape


def locate(weights: Sequence[Path], *, any_dtype: bool = False) -> dict[str, LocatedTensor]:
    """Every tensor of some safetensors files, by name; `any_dtype`: see `read_header`.

    Raises:
        CheckpointError: a file is broken, or a name is in two of them.
    """
    found: dict[str, LocatedTensor] = {}
    for path in weights:
        header = read_header(path, any_dtype=any_dtype)
        for entry in header.tensors:
            if entry.name in found:
                other = found[entry.name].path.name
                raise CheckpointError(f"{path}: tensor '{entry.name}' is in {other} too; keep one of the two files")
            found[entry.name] = LocatedTensor(path, entry, header.data_start + entry.start)
    return found


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that safetensors calls `name`, one of `TORCH_NAMES`."""
    import torch

    return getattr(torch, TORCH_NAMES[name])


def weights_dtype(weights: Sequence[Path]) -> torch.dtype:
    """The dtype of the first floating-point tensor of the first file, by name; float32 if there is none."""
    tensors = sorted(read_header(weights[0]).tensors, key=lambda tensor: tensor.name)
    return torch_dtype(
        next((tensor.dtype for tensor in tensors if tensor.dtype in ("F64", "F32", "F16", "BF16")), "F32")
    )
