"""Code in a patched folder that no regsurgery wrote: nothing runs it that was not told to."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import regsurgery
from regsurgery.backends.pt2_archive import foreign_part
from regsurgery.checkpoints.sums import SUMS_NAME, write_sums
from regsurgery.errors import CheckpointError
from tests.commands import Done

FEW = ("--num-images", "2")
LOADER, PROGRAM = "modeling_regsurgery.py", "model.pt2"
COMMANDS = {
    "verify": ("verify", *FEW),
    "report": ("report", *FEW),
    "eval fidelity": ("eval", "fidelity", *FEW),
    "eval latency": ("eval", "latency", "--runs", "4", "--batch", "1", *FEW),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo, patched in a library's format and as a program."""
    root = tmp_path_factory.mktemp("folders")
    for fmt in ("transformers", "pt2"):
        regsurgery.patch("demo", root / fmt, recipe="demo", format=fmt, verification=False)
    return {fmt: root / fmt for fmt in ("transformers", "pt2")}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that unknown code writes when it runs."""
    return tmp_path / "it ran"


@pytest.fixture(params=["sums do not match", "sums match", "no sums"])
def tampered(request: pytest.FixtureRequest, folders: dict[str, Path], marker: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(folders["transformers"], tmp_path / "tampered")
    with (folder / LOADER).open("a") as file:
        file.write(f"\nopen({str(marker)!r}, 'w').close()\n")
    if request.param != "sums do not match":
        (folder / SUMS_NAME).unlink()
    if request.param == "sums match":
        write_sums(folder)
    return folder


def test_load_does_not_run_it(tampered: Path, marker: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{LOADER}: (differs|.*trust_remote_code=True)"):
        regsurgery.load(tampered)
    assert not marker.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_it(run: Callable[..., Done], tampered: Path, marker: Path, command: str) -> None:
    done = run(*COMMANDS[command], str(tampered))
    assert done.code == 2 and not marker.exists()
    (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert re.search(f"{LOADER}: (.*--trust-remote-code|differs)|has no {SUMS_NAME}", error)


def test_trusted_it_runs(run: Callable[..., Done], tampered: Path, marker: Path) -> None:
    write_sums(tampered)
    assert run("verify", "--trust-remote-code", *FEW, str(tampered)).code == 0 and marker.exists()
    marker.unlink()
    assert run("eval", "latency", "--trust-remote-code", "--runs", "4", "--batch", "1", *FEW, str(tampered)).code == 0
    assert marker.exists()
    marker.unlink()
    regsurgery.load(tampered, trust_remote_code=True)
    assert marker.exists()


def test_what_a_library_saved_after_training_loads(folders: dict[str, Path], tmp_path: Path) -> None:
    saved = shutil.copytree(folders["transformers"], tmp_path / "saved")
    (saved / SUMS_NAME).unlink()
    assert regsurgery.load(saved).training is False
    shutil.copyfile(folders["transformers"] / SUMS_NAME, saved / SUMS_NAME)
    (saved / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match=f"differs from {SUMS_NAME}.*by training, say"):
        regsurgery.load(saved)


def test_an_annotation_that_transformers_cannot_resolve_is_one_line(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **how: Any) -> None:
        raise NameError("name 'BeitConfig' is not defined")

    monkeypatch.setattr("regsurgery.backends.transformers.from_pretrained", fail)
    with pytest.raises(CheckpointError, match="its model cannot be built: name 'BeitConfig'"):
        regsurgery.load(folders["transformers"])


class Payload:
    """Pickled, it writes the marker when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes], **more: bytes) -> None:
    """A `.pt2` with changed parts, and `more` of them."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
        for name, content in more.items():
            new.writestr(f"archive/{name}", content)


def in_json(part: str, old: str, new: str) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        return content.replace(old.encode(), new.encode(), 1) if name.endswith(part) else content

    return change


def pickled_weight(name: str, content: bytes) -> bytes:
    return in_json("model_weights_config.json", '"use_pickle": false', '"use_pickle": true')(name, content)


def called(marker: Path) -> str:
    return json.dumps(f"open({str(marker)!r}, 'w')")


PT2 = {
    "a pickled weight": lambda marker: pickled_weight,
    "guards": lambda marker: in_json("model.json", '"guards_code": []', f'"guards_code": [{called(marker)}]'),
    "a size": lambda marker: in_json("model.json", "\"Symbol('s", f'{called(marker)[:-1]} or Symbol(\'s'),
    "an operator": lambda marker: in_json("model.json", "torch.ops.aten.cat.default", "torch.serialization.load"),
    "the name of an argument": lambda marker: in_json("model.json", '{"name": "dim"', f'{{"name": {called(marker)}'),
    "a name with a call": lambda marker: in_json("model.json", '"name": "linear"', f'"name": {called(marker)}'),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*PT2, "example inputs", "another part"])
def test_a_program_that_is_more_than_a_graph_does_not_run(
    run: Callable[..., Done], folders: dict[str, Path], marker: Path, tmp_path: Path, kind: str
) -> None:
    folder = shutil.copytree(folders["pt2"], tmp_path / "tampered")
    original, program = folders["pt2"] / PROGRAM, folder / PROGRAM
    if kind == "example inputs":
        buffer = io.BytesIO()
        torch.save((Payload(marker),), buffer, pickle_module=pickle)
        rewritten(original, program, lambda name, old: buffer.getvalue() if "sample_inputs" in name else old)
    elif kind == "another part":
        rewritten(original, program, lambda name, old: old, **{"data/constants/opaque_obj_0": b""})
    else:
        change = PT2[kind](marker)
        rewritten(original, program, change)
        assert any(zipfile.ZipFile(program).read(e) != zipfile.ZipFile(original).read(e)
                   for e in zipfile.ZipFile(original).namelist())  # fmt: skip
    write_sums(folder)
    done = run("verify", *FEW, str(folder))
    assert done.code == 2 and "--trust-remote-code" in done.err and not marker.exists()
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        regsurgery.load(folder)
    assert not marker.exists()


def test_a_program_of_our_own_is_only_a_graph(folders: dict[str, Path]) -> None:
    assert foreign_part(folders["pt2"] / PROGRAM) is None
    assert regsurgery.load(folders["pt2"])(torch.zeros(2, 3, 96, 96))["logits"].shape[0] == 2
