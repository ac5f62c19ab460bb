from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image

from regsurgery.checkpoints.sums import write_sums
from regsurgery.demo import write_demo
from tests.commands import PROGRAM, Done
from tests.drills.places import limit
from tests.drills.running import patch as forked
from tests.photos import write_photos

PARTS = ["README.md", "SHA256SUMS", "before_after.png", "config.json", "model.safetensors", "modeling_regsurgery.py",
         "preprocessor_config.json", "recipe.yaml", "regsurgery_original.json", "regsurgery_run.json"]  # fmt: skip
VERDICT_KEYS = {"passed", "outliers_per_image", "max_patch_norm", "median_patch_norm", "register_norm",
                "cosine_patches", "cosine_output", "kl", "same_argmax", "parity_max_abs"}  # fmt: skip
PATCH_KEYS = {"output", "mode", "format", "register_neurons", "verify", "seconds", "peak_rss_mb", "sizes"}
RENAMED = "vit.encoder.layer.0.attention.output.dense.bias"  # on disk; transformers 5 has another name in memory
FEW = ("--num-images", "2")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    write_demo(folder)
    return folder


@pytest.fixture(scope="module")
def patched(demo, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("patched") / "out"
    program("patch", demo, "--recipe", "demo", "-q", "-o", folder, *FEW)
    return folder


@pytest.fixture
def model(demo, tmp_path) -> Path:
    return shutil.copytree(demo, tmp_path / "model")


def program(*args: object, **env: str) -> Done:
    done = subprocess.run([PROGRAM, *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", "HF_HUB_OFFLINE": "1", **env})  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def assert_refused(done: Done, *named: object, code: int = 2) -> None:
    assert done.code == code
    assert done.out == ""
    assert "Traceback" not in done.err
    assert done.err.startswith("error: ")
    assert done.err.endswith("\n") and done.err.count("\n") == 1
    for name in named:
        assert str(name) in done.err


def edit_config(model: Path, **changes: object) -> None:
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps({**config, **changes}), "utf-8")


def as_pickle(model: Path, name: str = "pytorch_model.bin") -> None:
    torch.save(safetensors.torch.load_file(model / "model.safetensors"), model / name)
    (model / "model.safetensors").unlink()


class Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


# --- MODEL ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm:vit_tny_patch16_224", "open_clip:ViT-B-32/nosuch", "no such/model/at all"])
def test_a_model_that_nobody_knows(run, tmp_path, name):
    assert_refused(run("patch", name, "--recipe", "demo", "-q", "-o", tmp_path / "out"), name)
    assert everything(tmp_path) == set()


def test_a_folder_that_does_not_exist(run, tmp_path):
    assert_refused(run("patch", tmp_path / "no", "--recipe", "demo", "-q", "-o", tmp_path / "out"), tmp_path / "no")
    assert everything(tmp_path) == set()


def test_a_hub_id_while_offline(tmp_path):
    done = program(
        "patch", "nobody/no-such-model", "--recipe", "demo", "-o", tmp_path / "out", HF_HOME=str(tmp_path / "hf")
    )
    assert done.code == 2
    assert "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("error: nobody/no-such-model: ")
    assert not (tmp_path / "out").exists()


def remove(name):
    return lambda model: (model / name).unlink()


def write(name, content: bytes):
    return lambda model: (model / name).write_bytes(content)


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def change_tensor(change, name="vit.layernorm.weight"):
    def edit(model: Path) -> None:
        tensors = safetensors.torch.load_file(model / "model.safetensors")
        tensors.update(change(name, tensors.pop(name)))
        safetensors.torch.save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return edit


def shard_outside(model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "x.safetensors")
    index = {"weight_map": {"vit.layernorm.weight": "../x.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


CODE = "ViTModel):\n    pass\n__import__('os').mkdir('ran')\nclass X("


def edit_processor(model: Path, **changes: object) -> None:
    path = model / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


def processor_code(model: Path) -> None:
    """Without an answer to its question, transformers would wait for the user's."""
    (model / "mine.py").write_text("import os\nos.mkdir(os.path.dirname(__file__) + '/ran')\n", "utf-8")
    edit_processor(model, image_processor_type="Mine", auto_map={"AutoImageProcessor": "mine.Mine"})


def link_out(name: str):
    def edit(model: Path) -> None:
        path, outside = model / name, model.parent / "outside"
        outside.write_bytes(path.read_bytes() if path.is_file() else b"secret")
        path.unlink(missing_ok=True)
        path.symlink_to(outside)

    return edit


BROKEN = {
    "no config": (remove("config.json"), "no config.json"),
    "config cut": (write("config.json", b'{"model_type'), "config.json: not valid JSON"),
    "config no text": (write("config.json", b"\xff\xfe"), "config.json: not valid JSON"),
    "config a list": (write("config.json", b"[]"), "config.json: not a JSON object"),
    "config of nothing": (write("config.json", b"{}"), "config.json: has neither 'model_type'"),
    "no weights": (remove("model.safetensors"), "model.safetensors is missing"),
    "weights cut": (truncate, "model.safetensors: the header describes"),
    "weights empty": (write("model.safetensors", b""), "model.safetensors: cut off"),
    "tensor missing": (change_tensor(lambda name, tensor: {}), "tensor 'vit.layernorm.weight' is missing"),
    "renamed tensor missing": (change_tensor(lambda name, tensor: {}, name=RENAMED), RENAMED),
    "tensor cut": (change_tensor(lambda name, tensor: {name: tensor[1:].clone()}), "vit.layernorm.weight"),
    "shard outside": (shard_outside, "'../x.safetensors'"),
    "pickled": (as_pickle, "pytorch_model.bin: pickled weights"),
    "architecture unknown": (lambda model: edit_config(model, architectures=["ViTForNothing"]), "ViTForNothing"),
    "architecture a number": (lambda model: edit_config(model, architectures=[5]), "config.json"),
    "patch size zero": (lambda model: edit_config(model, patch_size=0), "model"),
    "width as text": (lambda model: edit_config(model, hidden_size="64"), "hidden_size"),
    "activation unknown": (lambda model: edit_config(model, hidden_act="gelo"), "gelo"),
    "preprocessor cut": (write("preprocessor_config.json", b"{"), "preprocessor_config.json"),
    "too many labels": (lambda model: edit_config(model, id2label=None, num_labels=10**10), "'num_labels' is"),
    "too wide": (lambda model: edit_config(model, hidden_size=10**6), "config.json: describes a model of a tensor of"),
    "too deep": (
        lambda model: edit_config(model, num_hidden_layers=4000),
        "config.json: describes a model of more than",
    ),
    "far too deep": (lambda model: edit_config(model, num_hidden_layers=10**9), "'num_hidden_layers' is 1000000000"),
    "image too large": (lambda model: edit_config(model, image_size=10**6), "'image_size' is 1000000"),
    "image of nothing": (lambda model: edit_config(model, image_size=0), "model"),
    "config too long": (write("config.json", b" " * (17 << 20)), "config.json: has 17825792 bytes"),
    "architecture no model": (
        lambda model: edit_config(model, architectures=["pipeline"]),
        "'pipeline' is not a transformers model class",
    ),
    "architecture code": (
        lambda model: edit_config(model, architectures=[CODE]),
        "is not a class name",
    ),
    "kernel": (lambda model: edit_config(model, attn_implementation="owner/code"), "'attn_implementation' names code"),
    "preprocessor's code": (processor_code, "preprocessor_config.json"),
    "preprocessor too large": (lambda model: edit_processor(model, size={"height": 10**6, "width": 96}), "'height' is"),
    "preprocessor of two channels": (
        lambda model: edit_processor(model, image_mean=[0.5] * 2),
        "correct them, or remove the file",
    ),
    "preprocessor of nothing": (lambda model: edit_processor(model, image_std=[0.0] * 3), "its preprocessing"),
    "nan": (
        change_tensor(lambda name, tensor: {name: tensor * float("nan")}),
        "tensor 'vit.layernorm.weight' holds NaN",
    ),
    "infinite": (
        change_tensor(lambda name, tensor: {name: tensor / 0}),
        "tensor 'vit.layernorm.weight' holds NaN or inf",
    ),
    "weights elsewhere": (link_out("model.safetensors"), "model.safetensors: a symbolic link to"),
    "side file elsewhere": (link_out("vocab.txt"), "vocab.txt: a symbolic link to"),
    "patched by nobody": (lambda model: edit_config(model, regsurgery=5), "is already patched"),
    "patched already": (lambda model: edit_config(model, regsurgery={}), "is already patched"),
}


@pytest.mark.parametrize("damage, named", BROKEN.values(), ids=BROKEN)
def test_a_broken_model(run, model, tmp_path, damage, named):
    damage(model)
    before = everything(tmp_path)
    assert_refused(run("patch", model, "--recipe", "demo", "-q", "-o", tmp_path / "out"), model, named)
    assert everything(tmp_path) == before


def test_truncated_weights_as_the_user_sees_it(model, tmp_path):
    truncate(model)
    done = program("patch", model, "--recipe", "demo", "-q", "-o", tmp_path / "out")
    assert_refused(done, model / "model.safetensors")
    assert not (tmp_path / "out").exists()


def test_a_text_model(tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=9, **sizes)).save_pretrained(tmp_path / "bert")
    before = everything(tmp_path)
    done = program("patch", tmp_path / "bert", "--recipe", "demo", "-q", "-o", tmp_path / "out")
    assert_refused(done, tmp_path / "bert", "BertModel", "takes images as pixels")
    assert everything(tmp_path) == before


def test_pickled_weights_are_accepted_when_allowed(run, model, tmp_path):
    as_pickle(model)
    done = run("patch", model, "--recipe", "demo", "--allow-pickle", "-q", "-o", tmp_path / "out", *FEW)
    assert done == Done(0, "", "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == PARTS


@pytest.mark.parametrize("kind", ["code", "garbage", "cut", "no state dict"])
def test_a_pickle_that_is_no_plain_weights(run, model, tmp_path, kind):
    as_pickle(model)
    path = model / "pytorch_model.bin"
    if kind == "code":
        torch.save({"weight": Runs(tmp_path / "it ran")}, path)
    elif kind == "no state dict":
        torch.save([torch.ones(2)], path)
    else:
        path.write_bytes(b"garbage" if kind == "garbage" else path.read_bytes()[:-5000])
    before = everything(tmp_path)
    assert_refused(run("patch", model, "--recipe", "demo", "--allow-pickle", "-q", "-o", tmp_path / "out"), path)
    assert everything(tmp_path) == before


# --- recipe, images, output -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "neurons, named",
    [("{1: [55, 256]}", "neuron 256 of block 1"), ("{4: [0]}", "block 4"), ("{1: [-1]}", "neuron -1 of block 1")],
)
def test_a_recipe_that_does_not_fit(run, demo, tmp_path, neurons, named):
    (tmp_path / "mine.yaml").write_text(f"schema: 1\nregister_neurons: {neurons}\n", "utf-8")
    assert_refused(run("patch", demo, "--recipe", tmp_path / "mine.yaml", "-q", "-o", tmp_path / "out"), named)
    assert everything(tmp_path) == {tmp_path / "mine.yaml"}


def test_neurons_that_are_not_the_register_neurons(run, demo, tmp_path):
    (tmp_path / "mine.yaml").write_text("schema: 1\nregister_neurons: {1: [56]}\n", "utf-8")
    done = run("patch", demo, "--recipe", tmp_path / "mine.yaml", "-q", "-o", tmp_path / "out")
    assert_refused(done, "verification failed", "outlier tokens per image remain", code=1)
    assert everything(tmp_path) == {tmp_path / "mine.yaml"}


@pytest.mark.parametrize(
    "args, named",
    [
        (["--recipe", "dmo"], "dmo: no such recipe file, and no bundled recipe of that name; did you mean 'demo'?"),
        (["--recipe", "demo", "--format", "onx"], "format onx: not one of transformers, timm, open_clip, dinov2, pt2"),
        (["--recipe", "demo", "--format", "timm"], "format timm"),
        (["--recipe", "demo", "--num-registers", "65"], "--num-registers"),
        (["--recipe", "demo", "--images", "no-such-folder"], "no-such-folder: no such folder of images"),
    ],
)
def test_an_option_that_makes_no_sense(run, demo, tmp_path, args, named):
    assert_refused(run("patch", demo, "-q", "-o", tmp_path / "out", *args), named)
    assert everything(tmp_path) == set()


def cut_jpeg(path: Path) -> None:
    Image.effect_noise((200, 200), 90).save(path)
    path.write_bytes(path.read_bytes()[:-2000])


def too_few(folder: Path) -> None:
    write_photos(folder, 3)
    (folder / "a.png").write_bytes(b"garbage")
    cut_jpeg(folder / "b.jpg")


def a_few_bytes(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"garbage")


IMAGES = {
    "empty": (lambda folder: (folder / "readme.txt").write_text("none"), "images: no images in it"),
    "too small": (lambda folder: write_photos(folder, 3), "images: 3 images in it, at least 4 are needed"),
    "too few readable": (too_few, "3 of 5 images can be read, at least 4 are needed", "images/a.png: not a readable",
                         "images/b.jpg: not a readable image"),
    "parquet": (lambda folder: a_few_bytes(folder, "a.parquet"), "images/a.parquet: cannot be read as parquet"),
    "arrow": (lambda folder: a_few_bytes(folder, "a.arrow"), "images/a.arrow: cannot be read as arrow"),
    "tar": (lambda folder: a_few_bytes(folder, "a.tar"), "images/a.tar: cannot be read as tar"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["patch", "verify"])
@pytest.mark.parametrize("make, named", [(make, named) for make, *named in IMAGES.values()], ids=IMAGES)
def test_images_that_cannot_be_read(run, demo, patched, tmp_path, command, make, named):
    images = tmp_path / "images"
    images.mkdir()
    make(images)
    before = everything(tmp_path)
    args = (demo, "--recipe", "demo", "-o", tmp_path / "out") if command == "patch" else (patched,)
    assert_refused(run(command, *args, "-q", "--images", images), images, *named)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("command", ["patch", "verify"])
@pytest.mark.parametrize("quiet", [False, True])
def test_broken_images_among_others_are_skipped(run, demo, patched, tmp_path, command, quiet):
    images = tmp_path / "images"
    images.mkdir()
    write_photos(images, 4)
    (images / "1a.png").write_bytes(b"garbage")
    cut_jpeg(images / "9.jpg")
    args = (demo, "--recipe", "demo", "-o", tmp_path / "out") if command == "patch" else (patched,)
    done = run(command, *args, *(["-q"] if quiet else []), "--images", images)
    assert done.code == 0
    skipped = [line for line in done.err.splitlines() if "skipped" in line]
    assert [line.split(":")[0] for line in skipped] == ([] if quiet else [f"skipped {images}/{name}" for name in
                                                                          ("1a.png", "9.jpg")])  # fmt: skip


@pytest.mark.parametrize("output", ["there", "no/out"])
def test_an_output_that_cannot_be_made(run, demo, tmp_path, output):
    (tmp_path / "there").mkdir()
    done = run("patch", demo, "--recipe", "demo", "-q", "-o", tmp_path / output)
    assert_refused(done, tmp_path / ("there" if output == "there" else "no"))
    assert everything(tmp_path) == {tmp_path / "there"}


def test_a_disk_that_is_full_at_the_end(run, demo, tmp_path, monkeypatch):
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("regsurgery.checkpoints.whole.sync", full)
    done = run("patch", demo, "--recipe", "demo", "-q", "-o", tmp_path / "out", *FEW)
    assert_refused(done, tmp_path / "out", "No space left on device")
    assert everything(tmp_path) == set()


def test_no_recipe_is_blamed_for_what_cannot_be_loaded(run, tmp_path, monkeypatch):
    def fails(*args: object, **how: object) -> None:
        raise ImportError("no such module")

    monkeypatch.setattr("regsurgery.verification.folder.rebuilt", fails)
    done = run("patch", "demo", "-o", tmp_path / "out", *FEW)
    assert done.code == 1 and "recipe: demo (bundled)" in done.err and "does not fit" not in done.err
    assert done.err.splitlines()[-1].startswith("error: the written model cannot be loaded, so nothing was written: no")
    assert everything(tmp_path) == set()


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["transformers", "pt2", "onnx"])
def test_a_file_that_may_not_grow_to_its_size(demo, tmp_path, fmt):
    process = forked(demo, tmp_path / "out", "--format", fmt, prepare=partial(limit, 100))
    out, err = process.communicate(timeout=120)
    assert process.returncode is not None
    assert_refused(Done(process.returncode, out, err), tmp_path / "out")
    assert everything(tmp_path) == set()


# --- verify ---------------------------------------------------------------------------------------------------------


def test_verify_of_a_folder_that_is_none_or_not_patched(run, demo, tmp_path):
    assert_refused(run("verify", tmp_path / "no", "-q"), tmp_path / "no")
    assert_refused(run("verify", demo, "-q"), demo)


@pytest.mark.parametrize("name", [name for name in PARTS if name != "SHA256SUMS"])
def test_verify_names_a_changed_and_a_missing_file(run, patched, tmp_path, name):
    folder = shutil.copytree(patched, tmp_path / "copy")
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused(run("verify", folder, "-q"), f"{path}: differs from SHA256SUMS")
    path.unlink()
    assert_refused(run("verify", folder, "-q"), f"{path}: listed in SHA256SUMS but missing")


def no_recipe(folder: Path) -> None:
    (folder / "recipe.yaml").unlink()


def edit_block(**changes: object):
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        edit_config(folder, regsurgery={**config["regsurgery"], **changes})

    return edit


BROKEN_PATCHED = {
    "block a number": (lambda folder: edit_config(folder, regsurgery=5), "config.json: its 'regsurgery' entry"),
    "mode unknown": (edit_block(mode="magic"), "config.json: its 'regsurgery' entry"),
    "no source": (edit_block(source=None), "config.json: its 'regsurgery' entry"),
    "source a number": (edit_block(source={"id": 5, "sha256": "x"}), "config.json: its 'regsurgery' entry"),
    "layouts of nothing": (edit_block(layouts=[]), "its model cannot be built"),
    "width of gigabytes": (edit_block(width=10**10), "config.json: describes a model of"),
    "registers of nothing": (edit_block(num_registers="many"), "its model cannot be built"),
    "dropout no number": (lambda folder: edit_config(folder, hidden_dropout_prob="much"), "its model cannot be built"),
    "no recipe": (no_recipe, "recipe.yaml"),
    "recipe no text": (lambda folder: (folder / "recipe.yaml").write_bytes(b"\xff\xfe"), "recipe.yaml"),
}


@pytest.mark.parametrize("damage, named", BROKEN_PATCHED.values(), ids=BROKEN_PATCHED)
def test_verify_of_a_broken_folder_whose_sums_are_right(run, patched, tmp_path, damage, named):
    folder = shutil.copytree(patched, tmp_path / "copy")
    damage(folder)
    write_sums(folder)
    assert_refused(run("verify", folder, "-q", *FEW), named)


def test_verify_of_a_folder_with_a_link_out(run, patched, tmp_path):
    folder = shutil.copytree(patched, tmp_path / "copy")
    link_out("preprocessor_config.json")(folder)
    assert_refused(run("verify", folder, "-q", *FEW), folder / "preprocessor_config.json", "a symbolic link to")


HOSTILE = "\"\"\"\n    __import__('os').mkdir('ran')\n{0.__class__} {{ 7 * 7 }} \\"


def test_nothing_of_recipe_and_config_gets_into_the_loader_file(run, model, patched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit_config(model, _name_or_path=HOSTILE, id2label={str(n): HOSTILE for n in range(10)}, **{HOSTILE: HOSTILE})
    data = yaml.safe_load((patched / "recipe.yaml").read_text("utf-8"))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**data, "model": HOSTILE, "provenance": {HOSTILE: HOSTILE}}))
    done = run("patch", model, "--recipe", tmp_path / "mine.yaml", "-q", "-o", tmp_path / "out", *FEW)
    assert (done.code, done.err) == (0, "")
    name = "modeling_regsurgery.py"
    assert (tmp_path / "out" / name).read_bytes() == (patched / name).read_bytes()
    assert "ran" not in (tmp_path / "out" / name).read_text("utf-8").split()
    assert run("verify", tmp_path / "out", "-q", *FEW).code == 0
    assert not (tmp_path / "ran").exists()


# --- what works -----------------------------------------------------------------------------------------------------


def test_patch_and_verify_print_the_contracts_json(run, tmp_path):
    patched = run("patch", "demo", "--json", "-o", tmp_path / "out", *FEW)
    assert (patched.code, patched.err) == (0, "")
    result = json.loads(patched.out)
    assert set(result) == PATCH_KEYS
    assert result["output"] == str(tmp_path / "out")
    assert result["register_neurons"] == {"1": [25, 73], "2": [172]}
    assert set(result["verify"]) >= VERDICT_KEYS
    verified = run("verify", tmp_path / "out", "--json", *FEW)
    assert (verified.code, verified.err) == (0, "")
    verdict = json.loads(verified.out)
    assert set(verdict) >= VERDICT_KEYS
    assert verdict["passed"] is True
    for name in ("outliers_per_image", "max_patch_norm", "median_patch_norm"):
        assert set(verdict[name]) == {"original", "patched"}
    assert verdict["outliers_per_image"]["patched"] < verdict["outliers_per_image"]["original"]


def test_a_dry_run_writes_nothing(run, demo, tmp_path):
    before = everything(demo)
    done = run("patch", demo, "--recipe", "demo", "--dry-run", "--json", "-o", tmp_path / "out", *FEW)
    assert (done.code, json.loads(done.out)["output"]) == (0, None)
    assert everything(tmp_path) == set()
    assert everything(demo) == before


def test_a_patched_folder_has_exactly_the_contracts_files(patched):
    assert sorted(path.name for path in patched.iterdir()) == PARTS


def test_help_is_an_answer():
    done = program("--help")
    assert (done.code, done.err) == (0, "")
    assert "patch" in done.out and "verify" in done.out


@pytest.mark.parametrize("module", ["regsurgery", "regsurgery.cli.app", "regsurgery.recipe", 
                                    "regsurgery.checkpoints.safetensors_file",
                                    "regsurgery.cli.screen", "regsurgery.commands.unpatch",
                                    "regsurgery.commands.diff"])  # fmt: skip
def test_importing_it_does_not_import_torch(module):
    code = f"import {module}, sys; print(sorted({{'torch', 'transformers', 'timm', 'open_clip'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n")
