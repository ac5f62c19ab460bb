"""Safetensors in and out, without loading a tensor: headers are checked, data is copied as bytes.

The format: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, then the data.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from regsurgery.copying import CopiesAhead, copy_bytes, copy_file, sync
from regsurgery.errors import CheckpointError, OutputError
from regsurgery.limits import MAX_JSON_BYTES, places_of, read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_HEADER_BYTES = 16 << 20  # 100,000 tensors; parsed, it takes many times as much memory
MAX_RANK, MAX_DIMENSION = 16, 1 << 48
SHARD_NUMBER = re.compile(r"-\d+-of-\d+$")
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
               "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip

TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
               "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "U16": "uint16", "U32": "uint32",
               "U64": "uint64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # fmt: skip

Place = Callable[[Path, Path], None]  # see `write_weights`

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".pt2", ".ckpt", ".npz"}


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


def read_header(path: Path) -> SafetensorsFile:
    """Read and check the header of a safetensors file against the file's size.

    Raises:
        CheckpointError: the file is cut, lies about its size, or its tensors overlap, leave holes or have a size
            that is not shape x dtype; the message names the file, the tensor and the remedy.
    """

    def fail(problem: str) -> CheckpointError:
        return CheckpointError(f"{path}: {problem}; download or copy the file again")

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
    tensors = sorted((_entry(name, value, fail) for name, value in header.items()), key=lambda t: (t.start, t.stop))
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


def _entry(name: str, value: Any, fail: Callable[[str], CheckpointError]) -> TensorEntry:
    try:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise fail(f"tensor {name!r} has no dtype, shape and data_offsets") from error
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise fail(f"tensor {name!r} has the unknown dtype {repr(dtype)[:60]}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise fail(f"tensor {name!r} has a shape or offsets that are not whole numbers")
    if len(shape) > MAX_RANK or max(*shape, start, stop) > MAX_DIMENSION:
        raise fail(f"tensor {name!r} has a shape or offsets beyond any file")
    num_bytes = DTYPE_BYTES[dtype]
    for n in shape:
        num_bytes *= n
    if stop - start != num_bytes:
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


def locate(weights: Sequence[Path]) -> dict[str, LocatedTensor]:
    """Every tensor of some safetensors files, by name.

    Raises:
        CheckpointError: a file is broken, or a name is in two of them.
    """
    found: dict[str, LocatedTensor] = {}
    for path in weights:
        header = read_header(path)
        for entry in header.tensors:
            if entry.name in found:
                other = found[entry.name].path.name
                raise CheckpointError(f"{path}: tensor '{entry.name}' is in {other} too; keep one of the two files")
            found[entry.name] = LocatedTensor(path, entry, header.data_start + entry.start)
    return found


def write_with_additions(source: SafetensorsFile, target: Path, additions: Mapping[str, Tensor]) -> None:
    """Write `source` to `target` with `additions` behind its tensors; the source's data is copied byte for byte.

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
            raise CheckpointError(f"{source.path}: has a tensor '{tensor.name}' already; it seems to be patched")


def _write_header(writer: BinaryIO, header: Mapping[str, Any]) -> None:
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    writer.write(struct.pack("<Q", len(raw)))
    writer.write(raw)


def write_weights(
    sources: Sequence[Path], folder: Path, additions: Mapping[str, Tensor], place: Place = copy_file
) -> None:
    """Write the checkpoint files `sources` and the tensors `additions` into `folder`.

    A single file stays one. Shards stay what they are, and the additions are a shard of their own in the new index.

    Args:
        place: source, target -> makes the target the same file, by copying if nothing else.
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
    if additions:
        added = f"{SHARD_NUMBER.sub('', sources[0].stem)}-registers.safetensors"
        write_tensors(folder / added, additions)
        index["weight_map"].update(dict.fromkeys(sorted(additions), added))
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] += sum(t.numel() * t.element_size() for t in additions.values())
    write_json(folder / index_path.name, index)


def index_of(sources: Sequence[Path]) -> Path | None:
    """The index that names the shards `sources`."""
    for path in sorted(sources[0].parent.glob("*.safetensors.index.json")):
        if {source.name for source in sources} <= set(json.loads(path.read_text("utf-8"))["weight_map"].values()):
            return path
    return None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file of `tensors`, byte for byte as safetensors does, one tensor after the other.

    Those that are not in memory (`stored.py`) are read when it is their turn, and freed behind it.
    """
    import torch

    disk_names = {torch_dtype(name): name for name in TORCH_NAMES}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # every one lies aligned
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
        get_storage_id=lambda tensor: None,  # what shares memory here is written twice
        filename_pattern=f"{stem}{{suffix}}.{suffix}",
        max_shard_size=largest,
    )
    for name, members in split.filename_to_tensors.items():
        write_tensors(folder / name, {member: tensors[member] for member in members})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{single}.index.json", index)


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")


