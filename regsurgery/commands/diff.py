"""`diff`: which tensors of two checkpoints differ, matched by name across shards.

Headers first; tensors of one dtype and shape are compared as bytes, a chunk at a time, and only chunks whose bytes
differ are read as numbers. So memory does not grow with the checkpoints, and torch is imported only for a difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.checkpoints.copying import CHUNK_BYTES
from regsurgery.checkpoints.reading import weight_files
from regsurgery.checkpoints.safetensors_file import DTYPE_BYTES, LocatedTensor, locate, torch_dtype
from regsurgery.checkpoints.watched import Watched
from regsurgery.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from regsurgery.progress import Progress

SINGLES = ("model.safetensors", "open_clip_model.safetensors")  # the libraries' names of an unsharded checkpoint
NUMBERS_BYTES = 1 << 18  # bytes of a chunk read as numbers at a time; as float64 they take up to eight times that


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that only one side has; `dtype` as safetensors writes it (`F32`)."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Retyped:
    """A tensor whose dtype or shape differs between the sides; its values are not compared."""

    name: str
    dtype_a: str
    dtype_b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]


@dataclass(frozen=True)
class Changed:
    """A tensor whose bytes differ. Of a dtype that is not known here (F4), bytes are counted instead of elements.

    Attributes:
        max_abs: largest |a - b| in float64 over the elements that are numbers on both sides; None if there is none.
        num_different: elements whose bytes differ; 0.0 and -0.0 count, with a `max_abs` of 0.
        num_elements: total number of elements.
        num_nan: elements whose bytes differ and that are NaN on one side or both.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    max_abs: float | None
    num_different: int
    num_elements: int
    num_nan: int


