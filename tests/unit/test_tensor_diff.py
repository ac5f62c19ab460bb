from __future__ import annotations

import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import regsurgery
from regsurgery.checkpoints import safetensors_file
from regsurgery.checkpoints.copying import CHUNK_BYTES
from regsurgery.cli.app import main
from regsurgery.commands.diff import Changed, Retyped, TensorInfo
from regsurgery.errors import CheckpointError, UserError

WHOLE = "model.safetensors"
TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.bias": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
    "b": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "empty": torch.empty(0, 4),
}


def folder_of(folder: Path, *shards: dict[str, torch.Tensor]) -> Path:
    """A checkpoint folder: one file, or shards and their index."""
    folder.mkdir(parents=True)
    if len(shards) == 1:
        save_file(shards[0], folder / WHOLE)
        return folder
    weight_map = {}
    for number, tensors in enumerate(shards):
        save_file(tensors, folder / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"model-{number}.safetensors")
    (folder / f"{WHOLE}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def one(tmp_path: Path, a: torch.Tensor, b: torch.Tensor) -> Changed | None:
    """The difference of one tensor against another, and the same the other way round."""
    folder_a, folder_b = folder_of(tmp_path / "a", {"x": a}), folder_of(tmp_path / "b", {"x": b})
    found, back = regsurgery.diff(folder_a, folder_b), regsurgery.diff(folder_b, folder_a)
    assert found.changed == back.changed
    assert (found.only_a, found.only_b, found.retyped) == ((), (), ())
    assert found.num_identical == (0 if found.changed else 1)
    return found.changed[0] if found.changed else None


def test_a_folder_equals_its_shards_in_any_layout_and_its_file(tmp_path):
    whole = folder_of(tmp_path / "whole", TENSORS)
    names = list(TENSORS)
    layouts = [names[:1], names[1:]], [names[2:], names[1:2], names[:1]]
    for number, layout in enumerate(layouts):
        shards = folder_of(tmp_path / str(number), *({name: TENSORS[name] for name in part} for part in layout))
        found = regsurgery.diff(shards, whole / WHOLE)
        assert found.identical and found.num_identical == len(TENSORS)
        assert found.summary == "4 tensors identical"


def test_what_one_side_alone_has_and_what_has_another_type(tmp_path):
    a = folder_of(tmp_path / "a", {"both": torch.ones(2), "old": torch.ones(1), "t": torch.ones(2), "s": torch.ones(2)})
    b = folder_of(
        tmp_path / "b", {"both": torch.ones(2), "new": torch.ones(3, 1), "t": torch.ones(2).half(), "s": torch.ones(1)}
    )
    found = regsurgery.diff(a, b)
    assert found.only_a == (TensorInfo("old", "F32", (1,)),)
    assert found.only_b == (TensorInfo("new", "F32", (3, 1)),)
    assert found.retyped == (Retyped("s", "F32", "F32", (2,), (1,)), Retyped("t", "F32", "F16", (2,), (2,)))
    assert (found.changed, found.num_identical, found.identical) == ((), 1, False)
    assert found.summary == "1 tensors identical, 1 only in A, 1 only in B, 2 with another dtype or shape"
    assert regsurgery.diff(b, a).only_a == found.only_b


def test_one_element_of_one_tensor(tmp_path):
    tensors = {**TENSORS, "a.weight": TENSORS["a.weight"].clone()}
    tensors["a.weight"][1, 2] += 0.25
    found = regsurgery.diff(folder_of(tmp_path / "a", TENSORS), folder_of(tmp_path / "b", tensors))
    assert found.changed == (Changed("a.weight", "F32", (2, 3), 0.25, 1, 6, 0),)
    assert (found.only_a, found.only_b, found.retyped, found.num_identical) == ((), (), (), 3)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
     torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64],
)  # fmt: skip
def test_every_dtype_is_read_as_numbers(tmp_path, dtype):
    found = one(tmp_path, torch.tensor([1.0, 2, 3]).to(dtype), torch.tensor([1.0, 4, 2]).to(dtype))
    assert found is not None and (found.max_abs, found.num_different, found.num_nan) == (2, 2, 0)


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_further_kinds_of_eight_bits_are_read_as_numbers(tmp_path, dtype):
    a, b = (torch.tensor([1.0, 2.0, value]).to(dtype) for value in (4.0, 8.0))
    found = one(tmp_path, a, b)
    assert found is not None and (found.max_abs, found.num_different, found.num_nan) == (4, 1, 0)


