from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch

from regsurgery.checkpoints.copying import CopiesAhead, copy_bytes, copy_file
from regsurgery.checkpoints.owned import OwnedFolder
from regsurgery.checkpoints.reading import weight_files
from regsurgery.checkpoints.safetensors_file import read_header
from regsurgery.checkpoints.stored import NotInMemory, StoredTensor, stored_state
from regsurgery.checkpoints.sums import SUMS_NAME, check_sums, sha256, write_sums
from regsurgery.checkpoints.whole import check_output, copies_ahead, replace_file, whole_folder
from regsurgery.checkpoints.writing import write_tensors, write_weights, write_with_additions
from regsurgery.errors import CheckpointError, OutputError

TENSORS = {
    "block.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "block.bias": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
    "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.empty(0, 4),
}
METADATA = {"format": "pt", "note": "Ænne"}
REGISTERS = torch.arange(4, dtype=torch.float32).reshape(1, 1, 4)
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture
def good(tmp_path) -> Path:
    path = tmp_path / "good.safetensors"
    safetensors.torch.save_file(TENSORS, path, metadata=METADATA)
    return path


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def raw_tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> dtype, shape and bytes, read without the code under test."""
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], content[start:][slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata()


def test_the_header_of_a_good_file_is_read(good):
    header = read_header(good)
    expected = {name: (dtype, tuple(shape), len(data)) for name, (dtype, shape, data) in raw_tensors(good).items()}
    assert {t.name: (t.dtype, t.shape, t.stop - t.start) for t in header.tensors} == expected
    assert set(expected) == set(TENSORS)
    assert header.metadata == METADATA
    content = good.read_bytes()
    for tensor in header.tensors:
        data = content[header.data_start :][tensor.start : tensor.stop]
        assert data == raw_tensors(good)[tensor.name][2]


@pytest.mark.parametrize("num_bytes", [0, 7])
def test_a_file_too_short_for_a_header_is_refused(tmp_path, num_bytes):
    path = tmp_path / "short.safetensors"
    path.write_bytes(b"\0" * num_bytes)
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: cut off: {num_bytes} bytes")):
        read_header(path)


@pytest.mark.parametrize("claimed", [3, 1 << 40, (1 << 64) - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path, claimed):
    path = tmp_path / "long.safetensors"
    path.write_bytes(struct.pack("<Q", claimed) + b"{}")
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: ") + f".*the header claims {claimed} bytes"):
        read_header(path)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0"], ids=["cut", "trailing"])
def test_a_file_of_another_size_than_its_header_says_is_refused(good, change):
    good.write_bytes(change(good.read_bytes()))
    with pytest.raises(CheckpointError, match=re.escape(f"{good}: the header describes")):
        read_header(good)


def entry(**changes: object) -> dict[str, object]:
    return {"a": F32, "b": {**F32, "data_offsets": [8, 16], **changes}}


@pytest.mark.parametrize(
    "header, problem",
    [
        (entry(data_offsets=[4, 12]), "'b' starts at byte 4, expected 8"),
        (entry(data_offsets=[0, 8]), "'b' starts at byte 0, expected 8"),
        (entry(data_offsets=[12, 20]), "'b' starts at byte 12, expected 8"),
        (entry(data_offsets=[16, 8]), "'b' has -8 bytes"),
        (entry(data_offsets=[-8, 0]), "'b' has a shape or offsets"),
        (entry(data_offsets=[8.0, 16.0]), "'b' has a shape or offsets"),
        (entry(data_offsets=[8]), "'b' has no dtype, shape and data_offsets"),
        (entry(dtype="F33"), "'b' has the dtype 'F33', which is not supported"),
        (entry(dtype=None), "'b' has the dtype None"),
        (entry(dtype=["F32"]), "'b'"),
        (entry(shape=[3]), "'b' has 8 bytes, its shape and dtype need 12"),
        (entry(dtype="F64"), "'b' has 8 bytes, its shape and dtype need 16"),
        (entry(shape=[-2]), "'b' has a shape or offsets"),
        (entry(shape=[True, 2]), "'b' has a shape or offsets"),
        (entry(shape=2), "'b' has a shape or offsets"),
        (entry(shape=[10**4000, 10**4000]), "'b' has a shape or offsets beyond any file"),
        (entry(shape=[0, 10**400]), "'b' has a shape or offsets beyond any file"),
        (entry(shape=[99_999_999] * 100_000), "'b' has a shape or offsets beyond any file"),
        (entry(data_offsets=[8, 10**4299]), "'b' has a shape or offsets beyond any file"),
        (entry(dtype="F" * 10_000), "'b' has the dtype 'FFF"),
        ({"a": F32, "b\n\x1b[31m": {**F32, "data_offsets": [8, 17]}}, r"'b\n\x1b[31m' has 9 bytes"),
        ({"a": F32, "b": {"dtype": "F32", "shape": [2]}}, "'b' has no dtype, shape and data_offsets"),
        ({"a": F32, "b": None}, "'b' has no dtype, shape and data_offsets"),
        ({"b": {**F32, "data_offsets": [8, 16]}}, "'b' starts at byte 8, expected 0"),
        (json.dumps({"b": F32})[:-1].encode() + b"," + json.dumps({"b": F32})[1:].encode(), "'b'"),
    ],
)
def test_a_tensor_that_lies_is_refused_by_name(tmp_path, header, problem):
    path = raw_file(tmp_path / "lies.safetensors", header, b"\0" * 16)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert problem in message
    assert len(message) < 1000 and message.isprintable()


@pytest.mark.parametrize(
    "header",
    [b"{", b"\xff\xfe\xfd", b'{"a":' * 100_000, b"[" * 100_000, b"[]", b"null", b'{"__metadata__": null}',
     b'{"__metadata__": {"a": 1}}', b"1" * 10_000],
    ids=["open", "no text", "deep objects", "deep lists", "list", "null", "no metadata", "number in metadata", "long"],
)  # fmt: skip
def test_a_header_that_is_no_header_is_refused(tmp_path, header):
    path = raw_file(tmp_path / "bad.safetensors", header)
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: ")):
        read_header(path)


def test_additions_leave_the_original_tensors_byte_identical(good, tmp_path):
    target = tmp_path / "new.safetensors"
    write_with_additions(read_header(good), target, {"vit.register_tokens": REGISTERS})
    before, after = raw_tensors(good), raw_tensors(target)
    assert after.pop("vit.register_tokens") == ("F32", [1, 1, 4], REGISTERS.numpy().tobytes())
    assert after == before
    assert metadata(target) == METADATA
    loaded = safetensors.torch.load_file(target)
    assert set(loaded) == {*TENSORS, "vit.register_tokens"}
    assert torch.equal(loaded["vit.register_tokens"], REGISTERS)
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)


def test_no_additions_keep_every_tensor(good, tmp_path):
    write_with_additions(read_header(good), tmp_path / "new.safetensors", {})
    assert raw_tensors(tmp_path / "new.safetensors") == raw_tensors(good)


def test_an_addition_whose_name_is_taken_is_refused(good, tmp_path):
    with pytest.raises(CheckpointError, match="already has a tensor 'odd'"):
        write_with_additions(read_header(good), tmp_path / "new.safetensors", {"odd": REGISTERS})


# --- shards ---------------------------------------------------------------------------------------------------------

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
ADDED = "model-registers.safetensors"
INDEX = "model.safetensors.index.json"


def test_tensors_are_written_as_safetensors_writes_them(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours", {**TENSORS, "block.weight": TENSORS["block.weight"].T.contiguous().T})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_on_disk_are_written_one_after_the_other(good, tmp_path, monkeypatch):
    """Also those that are arranged anew: what lies in memory at a time is what one tensor is made of."""
    state, whole = stored_state([good]), safetensors.torch.load_file(good)
    more = {
        "rows": torch.cat((state["block.weight"], state["block.weight"][:1])),
        "columns": state["block.weight"].T,
        "half": state["block.weight"].chunk(2)[1].reshape(1, -1).to(torch.float16),
    }
    assert all(isinstance(tensor, NotInMemory) for tensor in more.values())
    order: list[str] = []
    plain = StoredTensor.read
    monkeypatch.setattr(StoredTensor, "read", lambda self: (order.append(self.entry.name), plain(self))[1])
    write_tensors(tmp_path / "ours", state | more)
    assert order == [
        "scalar",
        *["block.weight"] * 2,
        "empty",
        *["block.weight"] * 2,
        "block.bias",
        "block.weight",
        "odd",
    ]
    weight = whole["block.weight"]
    whole |= {"rows": torch.cat((weight, weight[:1])), "columns": weight.T.contiguous(), "half": weight[1:].half()}
    safetensors.torch.save_file(whole, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.fixture
def sharded(tmp_path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    for shard, name in zip(SHARDS, ("a", "b"), strict=True):
        safetensors.torch.save_file({name: torch.ones(2)}, folder / shard, metadata={"format": "pt"})
    write_index(folder, dict(zip(("a", "b"), SHARDS, strict=True)))
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": weight_map}), "utf-8")


def test_the_weights_are_the_shards_of_the_index(sharded):
    assert weight_files(sharded, "model.safetensors") == [sharded / shard for shard in SHARDS]


def test_the_weights_are_the_single_file_where_there_is_one(sharded):
    (sharded / "model.safetensors").touch()
    assert weight_files(sharded, "model.safetensors") == [sharded / "model.safetensors"]


def test_a_folder_without_weights_has_none(tmp_path):
    assert weight_files(tmp_path, "model.safetensors") == []


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "\ud800"])
def test_a_shard_with_a_name_that_no_file_can_have_is_refused(sharded, name):
    write_index(sharded, {"a": name})
    with pytest.raises(CheckpointError, match=re.escape(str(sharded))) as caught:
        weight_files(sharded, "model.safetensors")
    assert len(str(caught.value)) < 1000


def test_a_missing_shard_is_named(sharded):
    (sharded / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"{sharded / SHARDS[1]}: named by {INDEX} but missing")):
        weight_files(sharded, "model.safetensors")


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", ".", "..", "", 5])
def test_a_shard_outside_the_folder_is_refused(sharded, name):
    shutil.copyfile(sharded / SHARDS[0], sharded.parent / "x.safetensors")
    write_index(sharded, {"a": name})
    with pytest.raises(CheckpointError, match=re.escape(str(sharded))):
        weight_files(sharded, "model.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": {}}}', "[" * 100_000])
def test_a_broken_index_is_refused(sharded, text):
    (sharded / INDEX).write_text(text, "utf-8")
    with pytest.raises(CheckpointError, match=re.escape(f"{sharded / INDEX}: not a valid safetensors index")):
        weight_files(sharded, "model.safetensors")


def test_shards_are_written_as_shards_and_the_index_knows_the_addition(sharded, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    write_weights([sharded / shard for shard in SHARDS], target, {"register_tokens": REGISTERS})
    assert (target / SHARDS[0]).read_bytes() == (sharded / SHARDS[0]).read_bytes()
    assert (target / SHARDS[1]).read_bytes() == (sharded / SHARDS[1]).read_bytes()
    assert torch.equal(safetensors.torch.load_file(target / ADDED)["register_tokens"], REGISTERS)
    assert json.loads((target / INDEX).read_text("utf-8")) == {
        "metadata": {"total_size": 16 + 16},
        "weight_map": {"a": SHARDS[0], "b": SHARDS[1], "register_tokens": ADDED},
    }
    assert sorted(path.name for path in target.iterdir()) == sorted([*SHARDS, ADDED, INDEX])


def test_a_second_addition_of_the_same_name_is_refused(sharded, tmp_path):
    with pytest.raises(CheckpointError, match="already has a tensor 'a'"):
        write_weights([sharded / shard for shard in SHARDS], tmp_path, {"a": REGISTERS})


def test_shards_are_linked_on_request_and_copied_otherwise(sharded, tmp_path):
    for link in (True, False):
        target = tmp_path / f"target-{link}"
        target.mkdir()
        place = partial(copy_file, link=link)
        write_weights([sharded / shard for shard in SHARDS], target, {"register_tokens": REGISTERS}, place)
        assert all(os.path.samefile(target / shard, sharded / shard) is link for shard in SHARDS)
        assert all((target / shard).read_bytes() == (sharded / shard).read_bytes() for shard in SHARDS)


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EPERM])
def test_where_no_link_can_be_made_a_copy_is(sharded, tmp_path, monkeypatch, error):
    def refuse(source, target):
        raise OSError(error, "no")

    monkeypatch.setattr(os, "link", refuse)
    copy_file(sharded / SHARDS[0], tmp_path / "copy", link=True)
    assert (tmp_path / "copy").read_bytes() == (sharded / SHARDS[0]).read_bytes()


@pytest.mark.parametrize("error", [None, errno.EXDEV, errno.ENOSYS])
def test_a_copy_is_whole_where_the_kernel_cannot_copy(tmp_path, monkeypatch, error):
    (tmp_path / "source").write_bytes(bytes(range(251)) * 100_000)  # several chunks
    if error is not None:
        monkeypatch.setattr(os, "copy_file_range", lambda *a: (_ for _ in ()).throw(OSError(error, "no")))
    (tmp_path / "linked").symlink_to("source")
    copy_file(tmp_path / "linked", tmp_path / "copy")
    assert not (tmp_path / "copy").is_symlink()
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "source").read_bytes()


def test_copies_that_were_begun_are_moved_to_their_place(sharded, tmp_path):
    with copies_ahead(tmp_path / "out") as copies:
        copies.start([sharded / SHARDS[0]])
        copies.place(sharded / SHARDS[0], tmp_path / "begun")
        copies.place(sharded / SHARDS[0], tmp_path / "again")
        copies.place(sharded / SHARDS[1], tmp_path / "other")
    for name, shard in (("begun", 0), ("again", 0), ("other", 1)):
        assert (tmp_path / name).read_bytes() == (sharded / SHARDS[shard]).read_bytes()
        assert not os.path.samefile(tmp_path / name, sharded / SHARDS[shard])
    assert not list(tmp_path.glob(".out*"))


def test_copies_that_were_not_needed_vanish(sharded, tmp_path):
    with pytest.raises(KeyError), copies_ahead(tmp_path / "out") as copies:
        copies.start([sharded / shard for shard in SHARDS])
        assert len(list(tmp_path.glob(".out.partial-*"))) == 1
        raise KeyError
    assert not list(tmp_path.glob(".out*"))


def test_a_copy_that_fails_says_so_where_it_is_wanted(sharded, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("regsurgery.checkpoints.copying.copy_bytes", full)
    with (
        pytest.raises(OutputError, match="No space left"),
        copies_ahead(tmp_path / "out") as copies,
    ):
        copies.start([sharded / SHARDS[0]])
        with whole_folder(tmp_path / "out") as folder:
            copies.place(sharded / SHARDS[0], folder / SHARDS[0])
    assert not list(tmp_path.glob(".out*")) and not (tmp_path / "out").exists()


def test_a_source_that_shrinks_while_it_is_copied_is_an_error(tmp_path):
    (tmp_path / "source").write_bytes(b"x" * 100)
    with (
        (tmp_path / "source").open("rb", buffering=0) as reader,
        (tmp_path / "copy").open("wb") as writer,
        pytest.raises(CheckpointError, match="became shorter"),
    ):
        copy_bytes(reader, writer, 101)


def test_a_folder_that_another_run_wrote_meanwhile_is_kept(tmp_path):
    with (
        pytest.raises(OutputError, match="out: another run has written it meanwhile"),
        whole_folder(tmp_path / "out") as second,
    ):
        fill(second)
        with whole_folder(tmp_path / "out") as first:
            (first / "a").write_text("the first")
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("out"), Path("out/a")]


def test_a_file_that_a_killed_run_left_half_written_goes_with_the_next(tmp_path):
    kill = """