# --- folders --------------------------------------------------------------------------------------------------------


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that safetensors calls `name`, one of `TORCH_NAMES`."""
    import torch

    return getattr(torch, TORCH_NAMES[name])


def weights_dtype(weights: Sequence[Path]) -> torch.dtype:
    """The dtype of the first floating-point tensor of the first file, by name; float32 where there is none."""
    tensors = sorted(read_header(weights[0]).tensors, key=lambda tensor: tensor.name)
    return torch_dtype(
        next((tensor.dtype for tensor in tensors if tensor.dtype in ("F64", "F32", "F16", "BF16")), "F32")
    )


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
                f"{index}: names the shard {name[:300]!r}, which is not a plain file name in the folder"
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: named by {index.name} but missing; download it again")
    return [folder / name for name in names]


def is_plain_name(name: str) -> bool:
    """Whether a folder can have a file of that name in it."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:  # half a pair of surrogates
        return False
    return len(encoded) < 256 and name not in ("", "..") and Path(name).name == name and "\0" not in name


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> shard, as an index has it.

    Raises:
        CheckpointError: it is no index.
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


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_each(paths: Sequence[Path]) -> tuple[str, ...]:
    """The sha256 of each file, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return tuple(pool.map(sha256, paths))


SUMS_NAME = "SHA256SUMS"


def write_sums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write SHA256SUMS over every other file of `folder`, in the form that `sha256sum -c` reads.

    Args:
        known: name -> sha256 of files that were copied whole, which need not be read once more.
    """
    known = known or {}
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != SUMS_NAME)
    new = [name for name in names if name not in known]
    digests = {**known, **dict(zip(new, sha256_each([folder / name for name in new]), strict=True))}
    (folder / SUMS_NAME).write_text("".join(f"{digests[name]}  {name}\n" for name in names), "utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """Name -> sha256, of every file that SHA256SUMS lists.

    Raises:
        CheckpointError: there is none, or it names files outside the folder.
    """
    sums = folder / SUMS_NAME
    if not sums.is_file():
        raise CheckpointError(
            f"{folder}: no {SUMS_NAME}, it is not a folder that regsurgery wrote, or it is incomplete; give one that "
            "regsurgery patch wrote"
        )
    try:
        with sums.open("rb") as file:
            lines = file.read(MAX_JSON_BYTES).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{sums}: not a text file; patch the model again") from error
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in digests:
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise CheckpointError(f"{sums}: names {name[:300]!r}, which is not inside the folder")
    return digests


def check_sums(folder: Path, remedy: str = "patch the model again") -> None:
    """Raise `CheckpointError` for the first file that SHA256SUMS lists and that is missing or changed."""
    allowed = places_of(folder)
    for name, digest in read_sums(folder).items():
        path = folder / name
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{folder / name[:300]}: listed in {SUMS_NAME} but missing; {remedy}") from error
        if not any(real.is_relative_to(place) for place in allowed):
            raise CheckpointError(f"{folder / SUMS_NAME}: names {name[:300]!r}, which is not inside the folder")
        if not real.is_file():
            raise CheckpointError(f"{path}: listed in {SUMS_NAME} but missing; {remedy}")
        if sha256(path) != digest:
            raise CheckpointError(f"{path}: differs from {SUMS_NAME}; {remedy}")


def check_output(target: Path) -> None:
    """Raise `OutputError` where `target` cannot become a new folder."""
    if target.exists() or target.is_symlink():
        raise OutputError(f"{target}: exists already; choose another folder with -o, or remove it first")
    check_parent(target)


def check_parent(target: Path) -> None:
    """Raise `OutputError` where nothing can be written beside `target`."""
    parent = target.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"{parent}: no such folder to write {target.name} into; create it first")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{parent}: not writable; choose another folder with -o")


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` whole or not at all; a file that is there is replaced.

    Raises:
        OutputError: the disk is full or not writable.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        sync(partial)
        partial.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); choose another file with -o, or make room there"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def scratch_folder() -> Iterator[tempfile.TemporaryDirectory[str]]:
    """A folder for temporary files, which stays after the block for as long as it is referred to.

    Raises:
        OutputError: there is no room for it, or for what the block writes there.
    """
    from safetensors import SafetensorError

    try:
        yield tempfile.TemporaryDirectory(prefix="regsurgery-")
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"temporary files cannot be written ({getattr(error, 'strerror', None) or error}); free some space, or set "
            "TMPDIR to a folder that has it"
        ) from error


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that becomes `target` when the block ends well, and vanishes when it does not.

    Every file is on disk (fsync) before the one rename; so `target` is either complete or absent.

    Raises:
        OutputError: `target` exists, or the disk is full or not writable.
    """
    check_output(target)
    _remove_abandoned(target)
    partial = _partial(target)
    try:
        partial.mkdir()
        yield partial
        for path in sorted(partial.rglob("*")):
            sync(path)
        sync(partial)
        partial.rename(target.absolute())
    except OSError as error:
        raise OutputError(
            f"{target}: cannot be written ({error.strerror or error}), and nothing is left behind; choose another "
            "folder with -o, or make room there"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        sync(target.absolute().parent)
    except OSError as error:
        raise OutputError(
            f"{target}: written whole, but the disk did not confirm it ({error.strerror or error}); "
            "check it with sha256sum -c SHA256SUMS"
        ) from error


@contextmanager
def copies_ahead(target: Path) -> Iterator[CopiesAhead]:
    """Copies for the folder `target`, which are made in the block; those that are not placed there vanish with it."""
    _remove_abandoned(target)
    copies = CopiesAhead(_partial(target, "-copies"))
    try:
        yield copies
    finally:
        copies.close()


def _partial(target: Path, what: str = "") -> Path:
    """Where this process writes what is to become `target`."""
    return target.absolute().parent / f".{target.name}.partial{what}-{os.getpid()}"


def _remove_abandoned(target: Path) -> None:
    """Remove what killed processes left beside `target`; a process that still runs keeps its own."""
    import psutil

    for partial in target.absolute().parent.glob(f".{glob.escape(target.name)}.partial-*"):
        process = partial.name.rpartition("-")[2]
        if not process.isdecimal() or not psutil.pid_exists(int(process)):
            shutil.rmtree(partial, ignore_errors=True)
