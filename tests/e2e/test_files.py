"""MODEL is a file, or a folder as a training program leaves it: the same outputs as through the library's own loader.

Every file is made by the library's own save path. The difference to the stock loader is 0.0 throughout.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import load_checkpoint
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn

import regsurgery
from regsurgery.errors import CheckpointError, RegsurgeryError, UserError
from regsurgery.frontends.load import load
from regsurgery.frontends.loaded import Loaded
from regsurgery.options import LoadOptions
from regsurgery.recipe import Recipe
from tests.picos import VIT, _open_clip

RECIPE = Recipe({1: (3,)})
TIMM = "test_vit"  # timm's own model for tests: 160 pixels, 6 blocks of 64
PIXELS = 160
VIT_CONFIG = {**VIT, "intermediate_size": 128, "num_labels": 7}


def moved(model: nn.Module, seed: int = 1) -> nn.Module:
    """`model` with other weights, as after training."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def opened(path: Path, **options: Any) -> Loaded:
    return load(str(path), LoadOptions(allow_pickle=True, **options))


@torch.no_grad()
def difference(loaded: Loaded, stock: nn.Module, side: int) -> float:
    """The largest difference between the outputs of what was loaded and of the library's own model."""
    torch.manual_seed(3)
    images = torch.randn(2, 3, side, side)
    ours, theirs = loaded.call(loaded.model.eval(), images), loaded.call(stock.eval(), images)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


# --- timm -----------------------------------------------------------------------------------------------------------


def timm_model(num_classes: int = 10, **how: Any) -> nn.Module:
    return moved(timm.create_model(TIMM, num_classes=num_classes, **how))