def test_complex_numbers_differ_by_their_distance(tmp_path):
    a, b = torch.tensor([1 + 1j, 2]), torch.tensor([4 + 5j, 2])
    assert one(tmp_path, a, b) == Changed("x", "C64", (2,), 5.0, 1, 2, 0)


def raw(path: Path, dtype: str, shape: list[int], data: bytes) -> Path:
    header = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_a_dtype_that_is_not_known_is_compared_as_bytes(tmp_path):
    a, b = (raw(tmp_path / f"{name}.safetensors", "F4", [6], data) for name, data in (("a", b"abc"), ("b", b"axy")))
    assert regsurgery.diff(a, b).changed == (Changed("x", "F4", (6,), None, 2, 3, 0),)
    assert regsurgery.diff(a, a).identical


def test_booleans_differ_by_one(tmp_path):
    found = one(tmp_path, torch.tensor([True, False]), torch.tensor([True, True]))
    assert found is not None and (found.dtype, found.max_abs, found.num_different) == ("BOOL", 1, 1)


def test_nan_is_counted_and_does_not_hide_the_numbers(tmp_path):
    nan, inf = math.nan, math.inf
    found = one(tmp_path, torch.tensor([nan, nan, 1, 5, inf]), torch.tensor([nan, 2, nan, 2, inf]))
    assert found is not None and (found.max_abs, found.num_different, found.num_nan) == (3, 3, 2)


def test_nan_alone_has_no_largest_difference(tmp_path):
    found = one(tmp_path, torch.tensor([math.nan, 1]), torch.tensor([0.0, 1]))
    assert found is not None and (found.max_abs, found.num_different, found.num_nan) == (None, 1, 1)


def test_the_sign_of_zero_is_a_difference_of_zero(tmp_path):
    found = one(tmp_path, torch.tensor([0.0]), torch.tensor([-0.0]))
    assert found is not None and (found.max_abs, found.num_different) == (0, 1)


def test_infinity_is_text_in_json(tmp_path):
    a, b = folder_of(tmp_path / "a", {"x": torch.ones(1)}), folder_of(tmp_path / "b", {"x": torch.tensor([-math.inf])})
    found = regsurgery.diff(a, b)
    assert found.changed[0].max_abs == math.inf
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["changed"][0]["max_abs"] == "inf"


