"""The record of the original, and restoring from it, on files that no library would write in the same bytes."""

from __future__ import annotations

import base64
import json
import re
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from regsurgery.checkpoints.reading import weight_files
from regsurgery.checkpoints.sums import sha256
from regsurgery.checkpoints.watched import Watched
from regsurgery.checkpoints.writing import write_json, write_weights
from regsurgery.errors import CheckpointError
from regsurgery.verification.original import RECORD_NAME, read_record, restore_original, write_record

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
REGISTER = "register_tokens"
REGISTERS = {REGISTER: torch.zeros(1, 1, 4)}


def odd_file(path: Path, names: str) -> None:
    """A safetensors file with names against the order of the data, metadata in the middle, and spaces of its own."""
    sizes = {name: 4 * (number + 1) for number, name in enumerate(names)}
    header: dict[str, Any] = {}
    end = 0
    for name, size in sizes.items():
        header[name] = {"data_offsets": [end, end + size], "shape": [1, size // 4], "dtype": "F32"}
        end += size
    shuffled = dict(reversed(header.items()))
    shuffled = {names[0]: shuffled.pop(names[0]), "__metadata__": {"note": "Ænne", "format": "pt"}, **shuffled}
    raw = json.dumps(shuffled, indent=1).encode() + b" " * 13
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(range(1, end + 1)))


@pytest.fixture(params=["single", "sharded"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", request.param)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A source whose one weight file is written anew; shards are copied as they are."""
    return write_source(tmp_path / "source", "single")


def write_source(folder: Path, layout: str) -> Path:
    folder.mkdir()
    if layout == "single":
        odd_file(folder / WHOLE, "cab")
    else:
        odd_file(folder / SHARDS[0], "cab")
        odd_file(folder / SHARDS[1], "zy")
        weight_map = {**dict.fromkeys("zy", SHARDS[1]), **dict.fromkeys("cab", SHARDS[0])}
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map, "metadata": {"total_size": 36}}, indent=3))
    (folder / "config.json").write_bytes(b'{ "model_type":\t"vit",\r\n"architectures": ["ViTModel"] }')
    (folder / "README.md").write_bytes("# Ænne's model\n".encode())
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / ".gitattributes").write_text("hidden")
    (folder / "onnx").mkdir()
    return folder


def patch(source: Path, folder: Path) -> Path:
    """What emitting does, without a model."""
    folder.mkdir()
    weights = tuple(weight_files(source, WHOLE))
    write_weights(weights, folder, REGISTERS)
    write_json(folder / "config.json", {"model_type": "vit", "regsurgery": {"mode": "shift"}})
    (folder / "README.md").write_text("ours")
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    loaded: Any = SimpleNamespace(
        folder=source,
        weights=weights,
        digests=tuple(map(sha256, weights)),
        source=SimpleNamespace(converted=None),
        files=Watched.folder(source),
    )
    write_record(loaded, folder)
    return folder


def restore(patched: Path, target: Path) -> dict[str, bytes]:
    restore_original(patched, target, "transformers")
    return {path.name: path.read_bytes() for path in target.iterdir()}


def content(source: Path) -> dict[str, bytes]:
    left = {"pytorch_model.bin", ".gitattributes"}
    return {path.name: path.read_bytes() for path in source.iterdir() if path.is_file() and path.name not in left}


def test_every_byte_of_every_file_comes_back(source, tmp_path):
    patched = patch(source, tmp_path / "patched")
    changed = {
        path.name for path in source.glob("*.safetensors") if path.read_bytes() != (patched / path.name).read_bytes()
    }
    assert changed == ({WHOLE} if (source / WHOLE).is_file() else set())
    assert restore(patched, tmp_path / "restored") == content(source)
    record = read_record(patched)
    assert record.not_copied == ("pytorch_model.bin",)
    assert {file.name for file in record.files if file.header is not None} == changed
    replaced = {"config.json", "README.md", *([INDEX] if (source / INDEX).is_file() else [])}
    assert {file.name for file in record.files if file.content is not None} == replaced


def test_restoring_needs_no_file_of_the_sources_layout(single, tmp_path):
    """Tensors are found by name, in whatever file the patched folder has them."""
    from safetensors.torch import load_file, save_file

    patched = patch(single, tmp_path / "patched")
    files = weight_files(patched, WHOLE)
    tensors = {name: value for path in files for name, value in load_file(path).items()}
    save_file({"z" + REGISTER: tensors.pop(REGISTER), **tensors}, files[-1])
    assert restore(patched, tmp_path / "restored") == content(single)


def test_trained_registers_do_not_matter_and_trained_weights_do(single, tmp_path):
    patched = patch(single, tmp_path / "patched")
    last = weight_files(patched, WHOLE)[-1]
    data = bytearray(last.read_bytes())
    data[-16:] = b"\x01" * 16  # the registers come last
    last.write_bytes(data)
    assert restore(patched, tmp_path / "restored") == content(single)
    data[-17] ^= 1
    last.write_bytes(data)
    with pytest.raises(CheckpointError, match="different bytes from the source's for ") as caught:
        restore(patched, tmp_path / "again")
    first, _, others = str(caught.value).partition("restored correctly: ")
    assert f"for {last.name}: " in first
    assert last.name not in others and "config.json" in others and "tokenizer.json" in others


def test_shards_are_copied_and_the_registers_have_one_of_their_own(tmp_path):
    source = write_source(tmp_path / "source", "sharded")
    patched = patch(source, tmp_path / "patched")
    assert [path.name for path in weight_files(patched, WHOLE)] == [
        *SHARDS,
        "model-registers.safetensors",
    ]
    (patched / "model-registers.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-registers\.safetensors: named by"):
        restore(patched, tmp_path / "restored")


