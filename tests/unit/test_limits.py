from __future__ import annotations

import argparse
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from regsurgery.checkpoints.containers import read_weights_file
from regsurgery.checkpoints.limits import read_json, refuse_links_out
from regsurgery.checkpoints.safetensors_file import SafetensorsFile, read_header
from regsurgery.checkpoints.sums import sha256
from regsurgery.checkpoints.weights_check import check_shards, finite_digest
from regsurgery.errors import CheckpointError, RecipeError, UserError
from regsurgery.frontends.bounds import bounded_model, check_numbers
from regsurgery.images.sources import Stretch
from regsurgery.options import DoctorOptions, FindOptions, PatchOptions, ReportOptions, VerifyOptions
from regsurgery.recipe import parse_recipe

CONFIG = Path("config.json")


# --- text -----------------------------------------------------------------------------------------------------------


def test_a_json_file_is_read_up_to_its_limit(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    monkeypatch.setattr("regsurgery.checkpoints.limits.MAX_JSON_BYTES", 7)
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: has 8 bytes, more than the limit of 7; correct")):
        read_json(path)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\udc80"])
def test_a_file_that_is_no_json_object_is_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: not ")):
        read_json(path)


# --- links ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "file").write_text("file")
    return folder


@pytest.mark.parametrize("target", ["../secret", "{tmp}/secret", "..", "/dev/zero", "nowhere", "loop"])
def test_a_link_out_of_the_folder_or_to_nothing_is_refused(folder, target):
    link = folder / "loop"
    link.symlink_to(target.format(tmp=folder.parent))
    with pytest.raises(CheckpointError, match=re.escape(f"{link}: a ") + "(broken )?symbolic link"):
        refuse_links_out(folder)


def test_a_link_inside_the_folder_is_fine(folder):
    (folder / "same").symlink_to("file")
    refuse_links_out(folder)


def test_a_folder_that_is_a_link_itself_is_fine(folder):
    (folder.parent / "alias").symlink_to(folder)
    refuse_links_out(folder.parent / "alias")


def test_links_of_the_hubs_cache_are_fine_and_others_there_are_not(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abcd").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abcd")
    refuse_links_out(snapshot)
    (tmp_path / "secret").write_text("secret")
    (snapshot / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"vocab.txt: a symbolic link to"):
        refuse_links_out(snapshot)


# --- numbers and models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [{"image_size": 10**6}, {"a": {"b": [{"height": 1e9}]}}, {"input_size": [3, 224, 10**5]}, {"num_labels": 10**9},
     {"text_config": {"num_hidden_layers": 10**4000}}, {"depth": float("nan")}, {"num_classes": float("inf")}],
)  # fmt: skip
def test_absurd_numbers_are_refused_by_their_key(config):
    with pytest.raises(CheckpointError, match=r"config.json: '\w+' is .*beyond"):
        check_numbers(CONFIG, config)


def test_usual_numbers_are_fine():
    check_numbers(CONFIG, {"image_size": 1536, "num_labels": 21843, "depth": 64, "vocab_size": 10**6,
                                  "rope_theta": 10**8, "seed": 2**40, "layers": [3, 4, 23, 3]})  # fmt: skip


@pytest.fixture
def files(tmp_path) -> list[SafetensorsFile]:
    save_file({"weight": torch.ones(100, 100), "bias": torch.ones(100)}, tmp_path / "model.safetensors")
    return [read_header(tmp_path / "model.safetensors")]


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(100_000, 100_000),
        lambda: nn.ModuleList(nn.Linear(4000, 4000) for _ in range(10**9)),
        lambda: nn.ModuleList(nn.LayerNorm(1) for _ in range(10**9)),
        lambda: torch.randn(1, 10**6, 10**3),
        lambda: torch.zeros(10**12),
        lambda: torch.arange(10**11),
        lambda: torch.arange(10**5)[:, None] - torch.arange(10**5),
        lambda: torch.ones(1000).repeat(10**7),
        lambda: torch.ones(1).expand(10**11).clone(),
    ],
)
def test_a_model_far_larger_than_its_checkpoint_is_not_built(files, build):
    with pytest.raises(CheckpointError, match=r"config.json: describes a model of .* model.safetensors holds 10100"):  # noqa: SIM117
        with bounded_model(CONFIG, files):
            build()