def timm_run(folder: Path, *, ema: bool) -> Path:
    """What timm's train script leaves: `model_best.pth.tar`, by its own saver."""
    folder.mkdir(exist_ok=True)
    model = timm_model()
    averaged = ModelEmaV3(model, decay=0.5) if ema else None
    moved(model, 2)
    if averaged is not None:
        averaged.update(model)
    args = argparse.Namespace(
        model=TIMM, num_classes=10, gp=None, in_chans=3, model_kwargs={}, img_size=None, input_size=None,
        mean=(0.4, 0.4, 0.4), std=None, interpolation="", crop_pct=None, output=str(folder),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    where = {"checkpoint_dir": str(folder), "recovery_dir": str(folder)}
    CheckpointSaver(model, optimizer, args=args, model_ema=averaged, **where).save_checkpoint(0, metric=0.5)  # type: ignore[arg-type]
    return folder / "model_best.pth.tar"


@pytest.mark.parametrize("ema", [None, True, False])
def test_a_timm_run_says_its_architecture_and_its_averaged_weights_are_taken(tmp_path: Path, ema: bool | None) -> None:
    path = timm_run(tmp_path, ema=True)
    stock = timm.create_model(TIMM, num_classes=10)
    load_checkpoint(stock, str(path), use_ema=ema is not False)
    loaded = opened(path, ema=ema)
    assert difference(loaded, stock, PIXELS) == 0.0
    assert loaded.source.converted is not None
    which = "the trained ones, not the averaged" if ema is False else "'state_dict_ema', the averaged ones"
    assert which in "; ".join(loaded.source.converted.notes)
    assert loaded.config["pretrained_cfg"]["mean"] == [0.4, 0.4, 0.4]


def test_a_timm_run_without_averaged_weights_has_none_to_give(tmp_path: Path) -> None:
    path = timm_run(tmp_path, ema=False)
    stock = timm.create_model(TIMM, num_classes=10)
    load_checkpoint(stock, str(path))
    assert difference(opened(path), stock, PIXELS) == 0.0
    with pytest.raises(UserError, match=r"--ema: .*model_best.pth.tar holds no averaged weights"):
        opened(path, ema=True)


def wrapped(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in model.state_dict().items()}


def as_teacher(model: nn.Module) -> Any:
    head = {"dino_head.mlp.0.weight": torch.ones(4, 4), "ibot_head.mlp.0.weight": torch.ones(4, 4)}
    student = wrapped(moved(timm.create_model(TIMM, num_classes=0), 5), "module.backbone.")
    return {"teacher": {**wrapped(model, "backbone."), **head}, "student": student, "epoch": 3}


CONTAINERS: dict[str, Callable[[nn.Module], Any]] = {
    "bare": lambda model: model.state_dict(),
    "model": lambda model: {"model": model.state_dict(), "optimizer": {"state": {}}, "epoch": 1},
    "state_dict": lambda model: {"state_dict": model.state_dict(), "epoch": 1},
    "teacher": as_teacher,
    "module": lambda model: {"state_dict": nn.DataParallel(model).state_dict()},
    "compiled": lambda model: {"model": torch.compile(model).state_dict()},  # type: ignore[attr-defined]
    "compiled-ddp": lambda model: {"model": wrapped(model, "module._orig_mod.")},
    "backbone": lambda model: {**wrapped(model, "backbone."), "decode_head.conv.weight": torch.ones(3)},
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_weights_are_found_wherever_they_are_in_a_file(tmp_path: Path, kind: str) -> None:
    model = timm_model(0 if kind == "teacher" else 10)
    path = tmp_path / "weights.pth"
    torch.save(CONTAINERS[kind](model), path)
    loaded = opened(path, arch=f"timm:{TIMM}")
    assert difference(loaded, model, PIXELS) == 0.0
    assert loaded.config["num_classes"] == (0 if kind == "teacher" else 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_bare_safetensors_file_needs_no_leave_for_pickles(tmp_path: Path, dtype: torch.dtype) -> None:
    model = timm_model()
    path = tmp_path / "weights.safetensors"
    save_file({name: value.to(dtype) for name, value in model.state_dict().items()}, path)
    loaded = load(str(path), LoadOptions(arch=f"timm:{TIMM}"))
    stock = timm.create_model(TIMM, num_classes=10, checkpoint_path=str(path))
    loaded.model.float()
    assert difference(loaded, stock, PIXELS) == 0.0


def test_dinov2s_own_file_is_read_by_timms_rules(tmp_path: Path) -> None:
    """`mask_token`, and a position embedding of another size than the architecture's."""
    model = moved(timm.create_model("vit_small_patch14_dinov2", depth=2, img_size=70))
    path = tmp_path / "dinov2_vits14_pretrain.pth"
    torch.save({**model.state_dict(), "mask_token": torch.zeros(1, 384)}, path)
    with pytest.raises(CheckpointError, match=r"dinov2_vits14_pretrain.pth: its tensors are not those of timm:vit_s"):
        opened(path, arch="timm:vit_small_patch14_dinov2")  # it has 2 blocks


def test_a_patched_file_is_a_folder_of_its_library(tmp_path: Path) -> None:
    path = timm_run(tmp_path / "run", ema=True)
    out = tmp_path / "out"
    regsurgery.patch(str(path), out, recipe=RECIPE, num_images=2, allow_pickle=True)
    source = json.loads((out / "config.json").read_text())["regsurgery"]["source"]
    assert source["file"]["name"] == "model_best.pth.tar"
    assert "the averaged ones (EMA)" in source["file"]["read"]
    assert "Its weights came in the file `model_best.pth.tar`" in (out / "README.md").read_text()
    saved = load_file(out / "model.safetensors")
    averaged = torch.load(path, weights_only=False)["state_dict_ema"]
    assert all(torch.equal(saved[name], averaged[name]) for name in averaged)
    path.rename(tmp_path / "moved")  # the folder alone is enough
    assert regsurgery.verify(out, num_images=2).passed
    (tmp_path / "moved").rename(path)
    assert regsurgery.reproduce(out, allow_pickle=True).identical
    with pytest.raises(CheckpointError, match=r"converted from model_best.pth.tar .*whose own bytes are not here"):
        regsurgery.unpatch(out, tmp_path / "back")


def test_native_mode_of_a_file_is_verified_against_the_file(tmp_path: Path) -> None:
    path, out = timm_run(tmp_path / "run", ema=True), tmp_path / "out"
    how: dict[str, Any] = {"mode": "native", "verification": False, "num_images": 8, "calibrate": False, "ema": False}
    regsurgery.patch(str(path), out, recipe=RECIPE, allow_pickle=True, **how)
    with pytest.raises(CheckpointError, match=r"model_best.pth.tar: pickled weights .* pass --allow-pickle"):
        regsurgery.verify(out, num_images=2)
    assert regsurgery.verify(out, num_images=2, allow_pickle=True).outliers_per_image.original == 0.0


# --- open_clip ------------------------------------------------------------------------------------------------------


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    _open_clip()(tmp_path / "clip")
    return tmp_path / "clip"


def clip_of(folder: Path) -> Any:
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    return moved(model)


@pytest.mark.parametrize("distributed", [False, True])
def test_an_epoch_of_open_clip(clip_folder: Path, tmp_path: Path, distributed: bool) -> None:
    """The dictionary of open_clip's `train.main`."""
    model = clip_of(clip_folder)
    state = wrapped(model, "module.") if distributed else model.state_dict()
    path = tmp_path / "epoch_3.pt"
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {}, "scaler": {}}, path)
    stock = open_clip.create_model(f"local-dir:{clip_folder}", load_weights=False)
    open_clip.load_checkpoint(stock, str(path))  # type: ignore[arg-type]
    assert difference(opened(path, arch=f"open_clip:{clip_folder}"), stock, 64) == 0.0
    regsurgery.patch(
        str(path), tmp_path / "out", recipe=RECIPE, num_images=2, allow_pickle=True, arch=f"open_clip:{clip_folder}"
    )
    assert regsurgery.reproduce(tmp_path / "out", allow_pickle=True).identical


def openai_clip() -> Any:
    """A small model as OpenAI published them: half of it in float16, as TorchScript."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, convert_weights_to_fp16

    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=3, width=64, patch_size=8, image_size=32)
    text = CLIPTextCfg(context_length=8, vocab_size=50, width=64, heads=1, layers=2)
    model = CLIP(32, vision_cfg=vision, text_cfg=text, quick_gelu=True)
    convert_weights_to_fp16(moved(model))
    return model


class Archived(nn.Module):
    """OpenAI's own module has three numbers as buffers besides."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        for name, value in {**dict(model.named_children()), **dict(model.named_parameters(recurse=False))}.items():
            setattr(self, name, value)
        for name, number in (("input_resolution", 32), ("context_length", 8), ("vocab_size", 50)):
            self.register_buffer(name, torch.tensor(number))

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.text_projection.dtype) @ self.text_projection