@dataclass(frozen=True)
class Difference:
    """What `diff` found; every list is in name order."""

    a: str
    b: str
    only_a: tuple[TensorInfo, ...]
    only_b: tuple[TensorInfo, ...]
    retyped: tuple[Retyped, ...]
    changed: tuple[Changed, ...]
    num_identical: int

    @property
    def identical(self) -> bool:
        return not (self.only_a or self.only_b or self.retyped or self.changed)

    @property
    def summary(self) -> str:
        """One line with all counts."""
        counts = {
            "only in A": len(self.only_a),
            "only in B": len(self.only_b),
            "with another dtype or shape": len(self.retyped),
            "with other values": len(self.changed),
        }
        parts = [f"{number} {what}" for what, number in counts.items() if number]
        return ", ".join([f"{self.num_identical} tensors identical", *parts])

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`: `a`, `b`, `identical`, `num_identical`, and the lists `only_a`, `only_b` (`name`,
        `dtype`, `shape`), `retyped` (`name`, `dtype_a`, `dtype_b`, `shape_a`, `shape_b`) and `changed` (`name`,
        `dtype`, `shape`, `max_abs`, `num_different`, `num_elements`, `num_nan`). `max_abs` is a number, null where no
        differing element is a number on both sides, or the text "inf", for which JSON has no number.
        """
        data = {**asdict(self), "identical": self.identical}
        for tensor in data["changed"]:
            if tensor["max_abs"] == math.inf:
                tensor["max_abs"] = "inf"
        return data


def diff(a: str | Path, b: str | Path, *, progress: Progress | None = None) -> Difference:
    """Compare the tensors of two checkpoints: folders or safetensors files, sharded or not, in any layout.

    In a folder the library's own weights are compared (`model.safetensors` or `open_clip_model.safetensors`, or the
    shards that its index names); in a folder without these, all safetensors files.

    Raises:
        UserError: there is nothing to compare at `a` or `b`.
        CheckpointError: a file is broken, a name is given twice, or a file changed while it was read.
    """
    from regsurgery.progress import Progress

    progress = progress or Progress()
    files_a, files_b = _files(Path(a)), _files(Path(b))
    with Watched.of([*files_a, *files_b]).unchanged():
        ours, theirs = (locate(files, any_dtype=True) for files in (files_a, files_b))
        return _difference(str(a), str(b), ours, theirs, progress)


def _difference(
    a: str, b: str, ours: Mapping[str, LocatedTensor], theirs: Mapping[str, LocatedTensor], progress: Progress
) -> Difference:
    both = sorted(ours.keys() & theirs.keys())
    retyped = [
        Retyped(name, one.entry.dtype, other.entry.dtype, one.entry.shape, other.entry.shape)
        for name in both
        if (one := ours[name]).type != (other := theirs[name]).type
    ]
    alike = sorted({*both} - {tensor.name for tensor in retyped})
    progress.stage("compare", sum(ours[name].num_bytes for name in alike), in_bytes=True)
    changed = [found for name in alike if (found := _compare(ours[name], theirs[name], progress)) is not None]
    return Difference(
        a,
        b,
        only_a=_only(ours, theirs),
        only_b=_only(theirs, ours),
        retyped=tuple(retyped),
        changed=tuple(changed),
        num_identical=len(alike) - len(changed),
    )


def _files(where: Path) -> list[Path]:
    if where.is_file():
        return [where]
    if not where.is_dir():
        raise UserError(f"{where}: no such folder or file; give a checkpoint folder or a safetensors file")
    for single in SINGLES:
        if found := weight_files(where, single):
            return found
    found = sorted(where.glob("*.safetensors"))
    if not found:
        raise UserError(f"{where}: has no safetensors file; give a safetensors checkpoint, only those can be compared")
    return found


def _only(ours: Mapping[str, LocatedTensor], theirs: Mapping[str, LocatedTensor]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(name, *ours[name].type) for name in sorted(ours.keys() - theirs.keys()))


def _compare(a: LocatedTensor, b: LocatedTensor, progress: Progress) -> Changed | None:
    """None if the bytes are equal."""
    largest, num_different, num_nan = None, 0, 0
    left = a.num_bytes
    chunk_a, chunk_b = bytearray(), bytearray()
    with a.path.open("rb", buffering=0) as file_a, b.path.open("rb", buffering=0) as file_b:
        file_a.seek(a.start)
        file_b.seek(b.start)
        while left:
            size = min(CHUNK_BYTES, left)
            if len(chunk_a) != size:  # otherwise the memory is reused
                chunk_a, chunk_b = bytearray(size), bytearray(size)
            _fill(chunk_a, file_a, a)
            _fill(chunk_b, file_b, b)
            if chunk_a != chunk_b:
                for start in range(0, size, NUMBERS_BYTES):
                    part = slice(start, start + NUMBERS_BYTES)
                    found = _numbers(a.entry.dtype, chunk_a[part], chunk_b[part])
                    num_different, num_nan = num_different + found[1], num_nan + found[2]
                    if found[0] is not None:
                        largest = found[0] if largest is None else max(largest, found[0])
            left -= size
            progress.advance(size)
    if not num_different:
        return None
    num_elements = math.prod(a.entry.shape) if a.entry.dtype in DTYPE_BYTES else a.num_bytes
    return Changed(a.entry.name, *a.type, largest, num_different, num_elements, num_nan)


def _fill(chunk: bytearray, file: FileIO, tensor: LocatedTensor) -> None:
    """Fill `chunk` from `file`; unbuffered files may give less at a time."""
    view, filled = memoryview(chunk), 0
    while filled < len(chunk):
        num_bytes = file.readinto(view[filled:])
        if not num_bytes:
            raise CheckpointError(f"{tensor.path}: was cut off while tensor '{tensor.entry.name}' was read; try again")
        filled += num_bytes


def _numbers(dtype: str, a: bytearray, b: bytearray) -> tuple[float | None, int, int]:
    """`max_abs`, `num_different` and `num_nan` of `Changed` for a part of a tensor."""
    import torch

    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[DTYPE_BYTES.get(dtype, 1)]
    bits_a, bits_b = (torch.frombuffer(part, dtype=raw) for part in (a, b))
    different = bits_a != bits_b
    if dtype not in DTYPE_BYTES:
        return None, int(different.sum()), 0
    kind = torch.uint8 if dtype == "BOOL" else torch_dtype(dtype)
    exact = torch.complex128 if kind.is_complex else torch.float64
    distance = bits_a[different].view(kind).to(exact) - bits_b[different].view(kind).to(exact)
    is_nan = distance.isnan()
    distance = distance[~is_nan].abs()
    return float(distance.max()) if len(distance) else None, int(different.sum()), int(is_nan.sum())