@pytest.mark.parametrize("where", [0, CHUNK_BYTES // 4 - 1, CHUNK_BYTES // 4, -1])
def test_the_ends_of_chunks_are_compared(tmp_path, where):
    a = torch.arange(2 * CHUNK_BYTES // 4 + 5, dtype=torch.int32)
    b = a.clone()
    b[where] += 7
    found = one(tmp_path, a, b)
    assert found is not None and (found.max_abs, found.num_different, found.num_elements) == (7, 1, len(a))


def test_every_chunk_counts(tmp_path):
    a = torch.zeros(CHUNK_BYTES // 2 + 3, dtype=torch.float16)
    b = torch.ones_like(a)
    b[-1] = 2
    found = one(tmp_path, a, b)
    assert found is not None and (found.max_abs, found.num_different) == (2, len(a))


# --- inputs at fault ------------------------------------------------------------------------------------------------


def test_nothing_to_compare_is_an_error(tmp_path):
    good = folder_of(tmp_path / "good", TENSORS)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'no'}: no such folder or file")):
        regsurgery.diff(tmp_path / "no", good)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'empty'}: has no safetensors file")):
        regsurgery.diff(good, tmp_path / "empty")


def test_a_broken_file_and_a_name_given_twice_are_errors(tmp_path):
    good = folder_of(tmp_path / "good", TENSORS)
    (tmp_path / "broken.safetensors").write_bytes((good / WHOLE).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"broken\.safetensors: the header describes"):
        regsurgery.diff(good, tmp_path / "broken.safetensors")
    twice = folder_of(tmp_path / "twice", {"x": torch.ones(1)}, {"x": torch.ones(1), "y": torch.ones(1)})
    (twice / f"{WHOLE}.index.json").write_text(
        json.dumps({"weight_map": {"x": "model-0.safetensors", "y": "model-1.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: tensor 'x' is in model-0\.safetensors too"):
        regsurgery.diff(twice, good)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    a, b = folder_of(tmp_path / "a", TENSORS), folder_of(tmp_path / "b", TENSORS)
    read_header = safetensors_file.read_header

    def and_cut(path: Path, **how: bool) -> object:
        header = read_header(path, **how)
        path.write_bytes(path.read_bytes()[:-1])
        return header

    monkeypatch.setattr("regsurgery.checkpoints.safetensors_file.read_header", and_cut)
    with pytest.raises(CheckpointError, match="the source changed while it was read"):
        regsurgery.diff(a, b)


# --- the command line -----------------------------------------------------------------------------------------------


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["regsurgery", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_exit_codes_and_lines(tmp_path, monkeypatch, capsys):
    a = folder_of(tmp_path / "a", {"weight": torch.zeros(2, 2), "gone": torch.ones(1), "n": torch.zeros(1)})
    b = folder_of(
        tmp_path / "b", {"weight": torch.eye(2), "register_tokens": torch.ones(1, 1, 2), "n": torch.ones(1).half()}
    )
    assert run(monkeypatch, "diff", a, a) == 0
    assert capsys.readouterr().out == "3 tensors identical\n"
    assert run(monkeypatch, "diff", a, b) == 1
    assert capsys.readouterr().out.splitlines() == [
        "only in A  gone             F32 [1]",
        "only in B  register_tokens  F32 [1, 1, 2]",
        "type       n                F32 [1] -> F16 [1]",
        "values     weight           F32 [2, 2]  max abs 1, 2 of 4 elements",
        "0 tensors identical, 1 only in A, 1 only in B, 1 with another dtype or shape, 1 with other values",
    ]  # fmt: skip
    assert run(monkeypatch, "diff", a, b, "-q") == 1
    assert capsys.readouterr().out == ""
    assert run(monkeypatch, "diff", a, b, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"a", "b", "identical", "num_identical", "only_a", "only_b", "retyped", "changed"}
    assert found["changed"] == [{"name": "weight", "dtype": "F32", "shape": [2, 2], "max_abs": 1.0, "num_different": 2,
                                 "num_elements": 4, "num_nan": 0}]  # fmt: skip
    assert run(monkeypatch, "diff", a, tmp_path / "no") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'no'}: ")


# ru_maxrss would begin with the peak of the process that starts it.
MEASURE = """
import re, sys, torch
import regsurgery, regsurgery.commands.diff, regsurgery.commands.patch
torch.ones(8).view(torch.int32).double().max()
peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) / 1024
before = peak()
found = regsurgery.diff(*sys.argv[1:])
print(f"{found.changed[0].max_abs} {found.changed[0].num_different} {peak() - before:.1f}")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_tensors(tmp_path):
    """One bfloat16 tensor of 300 MB, of zeros that take no room on disk, 32 MB of which differ in the other."""
    num_bytes, ones = 300 << 20, 32 << 20
    raw = json.dumps({"x": {"dtype": "BF16", "shape": [num_bytes // 2], "data_offsets": [0, num_bytes]}}).encode()
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            file.truncate(8 + len(raw) + num_bytes)
    with paths[1].open("r+b") as file:
        file.seek(8 + len(raw) + num_bytes - ones)
        file.write(b"\x80\x3f" * (ones // 2))
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    largest, num_different, grown = done.stdout.split()
    assert (float(largest), int(num_different)) == (1.0, ones // 2)
    assert float(grown) < 60