@pytest.fixture
def openai_archive(tmp_path: Path) -> Path:
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.trace(Archived(openai_clip()), torch.ones(1, 64)).save(str(path))
    return path


def test_an_archive_of_openai_says_all(openai_archive: Path, tmp_path: Path) -> None:
    stock = open_clip.load_openai_model(str(openai_archive), precision="fp32", device="cpu")
    loaded = opened(openai_archive)
    assert loaded.config["model_cfg"]["quick_gelu"] is True
    assert difference(loaded, stock, 32) == 0.0
    regsurgery.patch(str(openai_archive), tmp_path / "out", recipe=RECIPE, num_images=2, allow_pickle=True)


def test_an_archive_that_ends_within_a_number(openai_archive: Path, tmp_path: Path) -> None:
    """Python's unpickler raises a struct.error there."""
    cut = tmp_path / "cut.pt"
    with zipfile.ZipFile(openai_archive) as whole, zipfile.ZipFile(cut, "w") as archive:
        for entry in whole.namelist():
            archive.writestr(entry, b"\x80\x02M\x01" if entry.endswith("/data.pkl") else whole.read(entry))
    with pytest.raises(CheckpointError, match="cannot be read as plain weights"):
        opened(cut)


def test_an_archive_is_read_without_running_it(openai_archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.jit, "load", None)
    opened(openai_archive)


# --- transformers ---------------------------------------------------------------------------------------------------


def vit(seed: int = 1) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return moved(ViTForImageClassification(ViTConfig(**VIT_CONFIG)), seed)


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    vit(0).config.save_pretrained(tmp_path / "config")
    config = json.loads((tmp_path / "config" / "config.json").read_text())
    config["architectures"] = ["ViTForImageClassification"]
    (tmp_path / "config" / "config.json").write_text(json.dumps(config))
    return tmp_path / "config"


@pytest.mark.parametrize("prefix", ["", "module.", "model.net."])
def test_a_file_takes_the_config_of_a_folder(config_dir: Path, tmp_path: Path, prefix: str) -> None:
    model, path = vit(), tmp_path / "weights.ckpt"
    torch.save({"state_dict": {**wrapped(model, prefix), "criterion.weight": torch.ones(7)}}, path)
    loaded = opened(path, arch=f"transformers:{config_dir}")
    assert difference(loaded, model, 64) == 0.0
    regsurgery.patch(
        str(path), tmp_path / "out", recipe=RECIPE, num_images=2, allow_pickle=True, arch=f"transformers:{config_dir}"
    )
    assert regsurgery.reproduce(tmp_path / "out", allow_pickle=True).identical