def test_a_copied_file_that_changed_or_is_gone_is_named(source, tmp_path):
    patched = patch(source, tmp_path / "patched")
    (patched / "tokenizer.json").write_text("{ }")
    with pytest.raises(CheckpointError, match=r"for tokenizer\.json: the original's"):
        restore(patched, tmp_path / "changed")
    (patched / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"{patched / 'tokenizer.json'}: missing")):
        restore(patched, tmp_path / "gone")


def test_a_tensor_that_is_gone_or_has_another_type_is_named(single, tmp_path):
    from safetensors.torch import load_file, save_file

    patched = patch(single, tmp_path / "patched")
    last = weight_files(patched, WHOLE)[-1]
    tensors = load_file(last)
    name = next(name for name in tensors if name != REGISTER)
    save_file({**tensors, name: tensors[name].half()}, last)
    with pytest.raises(
        CheckpointError, match=rf"tensor '{name}' is F16 \[1, \d\], but in the original it is F32 \[1, \d\]"
    ):
        restore(patched, tmp_path / "half")
    del tensors[name]
    save_file(tensors, last)
    with pytest.raises(CheckpointError, match=rf"lacks the tensor '{name}' of the original's {last.name}"):
        restore(patched, tmp_path / "gone")


def packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda files: files.update({"../x": {"sha256": "0", "content": packed(b"x")}}), "not a plain file name"),
        (lambda files: files.update({"/x": {"sha256": "0", "content": packed(b"x")}}), "not a plain file name"),
        (lambda files: files["config.json"].update(content="!"), "not a valid record"),
        (lambda files: files["config.json"].update(content=packed(b"x")[:-8]), "not a valid record"),
        (lambda files: files["config.json"].update(content=packed(bytes(100_000_001))), "inflates to more than"),
        (lambda files: files["config.json"].pop("sha256"), "not a valid record"),
        (lambda files: files["config.json"].update(content=5), "not a valid record"),
    ],
)
def test_a_broken_record_is_refused_and_writes_nothing(source, tmp_path, change, problem):
    patched = patch(source, tmp_path / "patched")
    record = json.loads((patched / RECORD_NAME).read_text())
    change(record["files"])
    (patched / RECORD_NAME).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=problem) as caught:
        restore(patched, tmp_path / "restored")
    assert str(caught.value).startswith(f"{patched / RECORD_NAME}: ")
    assert not (tmp_path / "restored").exists()


@pytest.mark.parametrize("key", ["content", "header"])
def test_a_record_that_inflates_to_more_than_the_folder_is_refused_in_little_memory(source, tmp_path, key):
    patched = patch(source, tmp_path / "patched")
    record = json.loads((patched / RECORD_NAME).read_text())
    zeros = packed(bytes(1 << 24))
    record["files"] |= {f"zeros{n}": {"sha256": "0", key: zeros} for n in range(60)}
    (patched / RECORD_NAME).write_text(json.dumps(record))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="inflates to more than"):
            restore(patched, tmp_path / "restored")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20 and not (tmp_path / "restored").exists()


def test_a_record_that_repeats_the_tensors_is_refused(single, tmp_path, monkeypatch):
    monkeypatch.setattr("regsurgery.verification.original.SPARE_BYTES", 1 << 16)
    header = json.dumps({"a": {"data_offsets": [0, 400_000], "shape": [100_000], "dtype": "F32"}}).encode()
    (single / WHOLE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(400_000))
    patched = patch(single, tmp_path / "patched")
    record = json.loads((patched / RECORD_NAME).read_text())
    record["files"] |= {f"again{n}.safetensors": record["files"][WHOLE] for n in range(3)}
    (patched / RECORD_NAME).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="its files would take more than"):
        restore(patched, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"schema": 2}', '{"schema": 1, "files": []}'])
def test_a_record_that_is_none_is_refused(source, tmp_path, text):
    patched = patch(source, tmp_path / "patched")
    (patched / RECORD_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(f"{patched / RECORD_NAME}: ")):
        read_record(patched)
    (patched / RECORD_NAME).unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"{patched / RECORD_NAME}: missing")):
        read_record(patched)


@pytest.mark.parametrize("header", [b"{", b"[]", b'{"a": 5}', b'{"a": {"data_offsets": [0, 4]}}'])
def test_a_recorded_header_that_is_none_is_refused(single, tmp_path, header):
    patched = patch(single, tmp_path / "patched")
    record = json.loads((patched / RECORD_NAME).read_text())
    entry = next(entry for entry in record["files"].values() if "header" in entry)
    entry["header"] = packed(header)
    (patched / RECORD_NAME).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="is broken; patch the model again"):
        restore(patched, tmp_path / "restored")


@pytest.mark.parametrize("original", [None, "me/other@v2"])
def test_a_recorded_source_is_read_at_its_commit(monkeypatch: pytest.MonkeyPatch, original: str | None) -> None:
    from regsurgery.options import LoadOptions
    from regsurgery.verification import original_of as module

    source = {"id": "me/model@v1", "revision": "c0ffee", "sha256": "0" * 64, "subfolder": "inner"}
    asked: dict[str, LoadOptions] = {}

    def load_model(model: str, options: LoadOptions) -> object:
        asked[model] = options
        return SimpleNamespace(source=SimpleNamespace(sha256=source["sha256"], id=model))

    monkeypatch.setattr(module, "load_model", load_model)
    patched: Any = SimpleNamespace(config={"regsurgery": {"source": source}}, format="pt2", root=Path())
    module.original_of(patched, original, LoadOptions(), Path())
    ((model, options),) = asked.items()
    assert model == (original or "me/model@v1")
    assert (options.commit, options.subfolder) == ("c0ffee" if original is None else None, "inner")