import os, sys
from pathlib import Path
from regsurgery.checkpoints import whole
whole.sync = lambda path: os._exit(9)
whole.replace_file(Path(sys.argv[1]), b"x" * 1000)
"""
    subprocess.run([sys.executable, "-c", kill, str(tmp_path / "recipe.yaml")], check=False)
    assert [path.name for path in tmp_path.rglob("recipe.yaml")] == ["recipe.yaml"]
    assert not (tmp_path / "recipe.yaml").exists()
    replace_file(tmp_path / "recipe.yaml", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("recipe.yaml", b"new")]


def test_known_digests_are_not_measured_again(tmp_path):
    fill(tmp_path)
    write_sums(tmp_path, {"sub/b": "0" * 64})
    assert f"{'0' * 64}  sub/b" in (tmp_path / SUMS_NAME).read_text().splitlines()


# --- folders --------------------------------------------------------------------------------------------------------


def fill(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "b").write_bytes(b"bb")
    (folder / "a b").write_bytes(b"aa")


def test_a_whole_folder_has_every_file_and_no_sibling(tmp_path):
    with whole_folder(tmp_path / "out") as folder:
        fill(folder)
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "sub" / "b").read_bytes() == b"bb"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), CheckpointError("x")])
def test_an_exception_leaves_nothing_and_passes_through(tmp_path, error):
    with pytest.raises(type(error)) as caught, whole_folder(tmp_path / "out") as folder:
        fill(folder)
        raise error
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_writing_is_an_output_error_and_leaves_nothing(tmp_path):
    expected = re.escape(f"{tmp_path / 'out'}: cannot be written (No space left on device)")
    with pytest.raises(OutputError, match=expected), whole_folder(tmp_path / "out") as folder:
        fill(folder)
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails_on", ["out", "a b"])
def test_an_fsync_that_fails_is_an_output_error_and_leaves_nothing(tmp_path, monkeypatch, fails_on):
    parent = tmp_path / "parent"
    parent.mkdir()

    def fsync(path: Path) -> None:
        if path.name.startswith(fails_on):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("regsurgery.checkpoints.whole.sync", fsync)
    with pytest.raises(OutputError, match="No space left on device"), whole_folder(parent / "out") as folder:
        fill(folder)
    assert list(parent.iterdir()) == []


def test_an_unconfirmed_rename_says_that_the_folder_is_whole(tmp_path, monkeypatch):
    def fsync(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("regsurgery.checkpoints.whole.sync", fsync)
    with pytest.raises(OutputError, match="written completely"), whole_folder(tmp_path / "out") as folder:
        fill(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_a_target_that_exists_is_refused(tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises(OutputError, match=r"out: already exists"), whole_folder(tmp_path / "out"):
        pytest.fail("the block ran")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_target_without_a_parent_is_refused(tmp_path):
    with pytest.raises(OutputError, match=re.escape(f"{tmp_path / 'no'}: no such folder")):
        check_output(tmp_path / "no" / "out")


@pytest.fixture
def summed(tmp_path) -> Path:
    fill(tmp_path)
    write_sums(tmp_path, {})
    return tmp_path


def test_sha256sum_accepts_the_sums(summed):
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=summed, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["a b: OK", "sub/b: OK"])
    check_sums(summed)


@pytest.mark.parametrize("name", ["a b", "sub/b"])
def test_a_changed_file_is_named(summed, name):
    (summed / name).write_bytes(b"xx")
    with pytest.raises(CheckpointError, match=re.escape(f"{summed / name}: differs from SHA256SUMS")):
        check_sums(summed)


def test_a_missing_file_is_named(summed):
    (summed / "a b").unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"{summed / 'a b'}: listed in SHA256SUMS but missing")):
        check_sums(summed)


def test_missing_sums_are_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}: has no SHA256SUMS")):
        check_sums(tmp_path)


@pytest.mark.parametrize("name", ["../a", "/a", "sub/../../a"])
def test_sums_of_files_outside_the_folder_are_refused(summed, name):
    (summed / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n", "utf-8")
    with pytest.raises(CheckpointError, match="not inside the folder"):
        check_sums(summed)


@pytest.mark.parametrize("name", ["link/secret", "file", "\0", "a" * 5000])
def test_sums_of_files_behind_a_link_or_of_none_are_refused(summed, tmp_path_factory, name):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret").write_text("secret")
    (summed / "link").symlink_to(outside)
    (summed / "file").symlink_to(outside / "secret")
    (summed / "SHA256SUMS").write_text(f"{sha256(outside / 'secret')}  {name}\n", "utf-8")
    with pytest.raises(CheckpointError, match=r"not inside the folder|listed in SHA256SUMS but missing"):
        check_sums(summed)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"no sums\n"], ids=["no text", "no digest"])
def test_sums_that_are_none_are_refused(summed, content):
    (summed / "SHA256SUMS").write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA256SUMS"):
        check_sums(summed)


def test_copies_that_cannot_begin_are_made_when_they_are_placed(tmp_path):
    source, taken = tmp_path / "source", tmp_path / "copies"
    source.write_bytes(b"bytes")
    taken.write_bytes(b"no folder")
    copies = CopiesAhead(partial(OwnedFolder, taken, ".out.partial-"))
    copies.start([source])
    copies.place(source, tmp_path / "target")
    copies.close()
    assert (tmp_path / "target").read_bytes() == b"bytes" and taken.read_bytes() == b"no folder"