def test_a_file_in_a_checkpoint_folder_needs_no_architecture(tmp_path: Path) -> None:
    vit(1).save_pretrained(tmp_path)
    other = vit(2)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    assert difference(opened(tmp_path / "other.safetensors"), other, 64) == 0.0


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_sharded_pickles_with_an_index(tmp_path: Path, library: str) -> None:
    from huggingface_hub import save_torch_state_dict

    model = vit() if library == "transformers" else timm_model()
    if library == "transformers":
        model.save_pretrained(tmp_path)
    else:
        timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    (tmp_path / "model.safetensors").unlink()
    save_torch_state_dict(model.state_dict(), tmp_path, safe_serialization=False, max_shard_size="100KB")
    assert (tmp_path / "pytorch_model.bin.index.json").is_file()
    assert difference(opened(tmp_path), model, 64 if library == "transformers" else PIXELS) == 0.0
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/pytorch_model-00001-of-\d+.bin: pickled weights"):
        load(str(tmp_path))
    index = json.loads((tmp_path / "pytorch_model.bin.index.json").read_text())
    del index["metadata"]
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    opened(tmp_path)


def test_an_index_without_metadata_is_accepted(tmp_path: Path) -> None:
    model = vit()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["metadata"]
    path.write_text(json.dumps(index))
    assert difference(load(str(tmp_path)), model, 64) == 0.0
    regsurgery.patch(str(tmp_path), tmp_path.parent / "out", recipe=RECIPE, num_images=2)


@pytest.mark.parametrize("size", ["1GB", "100KB"])
def test_a_variant_is_taken_where_there_is_nothing_else(tmp_path: Path, size: str) -> None:
    model = vit().half()
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    loaded = load(str(tmp_path))
    assert difference(replace_model(loaded), model.float(), 64) == 0.0


def replace_model(loaded: Loaded) -> Loaded:
    loaded.model.float()
    return loaded


@pytest.fixture(scope="module")
def trainer_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder of transformers' Trainer, and the model that it trained."""
    from transformers import Trainer, TrainingArguments

    folder = tmp_path_factory.mktemp("trainer") / "run"
    data = [{"pixel_values": torch.randn(3, 64, 64), "labels": number % 7} for number in range(4)]
    arguments = TrainingArguments(str(folder), max_steps=2, save_steps=1, report_to=[], use_cpu=True, logging_steps=1)
    trainer = Trainer(vit(), arguments, train_dataset=data)  # type: ignore[arg-type]
    trainer.train()
    return folder, trainer.model


