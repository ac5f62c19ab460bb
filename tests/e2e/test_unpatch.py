"""Patching undone: the source's files come back byte for byte, or it is said why not and where the source is."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import regsurgery
from regsurgery.checkpoints.sums import SUMS_NAME, sha256
from regsurgery.cli.app import main
from regsurgery.errors import CheckpointError, OutputError, UserError
from regsurgery.verification.original import RECORD_NAME

MODEL = "model.safetensors"


def sums(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def patched(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patched") / "out"
    regsurgery.patch(str(demo_folder), folder, recipe="demo", num_images=2)
    return folder


@pytest.fixture
def copy(patched: Path, tmp_path: Path) -> Path:
    return shutil.copytree(patched, tmp_path / "copy")


def test_the_source_comes_back_and_can_be_patched_again(demo_folder: Path, patched: Path, tmp_path: Path) -> None:
    restored = regsurgery.unpatch(patched, tmp_path / "restored")
    assert sums(tmp_path / "restored") == sums(demo_folder) == restored.files
    assert (restored.output, restored.changed, restored.not_copied) == (str(tmp_path / "restored"), (), ())
    assert restored.source["id"] == str(demo_folder)
    regsurgery.patch(str(tmp_path / "restored"), tmp_path / "again", recipe="demo", num_images=2)
    assert regsurgery.diff(patched, tmp_path / "again").identical


def test_a_sharded_source_with_files_of_its_own_comes_back(demo_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    source = tmp_path / "source"
    AutoModelForImageClassification.from_pretrained(demo_folder).save_pretrained(source, max_shard_size="300KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    shutil.copyfile(demo_folder / "preprocessor_config.json", source / "preprocessor_config.json")
    for name, text in (
        ("README.md", "# A card\n"),
        (SUMS_NAME, "0  x\n"),
        ("recipe.yaml", "mine"),
        ("labels.txt", "a\r\n"),
    ):
        (source / name).write_bytes(text.encode())
    regsurgery.patch(str(source), tmp_path / "patched", recipe="demo", num_images=2)
    regsurgery.unpatch(tmp_path / "patched", tmp_path / "restored")
    assert sums(tmp_path / "restored") == sums(source)
    found = regsurgery.diff(source, tmp_path / "patched")
    assert [tensor.name for tensor in found.only_b] == ["vit.register_tokens"]
    assert (found.only_a, found.retyped, found.changed) == ((), (), ())
    assert regsurgery.verify(tmp_path / "patched", num_images=2).passed


def test_mode_bias_keeps_the_original_too(demo_folder: Path, tmp_path: Path) -> None:
    regsurgery.patch(str(demo_folder), tmp_path / "bias", recipe="demo", mode="bias", num_images=4)
    regsurgery.unpatch(tmp_path / "bias", tmp_path / "restored")
    assert sums(tmp_path / "restored") == sums(demo_folder)


def retrain(folder: Path, name: str) -> None:
    tensors = load_file(folder / MODEL)
    tensors[name] += 1
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})


def test_trained_registers_are_said_and_left_behind(demo_folder: Path, copy: Path, tmp_path: Path) -> None:
    retrain(copy, "vit.register_tokens")
    restored = regsurgery.unpatch(copy, tmp_path / "restored")
    assert restored.changed == (MODEL,)
    assert sums(tmp_path / "restored") == sums(demo_folder)


def test_trained_weights_cannot_be_undone(copy: Path, demo_folder: Path, tmp_path: Path) -> None:
    retrain(copy, "classifier.bias")
    with pytest.raises(CheckpointError) as refused:
        regsurgery.unpatch(copy, tmp_path / "restored")
    assert f"{copy}: restoring gives different bytes from the source's for {MODEL}: " in str(refused.value)
    assert "restored correctly: config.json, preprocessor_config.json; " in str(refused.value)
    assert f"the source was the folder {demo_folder} (weights sha256 {sha256(demo_folder / MODEL)})" in str(
        refused.value
    )
    assert not (tmp_path / "restored").exists()


def test_native_and_pt2_say_why_not_and_where_the_source_is(demo_folder: Path, copy: Path, tmp_path: Path) -> None:
    regsurgery.patch(str(demo_folder), tmp_path / "pt2", recipe="demo", format="pt2", num_images=2)
    assert not (tmp_path / "pt2" / RECORD_NAME).exists()
    where = re.escape(f"the source was the folder {demo_folder} (weights sha256 {sha256(demo_folder / MODEL)})")
    with pytest.raises(UserError, match=rf"a \.pt2 is a program.*; {where}"):
        regsurgery.unpatch(tmp_path / "pt2", tmp_path / "restored")
    config = json.loads((copy / "config.json").read_text())
    config["regsurgery"]["mode"] = "native"
    config["regsurgery"]["source"] |= {"id": "timm:vit", "repo": "timm/vit.tag", "revision": "abc"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"native mode changes weights.*the source is timm:vit, revision abc .*: "
                       r"hf download timm/vit\.tag --revision abc --local-dir original$"):  # fmt: skip
        regsurgery.unpatch(copy, tmp_path / "restored")
    config["regsurgery"]["source"] = {"id": "demo", "revision": None, "sha256": "0"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="the source is the embedded demo"):
        regsurgery.unpatch(copy, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_a_pickle_cannot_come_back_and_verify_can_still_compare(demo_folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(demo_folder, tmp_path / "source")
    torch.save(load_file(source / MODEL), source / "pytorch_model.bin")
    (source / MODEL).unlink()
    regsurgery.patch(str(source), tmp_path / "patched", recipe="demo", num_images=2, allow_pickle=True)
    digest = sha256(source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rf"converted from pytorch_model\.bin \(sha256 {digest}\).*{source}"):
        regsurgery.unpatch(tmp_path / "patched", tmp_path / "restored")
    assert regsurgery.verify(tmp_path / "patched", num_images=2).passed


def test_folders_at_fault(demo_folder: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        regsurgery.unpatch(tmp_path / "no", tmp_path / "restored")
    with pytest.raises(UserError, match="has no 'regsurgery' entry"):
        regsurgery.unpatch(demo_folder, tmp_path / "restored")
    with pytest.raises(OutputError, match="already exists"):
        regsurgery.unpatch(copy, copy)
    (copy / RECORD_NAME).unlink()
    with pytest.raises(CheckpointError, match=rf"{RECORD_NAME}: missing.*the source was the folder"):
        regsurgery.unpatch(copy, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_the_command(
    demo_folder: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["regsurgery", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    retrain(copy, "vit.register_tokens")
    code, out, _ = run("unpatch", copy, "-o", tmp_path / "a", "--json")
    found = json.loads(out)
    assert code == 0 and set(found) == {"output", "source", "files", "not_copied", "changed"}
    assert found["files"] == sums(demo_folder) and found["changed"] == [MODEL]
    code, out, err = run("unpatch", copy, "-o", tmp_path / "b")
    assert code == 0 and "model.safetensors: changed after patching" in out, err
    assert out.endswith(f"wrote {tmp_path / 'b'}: {demo_folder} restored, sha256 of 3 files equal\n")
    assert run("unpatch", copy, "-o", tmp_path / "c", "-q") == (0, "", "")
    code, out, err = run("unpatch", demo_folder, "-o", tmp_path / "d")
    assert (code, out) == (2, "") and err.startswith("error: ") and "Traceback" not in err
