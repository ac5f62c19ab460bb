"""The original inside a patched folder: what is recorded while patching, and how it is restored.

A patched folder has all of the source's tensors, so the source's weight files can be rebuilt byte for byte from their
headers. `regsurgery_original.json` holds these, and the files that were replaced (config, index, model card):

    {"schema": 1,
     "files": {NAME: {"sha256": ...,
                      "header": the header of the weight file NAME, if its counterpart in the folder has another one,
                      "content": the whole file NAME, if the folder has no identical counterpart}},
     "not_copied": [NAME of a further weight file of the source that is not part of the model],
     "converted_from": null, or {"name": ..., "sha256": ...} of the file that "files" was converted from}

`header` and `content` are deflated (zlib) and in base64. Without either, the folder has the file itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.checkpoints import sums
from regsurgery.checkpoints.copying import CHUNK_BYTES
from regsurgery.checkpoints.reading import WEIGHT_SUFFIXES, is_plain_name, weight_files
from regsurgery.checkpoints.safetensors_file import MAX_HEADER_BYTES, LocatedTensor, locate
from regsurgery.checkpoints.writing import write_json
from regsurgery.errors import CheckpointError, did_you_mean
from regsurgery.formats import WEIGHTS_NAMES

if TYPE_CHECKING:
    from regsurgery.frontends.loaded import Loaded
    from regsurgery.progress import Progress

RECORD_NAME = "regsurgery_original.json"
SCHEMA = 1


@dataclass(frozen=True)
class SourceFile:
    """A file of the source; `header` and `content` as in the record, but decoded. At most one of them is given."""

    name: str
    sha256: str
    header: bytes | None
    content: bytes | None


@dataclass(frozen=True)
class Record:
    """`regsurgery_original.json`, checked."""

    path: Path
    files: tuple[SourceFile, ...]
    not_copied: tuple[str, ...]
    converted_from: Mapping[str, str] | None


def write_record(loaded: Loaded, folder: Path) -> None:
    """Record in the patched `folder` what it takes to restore the checkpoint `loaded`. Hidden files are left out."""
    digests = {path.name: digest for path, digest in zip(loaded.weights, loaded.digests, strict=True)}
    files: dict[str, dict[str, str]] = {}
    not_copied = []
    for path in sorted(loaded.folder.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        twin = folder / path.name
        if path.name in digests:
            files[path.name] = {"sha256": digests[path.name]}
            header = _header(path)
            # A file with the same start and length was copied; otherwise the sha256 will differ.
            if not twin.is_file() or twin.stat().st_size != path.stat().st_size or _header(twin) != header:
                files[path.name]["header"] = _pack(header)
            continue
        digest = sums.sha256(path)
        if twin.is_file() and sums.sha256(twin) == digest:
            files[path.name] = {"sha256": digest}
        elif path.suffix in WEIGHT_SUFFIXES:
            not_copied.append(path.name)
        else:
            files[path.name] = {"sha256": digest, "content": _pack(path.read_bytes())}
    made_of = loaded.source.converted
    converted = None if made_of is None else {"name": made_of.file.name, "sha256": made_of.sha256}
    record = {"schema": SCHEMA, "files": files, "not_copied": not_copied, "converted_from": converted}
    write_json(folder / RECORD_NAME, record)


def read_record(folder: Path) -> Record:
    """The record of a patched folder.

    Raises:
        CheckpointError: the record is missing or broken.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{path}: missing; without this record the original's files cannot be restored from the folder (saving "
            "the folder with a library drops it)"
        )
    try:
        data = json.loads(path.read_text("utf-8"))
        if data["schema"] != SCHEMA:
            raise CheckpointError(f"{path}: has schema {data['schema']!r}; this regsurgery reads schema {SCHEMA}")
        files = tuple(
            SourceFile(_plain(name), str(entry["sha256"]), *(_unpack(entry.get(key)) for key in ("header", "content")))
            for name, entry in data["files"].items()
        )
        not_copied = tuple(map(str, data["not_copied"]))
        converted = data["converted_from"] and {key: str(data["converted_from"][key]) for key in ("name", "sha256")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
        raise CheckpointError(f"{path}: not a valid record of the original ({error}); patch the model again") from error
    return Record(path, files, not_copied, converted)


def restore_original(patched: Path, target: Path, fmt: str, progress: Progress | None = None) -> Record:
    """Write to the new folder `target` the checkpoint that was patched, with identical bytes in all files.

    Raises:
        CheckpointError: a restored file differs from the source's, or something is missing in the folder; the message
            names every such file.
    """
    record = read_record(patched)
    weights = weight_files(patched, WEIGHTS_NAMES[fmt])
    sources = locate(weights)
    target.mkdir(exist_ok=True)
    if progress is not None:
        progress.stage("restore", sum(path.stat().st_size for path in weights), in_bytes=True)
    wrong = []
    for file in record.files:
        digest = hashlib.sha256()
        with (target / file.name).open("wb") as writer:
            for chunk in _chunks(patched, file, sources):
                writer.write(chunk)
                digest.update(chunk)
                if progress is not None:
                    progress.advance(len(chunk))
        if digest.hexdigest() != file.sha256:
            wrong.append(file.name)
    if wrong:
        others = [file.name for file in record.files if file.name not in wrong]
        raise CheckpointError(
            f"{patched}: restoring gives different bytes from the source's for {', '.join(wrong)}: the original's "
            "tensors or files in the folder have changed since patching"
            + (f"; restored correctly: {', '.join(others)}" if others else "")
        )
    return record


def _chunks(patched: Path, file: SourceFile, tensors: Mapping[str, LocatedTensor]) -> Iterator[bytes]:
    """The bytes of a source file."""
    if file.content is not None:
        yield file.content
    elif file.header is None:
        path = patched / file.name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; it is a file of the original, and restoring needs it")
        yield from _read(path, 0, path.stat().st_size)
    else:
        yield struct.pack("<Q", len(file.header)) + file.header
        for name, wanted in _layout(patched / RECORD_NAME, file):
            tensor = tensors.get(name)
            if tensor is None:
                raise CheckpointError(
                    f"{patched}: lacks the tensor '{name}' of the original's {file.name}"
                    f"{did_you_mean(name, list(tensors))}"
                )
            if tensor.type != wanted:
                raise CheckpointError(
                    f"{tensor.path}: tensor '{name}' is {tensor.entry.dtype} {list(tensor.entry.shape)}, but in "
                    f"the original it is {wanted[0]} {list(wanted[1])}"
                )
            yield from _read(tensor.path, tensor.start, tensor.num_bytes)


def _layout(path: Path, file: SourceFile) -> list[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Names, dtypes and shapes of a recorded header, in the order of their data."""
    assert file.header is not None
    try:
        header: dict[str, Any] = json.loads(file.header)
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"]))
        return [(name, (entry["dtype"], tuple(entry["shape"]))) for name, entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header of {file.name} is broken; patch the model again") from error


def _read(path: Path, start: int, num_bytes: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while num_bytes > 0 and (chunk := file.read(min(CHUNK_BYTES, num_bytes))):
            num_bytes -= len(chunk)
            yield chunk


def _header(path: Path) -> bytes:
    """The header of a safetensors file, without its length."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return file.read(size)


def _pack(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _unpack(text: str | None) -> bytes | None:
    if text is None:
        return None
    inflate = zlib.decompressobj()
    data = inflate.decompress(base64.b64decode(text, validate=True), MAX_HEADER_BYTES)
    if not inflate.eof:
        raise ValueError(f"an entry is cut off, or inflates to more than {MAX_HEADER_BYTES} bytes")
    return data


def _plain(name: str) -> str:
    if not is_plain_name(name) or name.startswith("."):
        raise ValueError(f"names {name[:300]!r}, which is not a plain file name")
    return name
