"""The weight files of a checkpoint folder, by its index if it has one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from regsurgery.checkpoints.limits import read_json
from regsurgery.errors import CheckpointError

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".pt2", ".ckpt", ".npz"}


def index_of(sources: Sequence[Path]) -> Path | None:
    """The index that names the shards `sources`."""
    for path in sorted(sources[0].parent.glob("*.safetensors.index.json")):
        if {source.name for source in sources} <= set(json.loads(path.read_text("utf-8"))["weight_map"].values()):
            return path
    return None


def weight_files(folder: Path, single: str) -> list[Path]:
    """The safetensors files of a checkpoint folder: `single`, or the shards that `single`'s index names.

    Raises:
        CheckpointError: a shard is missing, or an index names a file outside the folder.
    """
    if (folder / single).is_file():
        return [folder / single]
    index = folder / f"{single}.index.json"
    if not index.is_file():
        return []
    names = sorted(set(weight_map(index).values()))
    for name in names:
        if not is_plain_name(name):
            raise CheckpointError(
                f"{index}: names the shard {name[:300]!r}, which is not a plain file name in the folder; correct it"
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: named by {index.name} but missing; download it again")
    return [folder / name for name in names]


def is_plain_name(name: str) -> bool:
    """Whether a folder can hold a file of that name."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:  # half a pair of surrogates
        return False
    return len(encoded) < 256 and name not in ("", "..") and Path(name).name == name and "\0" not in name


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> shard, read from an index.

    Raises:
        CheckpointError: the file is not an index.
    """
    try:
        found = read_json(index)["weight_map"]
    except (CheckpointError, KeyError) as error:
        raise CheckpointError(f"{index}: not a valid safetensors index; download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{index}: not a valid safetensors index; download it again")
    for tensor, shard in found.items():
        if not isinstance(shard, str):
            raise CheckpointError(
                f"{index}: not a valid safetensors index: tensor {tensor[:300]!r} is in no shard; download it again"
            )
    return found
