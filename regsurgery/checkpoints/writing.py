"""Weight files written by copying bytes: unchanged tensors are never loaded."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from regsurgery.checkpoints.copying import copy_bytes, copy_file
from regsurgery.checkpoints.reading import index_of
from regsurgery.checkpoints.safetensors_file import TORCH_NAMES, SafetensorsFile, read_header, torch_dtype
from regsurgery.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SHARD_NUMBER = re.compile(r"-\d+-of-\d+$")

Place = Callable[[Path, Path], None]  # see `write_weights`


def write_with_additions(source: SafetensorsFile, target: Path, additions: Mapping[str, Tensor]) -> None:
    """Write `source` to `target` with `additions` after its tensors; the source's data is copied byte for byte.

    Raises:
        CheckpointError: a tensor of `additions` is in the source already.
    """
    import safetensors.torch

    _check_new(source, additions)
    header: dict[str, Any] = {"__metadata__": dict(source.metadata)} if source.metadata else {}
    for tensor in source.tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.start, tensor.stop],
        }
    end = source.tensors[-1].stop if source.tensors else 0
    added = safetensors.torch.save(dict(additions))
    (added_header_size,) = struct.unpack("<Q", added[:8])
    added_header = json.loads(added[8 : 8 + added_header_size])
    for name, entry in sorted(added_header.items(), key=lambda item: item[1].get("data_offsets", [0])):
        header[name] = {**entry, "data_offsets": [offset + end for offset in entry["data_offsets"]]}
    with source.path.open("rb", buffering=0) as reader, target.open("wb") as writer:
        _write_header(writer, header)
        reader.seek(source.data_start)
        copy_bytes(reader, writer, end)
        writer.seek(0, os.SEEK_END)
        writer.write(added[8 + added_header_size :])


def _check_new(source: SafetensorsFile, additions: Mapping[str, Tensor]) -> None:
    for tensor in source.tensors:
        if tensor.name in additions:
            raise CheckpointError(
                f"{source.path}: already has a tensor '{tensor.name}', which patching would add; if it is a patched "
                "checkpoint, patch its source"
            )


def _write_header(writer: BinaryIO, header: Mapping[str, Any]) -> None:
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    writer.write(struct.pack("<Q", len(raw)))
    writer.write(raw)


def write_weights(
    sources: Sequence[Path], folder: Path, additions: Mapping[str, Tensor], place: Place = copy_file
) -> None:
    """Write the checkpoint files `sources` and the tensors `additions` into `folder`.

    A single file stays a single file. Shards stay unchanged, and the additions become a further shard in the new index.

    Args:
        place: source, target -> makes the target the same file, by a copy or a link.
    """
    index_path = index_of(sources)
    if index_path is None:
        (source,) = sources
        write_with_additions(read_header(source), folder / source.name, additions)
        return
    for path in sources:
        _check_new(read_header(path), additions)
        place(path, folder / path.name)
    index = json.loads(index_path.read_text("utf-8"))
    index.setdefault("metadata", {})  # some versions of transformers need it
    if additions:
        added = f"{SHARD_NUMBER.sub('', sources[0].stem)}-registers.safetensors"
        write_tensors(folder / added, additions)
        index["weight_map"].update(dict.fromkeys(sorted(additions), added))
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] += sum(t.numel() * t.element_size() for t in additions.values())
    write_json(folder / index_path.name, index)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file of `tensors`, byte for byte as safetensors does, one tensor after the other.

    Those that are not in memory (`stored.py`) are read one at a time and freed again.
    """
    import torch

    disk_names = {torch_dtype(name): name for name in TORCH_NAMES}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that each is aligned
    for name in ordered:
        tensor = tensors[name]
        start, stop = stop, stop + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": disk_names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
    with path.open("wb") as writer:
        _write_header(writer, header)
        for name in ordered:
            elements = tensors[name].detach().cpu().contiguous().reshape(-1)
            writer.write(elements.view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_sharded(folder: Path, single: str, tensors: Mapping[str, Tensor], largest: int | None) -> None:
    """Write `tensors` to the file `single` of `folder`, or to shards of up to `largest` bytes and their index."""
    if largest is None:
        write_tensors(folder / single, tensors)
        return
    from huggingface_hub import split_state_dict_into_shards_factory

    stem, _, suffix = single.rpartition(".")
    split = split_state_dict_into_shards_factory(
        {name: tensors[name] for name in sorted(tensors)},
        get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
        get_storage_id=lambda tensor: None,  # tensors that share memory are written separately
        filename_pattern=f"{stem}{{suffix}}.{suffix}",
        max_shard_size=largest,
    )
    for name, members in split.filename_to_tensors.items():
        write_tensors(folder / name, {member: tensors[member] for member in members})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{single}.index.json", index)


def write_json(path: Path, data: Any) -> None:
    text = json.dumps(data, indent=2, ensure_ascii=False)
    if not _is_unicode(text):  # half of a surrogate pair, which JSON can only escape
        text = json.dumps(data, indent=2)
    path.write_text(f"{text}\n", "utf-8")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)
