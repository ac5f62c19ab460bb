"""Checks that headers do not allow: that shards fit together, and that every number is finite."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from regsurgery.checkpoints.reading import weight_map
from regsurgery.checkpoints.safetensors_file import SafetensorsFile
from regsurgery.errors import CheckpointError

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 1 << 20  # small enough to be summed while it is still in the core's cache after hashing


def check_shards(folder: Path, single: str, files: Sequence[SafetensorsFile]) -> None:
    """Raise `CheckpointError` for a tensor that is in two of `files`, or not in the one that the index names."""
    holder: dict[str, SafetensorsFile] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name in holder:
                raise CheckpointError(
                    f"{file.path}: tensor {tensor.name!r} is in {holder[tensor.name].path.name} too; get both files "
                    "again"
                )
            holder[tensor.name] = file
    index = folder / f"{single}.index.json"
    if (folder / single).is_file() or not index.is_file():
        return
    for name, shard in weight_map(index).items():
        if name in holder and holder[name].path.name != shard:
            raise CheckpointError(
                f"{index}: tensor {name!r} is in {holder[name].path.name}, not in {shard}; get the index again"
            )


def finite_digests(files: Sequence[SafetensorsFile]) -> tuple[str, ...]:
    """`finite_digest` of each file, for one more file at a time than there are cores, since one waits for the disk."""
    with ThreadPoolExecutor((os.cpu_count() or 1) + 1) as pool:
        return tuple(pool.map(finite_digest, files))


def finite_digest(file: SafetensorsFile) -> str:
    """The file's sha256, as from `sha256`; every floating-point tensor is checked on the way, in chunks.

    Infinities are allowed in tensors named `...mask`, where they are usual.

    Raises:
        CheckpointError: a tensor holds NaN or an infinity.
    """
    import torch

    digest = hashlib.sha256()
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    buffer = memoryview(bytearray(CHUNK_BYTES))

    def fine(chunk: memoryview, dtype: torch.dtype, infinities: bool) -> bool:
        values = torch.frombuffer(chunk, dtype=dtype)
        # A finite sum implies finite terms: one pass at the speed of memory, rarely a second one.
        if values.sum(dtype=torch.promote_types(dtype, torch.float32)).isfinite():
            return True
        return not bool((values.isnan() if infinities else ~values.isfinite()).any())

    with file.path.open("rb") as reader:
        digest.update(reader.read(file.data_start))
        for tensor in file.tensors:
            left, dtype = tensor.stop - tensor.start, dtypes.get(tensor.dtype)
            while left > 0:
                chunk = buffer[: min(left, CHUNK_BYTES)]
                if reader.readinto(chunk) != len(chunk):  # type: ignore[attr-defined]
                    raise CheckpointError(f"{file.path}: became shorter while it was read; copy it again")
                digest.update(chunk)
                if dtype is not None and not fine(chunk, dtype, tensor.name.endswith("mask")):
                    raise CheckpointError(
                        f"{file.path}: tensor {tensor.name!r} holds NaN or infinite numbers; use another copy, or "
                        "another checkpoint of this training"
                    )
                left -= len(chunk)
    return digest.hexdigest()