def test_a_model_of_its_checkpoints_size_is_built_and_the_bound_ends_with_the_block(files):
    with bounded_model(CONFIG, files):
        model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
        model.load_state_dict(model.state_dict())
        torch.arange(500)[:, None] - torch.arange(500)
    assert torch.zeros(10**5, 10**3, device="meta").numel() == 10**8
    nn.Linear(10**5, 10**3, device="meta")


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 499, 999])
def test_nan_and_infinities_are_refused_by_tensor(tmp_path, monkeypatch, dtype, value, at):
    monkeypatch.setattr("regsurgery.checkpoints.weights_check.CHUNK_BYTES", 256)
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.ones(7, dtype=dtype), "b": torch.ones(1000, dtype=dtype), "c": torch.ones(3, dtype=dtype)}
    tensors["b"][at] = value
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: tensor 'b' holds NaN or infinite")):
        finite_digest(read_header(path))


def test_finite_weights_have_the_digest_of_their_file(tmp_path, monkeypatch):
    monkeypatch.setattr("regsurgery.checkpoints.weights_check.CHUNK_BYTES", 256)
    path = tmp_path / "model.safetensors"
    largest = torch.finfo(torch.bfloat16).max
    large = torch.full((300,), largest, dtype=torch.bfloat16)
    save_file({"a": torch.randn(999), "large": large, "b": torch.ones(3).bool(),
               "empty": torch.ones(0), "huge": torch.full((500,), 3e38), "scalar": torch.tensor(1.0),
               "text.attn_mask": torch.full((9, 9), -float("inf")).triu(1)}, path)  # fmt: skip
    assert finite_digest(read_header(path)) == sha256(path)


def test_nan_in_a_mask_is_refused_all_the_same(tmp_path):
    save_file({"mask": torch.tensor([float("nan")])}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tensor 'mask'"):
        finite_digest(read_header(tmp_path / "model.safetensors"))


INDEX = "model.safetensors.index.json"


@pytest.fixture
def shards(tmp_path) -> list[SafetensorsFile]:
    for name in ("one", "two"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    return [read_header(tmp_path / f"{name}.safetensors") for name in ("one", "two")]


def check_index(shards, weight_map: dict[str, str]) -> None:
    folder = shards[0].path.parent
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    check_shards(folder, "model.safetensors", shards)


def test_shards_as_the_index_says_are_fine(shards):
    check_index(shards, {"one": "one.safetensors", "two": "two.safetensors"})


def test_a_tensor_in_another_shard_than_the_index_says_is_named(shards):
    with pytest.raises(CheckpointError, match=rf"{INDEX}: tensor 'one' is in one.safetensors, not in two.safetensors"):
        check_index(shards, {"one": "two.safetensors", "two": "two.safetensors"})


def test_a_tensor_in_two_shards_is_named(shards):
    save_file({"one": torch.ones(2), "two": torch.ones(2)}, shards[1].path)
    again = [read_header(shard.path) for shard in shards]
    with pytest.raises(CheckpointError, match=r"two.safetensors: tensor 'one' is in one.safetensors too"):
        check_index(again, {})


# --- pickles --------------------------------------------------------------------------------------------------------


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    return dict(read_weights_file(path, allow_pickle=True).weights(None, "transformers").tensors)


def test_tied_weights_in_a_pickle_are_read(tmp_path):
    tied = torch.randn(50, 50)
    torch.save({"state_dict": {"a": tied, "b": tied, "c": tied.T}}, tmp_path / "w.bin")
    state = read_pickle(tmp_path / "w.bin")
    assert torch.equal(state["a"], tied) and torch.equal(state["c"], tied.T)


@pytest.mark.parametrize(
    "state, problem",
    [
        ({"a": torch.zeros(1).expand(10**12)}, "its tensors take"),
        ({f"{n}": torch.zeros(10**6).expand(10, 10**6) for n in range(9)}, "its tensors take"),
        ({"a": torch.ones(3).to_sparse()}, "'a' is sparse"),
        ({"a": torch.ones(3, device="meta")}, "'a' is sparse, quantised or has no data"),
        ({1: torch.ones(3)}, "not a plain state dict"),
        ([torch.ones(3)], "not a plain state dict"),
    ],
)
def test_a_pickle_of_other_things_or_of_tensors_larger_than_the_file_is_refused(tmp_path, state, problem):
    torch.save(state, tmp_path / "w.bin")
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'w.bin'}: ") + f".*{problem}.*safetensors"):
        read_pickle(tmp_path / "w.bin")


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "w.bin"
    torch.save({"a": torch.zeros(10**6)}, path)
    parts = {}
    with zipfile.ZipFile(path) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("it was read"))
    with pytest.raises(CheckpointError, match=r"w.bin: an archive of \d+ bytes that unpacks to \d+; convert"):
        read_pickle(path)


class Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_what_training_scripts_put_next_to_weights_is_read(tmp_path):
    beside = {"args": argparse.Namespace(output=tmp_path, lr=0.1), "best": np.float64(0.5), "epoch": np.int64(3)}
    torch.save({"state_dict": {"a": torch.ones(2)}, **beside}, tmp_path / "w.bin")
    file = read_weights_file(tmp_path / "w.bin", allow_pickle=True)
    assert file.arguments == {"output": None, "lr": 0.1}
    assert torch.equal(file.weights(None, "timm").tensors["a"], torch.ones(2))


def test_arguments_that_hold_themselves_are_cut(tmp_path):
    arguments = {"model": "vit", "size": (3, 4)}
    arguments["self"] = arguments
    torch.save({"state_dict": {"a": torch.ones(2)}, "args": arguments}, tmp_path / "w.bin")
    read = read_weights_file(tmp_path / "w.bin", allow_pickle=True).arguments
    assert (read["model"], read["size"]) == ("vit", (3, 4)) and "self" in read


def test_a_type_that_is_not_data_is_named(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}, "config": Runs(tmp_path)}, tmp_path / "w.bin")
    with pytest.raises(CheckpointError, match=r"cannot be read as plain weights \(it holds a posix\.mkdir, which"):
        read_pickle(tmp_path / "w.bin")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, zipped):
    torch.save({"a": Runs(tmp_path / "ran")}, tmp_path / "w.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"w.bin: cannot be read as plain weights .*; convert it"):
        read_pickle(tmp_path / "w.bin")
    assert not (tmp_path / "ran").exists()


def test_a_recipe_cannot_multiply_its_registers(demo_folder):
    from regsurgery import patch

    recipe = parse_recipe("{schema: 1, register_neurons: {1: [25]}, num_registers: 64, num_patches: 1}", "many")
    with pytest.raises(RecipeError, match="gives 9216 registers for 144 patches"):
        patch(str(demo_folder), "nowhere", recipe=recipe, dry_run=True, num_images=2)


@pytest.mark.parametrize("command", ["doctor", "find", "verify", "report", "patch"])
def test_millions_of_generated_pictures_are_refused_at_once(command, demo_folder):
    options = {"doctor": DoctorOptions, "find": FindOptions, "verify": VerifyOptions, "report": ReportOptions,
               "patch": PatchOptions}[command](num_images=50_000_000)  # fmt: skip
    with pytest.raises(UserError, match="--num-images 50000000: at most 1000000 pictures are generated"):
        options.image_set()


def test_a_member_of_a_tar_that_claims_more_than_a_picture_has_is_not_read(tmp_path):
    (tmp_path / "x.tar").touch()
    with pytest.raises(ValueError, match="has 1099511627776 bytes, more than a picture takes"):
        Stretch(tmp_path / "x.tar", 0, 1 << 40).read()


@pytest.mark.parametrize(
    "text", ['<!DOCTYPE a [<!ENTITY b "x">]><annotation>&b;</annotation>', "<a>" + " " * (1 << 20)]
)
def test_an_annotation_cannot_multiply(tmp_path, text):
    from regsurgery.evaluation.voc import MAX_ANNOTATION_BYTES, read_boxes

    assert MAX_ANNOTATION_BYTES == 1 << 20
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(UserError, match="declares types or entities, or is larger than an annotation"):
        read_boxes(tmp_path / "a.xml")
