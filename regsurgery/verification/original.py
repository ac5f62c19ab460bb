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

A folder restores at most as many bytes as it has itself, and `SPARE_BYTES`: it holds all tensors of the original, and
what the record holds besides is small. So a record that inflates to more, or repeats tensors, is refused before
anything is written, and entries are inflated piece by piece.
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
from regsurgery.checkpoints.copying import CHUNK_BYTES, copy_file
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
SPARE_BYTES = 64 << 20
MAX_RECORD_BYTES = 256 << 20  # a quarter of it would hold the headers of a million tensors


@dataclass(frozen=True)
class SourceFile:
    """A file of the source.

    Attributes:
        header, content: as in the record, but not in base64. At most one of them is given.
        inflated: how many bytes that one has when it is inflated.
    """

    name: str
    sha256: str
    header: bytes | None
    content: bytes | None
    inflated: int


@dataclass(frozen=True)
class Record:
    """`regsurgery_original.json`, checked."""

    path: Path
    files: tuple[SourceFile, ...]
    not_copied: tuple[str, ...]
    converted_from: Mapping[str, str] | None


def write_record(loaded: Loaded, folder: Path) -> None:
    """Record in the patched `folder` what it takes to restore the checkpoint `loaded`, without hidden files."""
    digests = {path.name: digest for path, digest in zip(loaded.weights, loaded.digests, strict=True)}
    files: dict[str, dict[str, str]] = {}
    not_copied = []
    for path in sorted(loaded.folder.iterdir()):
        if not path.is_file() or path.name not in digests.keys() | loaded.files.names:
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
    if path.stat().st_size > MAX_RECORD_BYTES:
        raise CheckpointError(
            f"{path}: has more than {MAX_RECORD_BYTES} bytes, so it is no record; patch the model again"
        )
    try:
        data = json.loads(path.read_text("utf-8"))
        if data["schema"] != SCHEMA:
            raise CheckpointError(f"{path}: has schema {data['schema']!r}; this regsurgery reads schema {SCHEMA}")
        files, allowed = [], _most_bytes(folder)
        for name, entry in data["files"].items():
            files.append(_source_file(name, entry, allowed))
            allowed -= files[-1].inflated
        not_copied = tuple(map(str, data["not_copied"]))
        converted = data["converted_from"] and {key: str(data["converted_from"][key]) for key in ("name", "sha256")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
        raise CheckpointError(f"{path}: not a valid record of the original ({error}); patch the model again") from error
    return Record(path, tuple(files), not_copied, converted)


def restore_original(
    patched: Path, target: Path, fmt: str, progress: Progress | None = None, known: Mapping[Path, str] | None = None
) -> Record:
    """Write to the new folder `target` the checkpoint that was patched, with identical bytes in all files.

    Args:
        known: the sha256 of files of `patched`, just checked. Those that are the original's become links, if possible,
            and are not read, so `target` must only be read.

    Raises:
        CheckpointError: a restored file differs from the source's, or something is missing in the folder (the message
            names every such file), or the files would take more than the folder can hold of the original.
    """
    record = read_record(patched)
    weights = weight_files(patched, WEIGHTS_NAMES[fmt])
    sources = locate(weights)
    _refuse_growth(patched, record, sources)
    target.mkdir(exist_ok=True)
    if progress is not None:
        progress.stage("restore", sum(path.stat().st_size for path in weights), in_bytes=True)
    wrong = []
    for file in record.files:
        whole = file.content is None and file.header is None
        if whole and known is not None and known.get(patched / file.name) == file.sha256:
            copy_file(patched / file.name, target / file.name, link=True)
            continue
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
        yield from _inflated(file.content)
    elif file.header is None:
        path = patched / file.name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; it is a file of the original, and restoring needs it")
        yield from _read(path, 0, path.stat().st_size)
    else:
        yield struct.pack("<Q", file.inflated)
        yield from _inflated(file.header)
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
        header: dict[str, Any] = json.loads(b"".join(_inflated(file.header)))
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


def _source_file(name: str, entry: dict[str, Any], allowed: int) -> SourceFile:
    """An entry of the record, inflated once to see that it can be, to at most `allowed` bytes.

    Raises:
        ValueError, TypeError, zlib.error: it is not valid.
    """
    given = {key: base64.b64decode(entry[key], validate=True) for key in ("header", "content") if key in entry}
    if "header" in given:
        allowed = min(allowed, MAX_HEADER_BYTES)
    size = 0
    for deflated in given.values():
        for piece in _inflated(deflated):
            size += len(piece)
            if size > allowed:
                raise ValueError(f"{name} inflates to more than {allowed} bytes")
    return SourceFile(_plain(name), str(entry["sha256"]), given.get("header"), given.get("content"), size)


def _inflated(deflated: bytes) -> Iterator[bytes]:
    """Piece by piece.

    Raises:
        ValueError, zlib.error: it is cut off, or not deflated.
    """
    inflate, rest = zlib.decompressobj(), deflated
    while not inflate.eof:
        piece = inflate.decompress(rest, CHUNK_BYTES)
        rest = inflate.unconsumed_tail
        if not piece and not rest and not inflate.eof:
            raise ValueError("an entry is cut off")
        yield piece


def _most_bytes(patched: Path) -> int:
    """How much a folder may restore; see the rule at the top."""
    return SPARE_BYTES + sum(path.stat().st_size for path in patched.iterdir() if path.is_file())


def _refuse_growth(patched: Path, record: Record, tensors: Mapping[str, LocatedTensor]) -> None:
    """Raise `CheckpointError` for files that would take more than the rule at the top allows, before any is written."""
    total, allowed = 0, _most_bytes(patched)
    for file in record.files:
        total += file.inflated
        if file.header is not None:
            total += sum(tensors[name].num_bytes for name, _ in _layout(record.path, file) if name in tensors)
        elif file.content is None and (patched / file.name).is_file():
            total += (patched / file.name).stat().st_size
        if total > allowed:
            raise CheckpointError(
                f"{record.path}: its files would take more than {allowed} bytes, the folder's own size and "
                f"{SPARE_BYTES >> 20} MiB, which no original does; patch the model again"
            )


def _plain(name: str) -> str:
    if not is_plain_name(name) or name.startswith("."):
        raise ValueError(f"names {name[:300]!r}, which is not a plain file name")
    return name