def test_a_checkpoint_of_the_trainer(trainer_run: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = trainer_run
    assert (folder / "checkpoint-2" / "optimizer.pt").is_file()
    assert difference(load(str(folder / "checkpoint-2")), model, 64) == 0.0
    assert difference(load(str(folder), LoadOptions(subfolder="checkpoint-2")), model, 64) == 0.0
    with pytest.raises(CheckpointError, match=r"its newest checkpoint is in checkpoint-2/: add --subfolder checkpoint"):
        load(str(folder))
    regsurgery.patch(str(folder), tmp_path / "out", recipe=RECIPE, num_images=2, subfolder="checkpoint-2")
    assert not {path.name for path in (tmp_path / "out").iterdir()} & {"optimizer.pt", "training_args.bin"}


def test_what_an_older_trainer_left_is_read_without_its_state(trainer_run: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = trainer_run
    for path in (folder / "checkpoint-2").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert difference(opened(tmp_path), model, 64) == 0.0


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_pickle_needs_leave_and_the_message_names_the_file(tmp_path: Path) -> None:
    path = timm_run(tmp_path, ema=False)
    with pytest.raises(CheckpointError, match=rf"^{path}: pickled weights .* pass --allow-pickle"):
        load(str(path))


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (None, "does not say its architecture, and has no config next to it; add --arch timm:NAME"),
        ("vit_tiny", "--arch vit_tiny: must be timm:NAME"),
        ("tim:vit", "did you mean 'timm'"),
        ("open_clip:/", "^/: has no config.json or open_clip_config.json"),
        ("timm:" + "a" * 5000, r"a\.\.\.: has a name of 5000 bytes in it; must be timm:NAME"),
        ("timm:test_vti", "did you mean 'test_vit'"),
        ("open_clip:ViT-B-23", "did you mean 'ViT-B-32'"),
        ("timm:test_vit2", "its tensors are not those of timm:test_vit2: Error"),
        ("transformers:no-such/config", "--arch transformers:no-such/config: no such file or folder"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, arch: str | None, message: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(timm_model().state_dict(), path)
    with pytest.raises(RegsurgeryError, match=message) as refused:
        opened(path, arch=arch)
    assert "\n" not in str(refused.value)


def test_a_file_of_two_models_asks_which(tmp_path: Path) -> None:
    first, second = timm_model(), moved(timm_model(), 9)
    path = tmp_path / "both.pth"
    torch.save({**wrapped(first, "online."), **wrapped(second, "target.")}, path)
    with pytest.raises(UserError, match=r"holds several models, under online\. and target\.; choose one with --prefix"):
        opened(path, arch=f"timm:{TIMM}")
    assert difference(opened(path, arch=f"timm:{TIMM}", prefix="target"), second, PIXELS) == 0.0


def test_options_of_files_are_refused_for_folders(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--arch and --prefix are for a weights file"):
        load(str(tmp_path), LoadOptions(arch="timm:test_vit"))
    with pytest.raises(UserError, match=r"--ema: .*holds one set of weights"):
        load(str(tmp_path), LoadOptions(ema=True))
    with pytest.raises(UserError, match=r"--revision v1: is for repositories on the Hub, and .* is here; leave it out"):
        load(str(tmp_path), LoadOptions(revision="v1"))
    with pytest.raises(UserError, match=r"--subfolder inner: .*model.safetensors is a file"):
        load(str(tmp_path / "model.safetensors"), LoadOptions(subfolder="inner"))


def test_damaged_weights_are_named_by_the_file_that_was_given(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    model = timm_model()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float("nan")
    torch.save(model.state_dict(), path)
    with pytest.raises(CheckpointError, match=rf"^{path}: tensor .* holds NaN"):
        opened(path, arch=f"timm:{TIMM}")


# --- the way that docs/checkpoints.md shows -------------------------------------------------------------------------


def commands(section: str) -> list[list[str]]:
    """The commands of a section of the page."""
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text("utf-8")
    body = text.split(f"## {section}\n")[1].split("\n## ")[0]
    return [line.split()[1:] for line in body.splitlines() if line.startswith("regsurgery patch ")]


@pytest.fixture
def as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]) -> Callable[[str], None]:
    """Runs the commands of a section, with a recipe and few pictures, since a search takes minutes."""
    from tests.unit.test_docs import write_noise

    (tmp_path / "photos").mkdir()
    write_noise(tmp_path / "photos", 4)
    (tmp_path / "few.yaml").write_text(RECIPE.to_yaml())
    monkeypatch.chdir(tmp_path)

    def run_section(section: str) -> None:
        found = commands(section)
        assert found
        for command in found:
            done = run(*command, "--recipe", "few.yaml", "-q")
            assert done.code == 0, done.err

    return run_section


def test_the_way_from_timm(as_documented: Callable[[str], None], tmp_path: Path) -> None:
    timm_run(tmp_path, ema=True)
    as_documented("I fine-tuned with timm")


def test_the_way_from_the_trainer(
    as_documented: Callable[[str], None], trainer_run: tuple[Path, Any], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-500").symlink_to(trainer_run[0] / "checkpoint-2")
    as_documented("I fine-tuned with transformers' Trainer")


@pytest.mark.slow
def test_the_way_from_lightning(as_documented: Callable[[str], None], tmp_path: Path) -> None:
    """Lightning's own file is in `test_training_libraries.py`; here its layout, for a model as large as the page's."""
    model = timm.create_model("vit_tiny_patch16_224")
    torch.save({"state_dict": wrapped(model, "net."), "pytorch-lightning_version": "2.6.0"}, tmp_path / "last.ckpt")
    as_documented("I fine-tuned with Lightning")


# --- names on disk that differ from those in memory -----------------------------------------------------------------


def renamed(folder: Path, rename: Callable[[str], str], name: str = "model.safetensors") -> Path:
    state = {rename(old): value for old, value in load_file(folder / name).items()}
    save_file(state, folder / name, metadata={"format": "pt"})
    return folder


def as_published(name: str) -> str:
    return name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")


@pytest.fixture
def deit3(tmp_path: Path) -> nn.Module:
    model = moved(timm.create_model("deit3_small_patch16_224", depth=3, img_size=64, num_classes=5))
    timm.models.save_for_hf(model, str(tmp_path / "deit3"), safe_serialization=True)
    return model


@pytest.mark.parametrize("mode", ["shift", "bias"])
def test_a_deit3_folder_with_its_first_names(deit3: nn.Module, tmp_path: Path, mode: str) -> None:
    folder = renamed(tmp_path / "deit3", as_published)
    assert difference(load(str(folder)), deit3, 64) == 0.0
    regsurgery.patch(str(folder), tmp_path / "out", recipe=RECIPE, num_images=2, mode=mode)
    assert regsurgery.verify(tmp_path / "out", num_images=2).passed
    with pytest.raises(CheckpointError, match=r"converted from model.safetensors .*the source was the folder"):
        regsurgery.unpatch(tmp_path / "out", tmp_path / "back")


def test_a_deit3_file_with_its_first_names(tmp_path: Path) -> None:
    model = moved(timm.create_model("deit3_small_patch16_224", num_classes=5))
    path = tmp_path / "deit_3_small.pth"
    torch.save({"model": {as_published(name): value for name, value in model.state_dict().items()}}, path)
    assert difference(opened(path, arch="timm:deit3_small_patch16_224"), model, 224) == 0.0


def test_a_folder_with_facebooks_names_of_registers(tmp_path: Path) -> None:
    """What timm calls `reg_token`; a position of the class token besides, and a mask token that timm drops."""
    model = moved(timm.create_model("vit_small_patch14_reg4_dinov2", depth=3, img_size=56))
    folder = tmp_path / "dinov2"
    arguments = {"depth": 3, "img_size": 56}
    timm.models.save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    state = renamed(folder, lambda name: name.replace("reg_token", "register_tokens")) / "model.safetensors"
    tensors = load_file(state)
    tensors["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), tensors["pos_embed"]], dim=1)
    save_file({**tensors, "mask_token": torch.zeros(1, 384)}, state)
    stock = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert difference(load(str(folder)), stock, 56) == 0.0
    regsurgery.patch(str(folder), tmp_path / "out", recipe=RECIPE, num_images=2, verification=False)


@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_a_folder_of_a_wrapped_model(clip_folder: Path, tmp_path: Path, library: str) -> None:
    folder, name = clip_folder, "open_clip_model.safetensors"
    if library == "timm":
        folder, name = tmp_path / "timm", "model.safetensors"
        timm.models.save_for_hf(timm_model(), str(folder), safe_serialization=True)
    stock = load(str(folder)).model
    renamed(folder, lambda name: f"module.{name}", name)
    assert difference(load(str(folder)), stock, PIXELS if library == "timm" else 64) == 0.0
    regsurgery.patch(str(folder), tmp_path / "out", recipe=RECIPE, num_images=2)


def test_a_wrapped_model_of_transformers_is_read_as_a_file(tmp_path: Path) -> None:
    """The stock loader would make up all of its weights."""
    model = vit()
    model.save_pretrained(tmp_path)
    renamed(tmp_path, lambda name: f"module.{name}")
    with pytest.raises(CheckpointError, match=r"it has 'module\.classifier\.bias': give that file itself as MODEL"):
        load(str(tmp_path))
    assert difference(load(str(tmp_path / "model.safetensors")), model, 64) == 0.0


def test_a_base_model_from_the_folder_of_a_classifier(tmp_path: Path) -> None:
    from transformers import ViTModel

    folder = tmp_path / "vit"
    vit().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["ViTModel"]
    (folder / "config.json").write_text(json.dumps(config))
    assert difference(load(str(folder)), ViTModel.from_pretrained(folder, add_pooling_layer=False), 64) == 0.0
    regsurgery.patch(str(folder), tmp_path / "out", recipe=RECIPE, num_images=2)
    restored = regsurgery.unpatch(tmp_path / "out", tmp_path / "back")
    assert "model.safetensors" in restored.files  # every byte, the classifier included
