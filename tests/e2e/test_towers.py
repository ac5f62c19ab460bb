"""Towers that are searched: models on no list, several towers, other channels, and what a written folder must do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import regsurgery
from regsurgery.backends import modeling
from regsurgery.errors import CheckpointError, SeveralStreamsError, UnsupportedModelError, VerificationError
from regsurgery.frontends.load import load
from regsurgery.frontends.processors import preprocessing
from regsurgery.frontends.towers import Tower, towers
from regsurgery.models import open_model
from regsurgery.options import LoadOptions
from regsurgery.recipe import Recipe
from tests.commands import Done
from tests.conftest import tiered
from tests.odd import modeling_odd
from tests.picos import LLAVA, VIT, WIDTH, _transformers, by_id

Run = Callable[..., Done]
RECIPE = Recipe({1: (5,)})
SQUARE = {"height": 64, "width": 64}
FRESH = """\
import sys
import torch
from transformers import AutoModel

found = []
for folder, inputs in torch.load(sys.argv[1]):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        found.append(dict(model(**inputs)))
assert "regsurgery" not in sys.modules
torch.save(found, sys.argv[1] + ".found")
"""


def write_odd(folder: Path, name: str, *, named: bool = True, **config: object) -> torch.nn.Module:
    """A checkpoint with code of its own; `named`: its config has `architectures`."""
    torch.manual_seed(0)
    model = getattr(modeling_odd, name)(modeling_odd.OddConfig(**config)).eval()
    model.save_pretrained(folder)
    shutil.copyfile(str(modeling_odd.__file__), folder / "modeling_odd.py")
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "modeling_odd.OddConfig", "AutoModel": f"modeling_odd.{name}"}
    if not named:
        del settings["architectures"]
    (folder / "config.json").write_text(json.dumps(settings))
    return model


def same_but_for_registers(source: Path, patched: Path) -> str:
    """The name of the one tensor that `patched` has in addition; all others are as in `source`."""
    before, after = (load_file(folder / "model.safetensors") for folder in (source, patched))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    (added,) = after.keys() - before.keys()
    return added


ODD = {  # model -> its class, config, and the tensor that is added
    "pre-norm and a custom head": ("OddRater", {}, "eyes.register_tokens"),
    "a tower two levels down": ("OddCaptioner", {}, "core.eyes.register_tokens"),
    "registers of its own": ("OddRater", {"kept": 4}, "eyes.test_time_registers"),
    "one channel": ("OddRater", {"channels": 1}, "eyes.register_tokens"),
    "four channels": ("OddRater", {"channels": 4}, "eyes.register_tokens"),
}


@dataclass(frozen=True)
class Reloaded:
    """A model, its patched folder, and what both return, the patched one in a process without regsurgery."""

    folder: Path
    out: Path
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reloaded]:
    """Every model of `ODD`, patched with and without verification, with and without `architectures`."""
    place = tmp_path_factory.mktemp("odd")
    jobs, befores = [], []
    for number, (architecture, config, _) in enumerate(ODD.values()):
        folder = place / str(number)
        stock = write_odd(folder, architecture, named=number % 2 == 0, **config)
        out = place / f"{number}-patched"
        regsurgery.patch(
            str(folder), out, recipe=RECIPE, trust_remote_code=True, verification=number == 0, num_images=4
        )
        images = torch.randn(3, stock.config.channels, 64, 64, generator=torch.Generator().manual_seed(0))
        inputs = {stock.main_input_name: images}
        if architecture == "OddCaptioner":
            inputs = {"input_ids": torch.tensor([[1, 2, 3]]).repeat(3, 1), "pixel_values": images}
        with torch.no_grad():
            befores.append(stock(**inputs))
        jobs.append((str(out), inputs))
    torch.save(jobs, place / "jobs")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(place / "jobs")], capture_output=True, text=True, check=False, cwd=place,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(place / "modules"), "HOME": str(place)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    afters = torch.load(place / "jobs.found")
    return {
        name: Reloaded(place / str(number), place / f"{number}-patched", befores[number], afters[number])
        for number, name in enumerate(ODD)
    }


@pytest.mark.parametrize("name", ODD)
def test_a_model_that_is_on_no_list(name: str, odd: dict[str, Reloaded]) -> None:
    found = odd[name]
    assert same_but_for_registers(found.folder, found.out) == ODD[name][2]
    assert {key: value.shape for key, value in found.before.items()} == {
        key: value.shape for key, value in found.after.items()
    }
    assert any(not torch.equal(found.before[key], found.after[key]) for key in found.before)


def test_a_folder_with_code_of_its_own_is_verified_on_trust_only(odd: dict[str, Reloaded], run: Run) -> None:
    out = odd["registers of its own"].out
    refused = run("verify", out, "--num-images", "2")
    assert refused.code == 2 and "allow it with --trust-remote-code" in refused.err
    assert run("verify", out, "--num-images", "2", "--trust-remote-code").code == 0


def test_code_of_a_checkpoint_is_not_run_without_trust(odd: dict[str, Reloaded], run: Run, tmp_path: Path) -> None:
    for name in ("pre-norm and a custom head", "a tower two levels down"):  # with and without `architectures`
        done = run("patch", odd[name].folder, "-o", tmp_path / "out")
        assert done.code == 2 and "is code that comes with the checkpoint; pass --trust-remote-code" in done.err


# --- several streams -------------------------------------------------------------------------------------------------


def write_crossvit(folder: Path) -> Path:
    """Timm's model of two streams that exchange their class tokens, small."""
    import timm

    torch.manual_seed(0)
    args = {"img_size": 48, "img_scale": (1.0, 1.0), "patch_size": (8, 12), "embed_dim": (32, 64), "num_heads": (2, 2),
            "depth": ((1, 2, 0),), "mlp_ratio": (2, 2, 1)}  # fmt: skip
    model = timm.create_model("crossvit_tiny_240", num_classes=10, **args)
    timm.models.save_for_hf(model, folder, model_args=args, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 48, 48]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_of_two_streams_none_is_patched_silently(run: Run, tmp_path: Path) -> None:
    folder, out = write_crossvit(tmp_path / "model"), tmp_path / "out"
    done = run("find", folder)
    paths = "--tower blocks.0.blocks.0.0 or --tower blocks.0.blocks.1"
    assert done.code == 2 and f"2 streams of tokens match; name the one to patch: {paths}" in done.err
    done = run("find", folder, "--tower", "blocks.0.block")
    assert done.code == 2 and "CrossVit has no such module; did you mean 'blocks.0.blocks'?" in done.err
    done = run("find", folder, "--tower", "norm")
    assert done.code == 2 and "--tower norm holds no stream of tokens; there are some in" in done.err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.to_yaml())
    command = ("patch", folder, "-o", out, "--recipe", recipe, "--num-images", "2")
    done = run(*command, "--tower", "blocks.0.blocks.1")
    assert done.code == 0 and "tower: blocks.0.blocks.1, as named; every other stream of tokens stays" in done.err
    assert same_but_for_registers(folder, out) == "register_tokens"
    block = json.loads((out / "config.json").read_text())["regsurgery"]
    assert block["tower"] == "blocks.0.blocks.1"
    assert block["layouts"][0]["insert"].startswith("blocks.0.blocks.1.")
    assert run("verify", out, "--num-images", "2").code == 0  # the tower is in the folder
    assert run("reproduce", out, "-o", tmp_path / "again").code == 0


def write_video_llava(folder: Path) -> Path:
    """Two towers beside a language model: one of images, one of videos."""
    tower = {**VIT, "model_type": "clip_vision_model", "intermediate_size": 2 * WIDTH}
    _transformers(
        "VideoLlavaForConditionalGeneration", "VideoLlavaConfig", vision_config=tower, text_config=LLAVA["text_config"],
        image_token_index=99, video_token_index=98,
    )(folder)  # fmt: skip
    return folder


def test_of_two_towers_none_is_patched_silently(tmp_path: Path) -> None:
    folder = write_video_llava(tmp_path / "model")
    with pytest.raises(SeveralStreamsError, match=r"--tower model\.image_tower or --tower model\.video_tower"):
        open_model(str(folder), LoadOptions())
    located = open_model(str(folder), LoadOptions(tower="model.video_tower"))
    assert located.loaded.entry == located.sites.tower_path == "model.video_tower"


def write_depth_pro(folder: Path) -> Path:
    """A tower for the whole image and one for its patches."""
    tower = {**VIT, "model_type": "dinov2"}
    _transformers(
        "DepthProForDepthEstimation", "DepthProConfig", image_model_config=tower, patch_model_config=tower,
        fov_model_config=tower, patch_size=64, fusion_hidden_size=16, intermediate_hook_ids=[1, 0],
        intermediate_feature_dims=[16, 16], scaled_images_ratios=[0.5, 1], scaled_images_overlap_ratios=[0.0, 0.2],
        scaled_images_feature_dims=[16, 16], use_fov_model=False,
    )(folder)  # fmt: skip
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "named", "other"),
    [
        (write_video_llava, "model.image_tower", "model.video_tower"),
        (write_depth_pro, "depth_pro.encoder.patch_encoder.model", "depth_pro.encoder.image_encoder.model"),
    ],
    ids=["Video-LLaVA", "Depth Pro"],
)
def test_the_named_tower_is_patched_and_the_other_stays(
    write: Callable[[Path], Path], named: str, other: str, tmp_path: Path
) -> None:
    folder, out = write(tmp_path / "model"), tmp_path / "out"
    with pytest.raises(SeveralStreamsError, match=rf"--tower {named}\b"):
        open_model(str(folder), LoadOptions())
    assert regsurgery.patch(str(folder), out, recipe=RECIPE, num_images=2, tower=named).verdict.passed  # type: ignore[union-attr]
    added = same_but_for_registers(folder, out)
    assert added.endswith("register_tokens")
    stock, patched = load(str(folder)).model, regsurgery.load(out)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        pairs = [[model.get_submodule(path)(images)[0] for model in (stock, patched)] for path in (named, other)]
    assert pairs[0][0].shape == pairs[0][1].shape and not torch.equal(*pairs[0])
    assert torch.equal(*pairs[1])


# --- whole or nothing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["does not load", "does not run", "has other values", "has other shapes"])
def test_without_verification_a_broken_folder_is_not_written(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The written model is loaded and run before its folder gets its name."""
    damage = {
        "does not load": "def operate(*args, **kwargs): raise ValueError('damaged')",
        "does not run": "def insert_registers(*args): raise RuntimeError('damaged')",
        "has other values": "def signed_peak(values_BTK): return 3 + values_BTK.amax(dim=1, keepdim=True)",
        "has other shapes": "def strip_registers(x, *args): return x",
    }
    by_id("hf-vit").build(tmp_path / "model")
    source = modeling.modeling_source

    def damaged(host: object, tail: str = "") -> str:
        return source(host, f"\n\n{damage[kind]}\n{tail}")  # type: ignore[arg-type]

    monkeypatch.setattr("regsurgery.backends.transformers.modeling_source", damaged)
    with pytest.raises(VerificationError, match=r"the written model (cannot be (loaded|run)|is broken)"):
        regsurgery.patch(str(tmp_path / "model"), tmp_path / "out", recipe=RECIPE, verification=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_pooler_that_the_weights_lack_is_left_out(tmp_path: Path) -> None:
    """DINO's checkpoints say ViTModel and have no pooler; the stock class makes up a random one."""
    import transformers

    settings = transformers.ViTConfig(**VIT, intermediate_size=2 * WIDTH)
    transformers.ViTModel(settings, add_pooling_layer=False).save_pretrained(tmp_path / "model")
    regsurgery.patch(str(tmp_path / "model"), tmp_path / "out", recipe=RECIPE, verification=False)
    assert same_but_for_registers(tmp_path / "model", tmp_path / "out") == "register_tokens"


def test_a_tensor_that_nothing_uses_is_carried_over(tmp_path: Path) -> None:
    by_id("hf-vit").build(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(path), "left.over": torch.ones(3)}, path, metadata={"format": "pt"})
    regsurgery.patch(str(tmp_path / "model"), tmp_path / "out", recipe=RECIPE, verification=False)
    assert same_but_for_registers(tmp_path / "model", tmp_path / "out") == "register_tokens"
    assert load_file(tmp_path / "out" / "model.safetensors")["left.over"].tolist() == [1, 1, 1]


# --- the search ------------------------------------------------------------------------------------------------------


def test_the_search_takes_less_than_three_seconds_on_llava() -> None:
    import transformers

    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) > 6e9
    started = time.process_time()
    (tower,) = towers(model)
    assert time.process_time() - started < 3
    assert (tower.path, tower.pixels, tower.image_size) == ("model.vision_tower", "pixel_values", (336, 336))
    assert (tower.channels, tower.frames) == (3, 0)


PROCESSORS = {  # class -> its settings, and what the tower takes
    "tiles, the whole picture first": (
        "LlavaNextImageProcessor",
        {"size": {"shortest_edge": 64}, "crop_size": SQUARE, "image_grid_pinpoints": [[64, 128], [128, 64]]},
    ),
    "tiles in a row": ("GotOcr2ImageProcessor", {"size": SQUARE, "crop_to_patches": True, "max_patches": 4}),
    "tiles and a longest edge": (
        "Idefics3ImageProcessor",
        {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 64}},
    ),
    "any aspect": ("DPTImageProcessor", {"size": SQUARE, "ensure_multiple_of": 16, "keep_aspect_ratio": True}),
    "no crop": ("CLIPImageProcessor", {"size": {"shortest_edge": 64}, "do_center_crop": False}),
    "as large as the picture": ("ViTImageProcessor", {"do_resize": False}),
    "boxes wanted": ("VitPoseImageProcessor", {"size": SQUARE}),
    "grey pictures": ("ViTImageProcessor", {"size": SQUARE, "image_mean": [0.5], "image_std": [0.5]}),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PROCESSORS)
def test_what_processors_return_becomes_one_image_a_picture(name: str, channels: int, tmp_path: Path) -> None:
    import transformers

    cls, settings = PROCESSORS[name]
    getattr(transformers, cls)(**settings).save_pretrained(tmp_path)
    tower = Tower("", torch.nn.Identity(), "pixel_values", (64, 64), channels, 0)
    made_of = preprocessing(tmp_path, tower, torch.float32, LoadOptions())
    pictures = [Image.new("RGB", size, color) for size, color in (((90, 60), "red"), ((60, 90), "white"))]
    pixels = made_of.at(None)(pictures)
    assert made_of.image_size == (64, 64) and pixels.shape == (2, channels, 64, 64) and pixels.isfinite().all()
    assert pixels[1].mean() > pixels[0].mean()


NO_IMAGES = {
    "Qwen2VLImageProcessor": {"min_pixels": 3136, "max_pixels": 99999},
    "Siglip2ImageProcessor": {"max_num_patches": 64},
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_a_processor_that_makes_no_images_is_refused_by_its_keys(name: str, tmp_path: Path) -> None:
    settings = {"image_processor_type": name, **NO_IMAGES[name]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    tower = Tower("", torch.nn.Identity(), "pixel_values", (64, 64), 3, 0)
    keys = ", ".join(f"'{key}'" for key in settings)
    message = (
        rf"preprocessor_config.json: {name} with its {keys} makes no images of 64x64 pixels, which the model takes"
    )
    with pytest.raises(CheckpointError, match=message) as refused:
        preprocessing(tmp_path, tower, torch.float32, LoadOptions())
    assert "\n" not in str(refused.value) and "remove the file" in str(refused.value)


TIMM, OPEN_CLIP = ("timm-vit-mean", "config.json"), ("open-clip-no-ln-pre", "open_clip_config.json")
BAD_KEYS = (
    (*TIMM, "pretrained_cfg", {"input_size": None}, "'input_size' is None; correct it to"),
    (*TIMM, "pretrained_cfg", {"interpolation": "best"}, "'interpolation' is 'best', which timm does not know"),
    (*OPEN_CLIP, "preprocess_cfg", {"resize_mode": "fit"}, "'resize_mode' is 'fit', which open_clip does not know; "
     "correct it to one of shortest, longest, squash"),
)  # fmt: skip


@pytest.mark.parametrize(("pico", "file", "entry", "change", "message"), BAD_KEYS)
def test_broken_preprocessing_is_named_by_its_key(
    pico: str, file: str, entry: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    by_id(pico).build(tmp_path)
    config = json.loads((tmp_path / file).read_text())
    config[entry] |= change
    (tmp_path / file).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{file}: {message}"):
        load(str(tmp_path))


# --- refusals --------------------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
        "patch_size": 16}  # fmt: skip
REFUSED = {
    "VitDetModel": (
        {**WIDE, "pretrain_image_size": 32, "window_block_indices": [0], "window_size": 1, "intermediate_size": None},
        r"the token stream has 4 dimensions|the stream of the blocks in encoder.layer is broken",
    ),
    "YolosModel": (
        {**WIDE, "image_size": [32, 32], "num_detection_tokens": 3, "use_mid_position_embeddings": False},
        r"tokens that do not depend on the image come after patches \(rows \[0, 5, 6, 7\]\)",
    ),
    "MLCDVisionModel": (WIDE, r"has values for 5 tokens, such as positions, and none for a register"),
    "TimesformerModel": ({**WIDE, "num_frames": 2}, r"the stream of the blocks in encoder.layer is broken"),
    "SiglipTextModel": (
        {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "vocab_size": 99,
        },
        r"neither SiglipTextModel nor a module of it takes images",
    ),
}


@pytest.mark.parametrize("name", tiered(REFUSED, ("YolosModel", "MLCDVisionModel", "SiglipTextModel")))
def test_a_refusal_says_what_was_seen(name: str, tmp_path: Path) -> None:
    config, seen = REFUSED[name]
    config = {key: value for key, value in config.items() if value is not None}
    _transformers(name, name.removesuffix("Model") + "Config", **config)(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=seen):
        regsurgery.patch(str(tmp_path / "model"), tmp_path / "out", recipe=RECIPE, verification=False)
    assert not (tmp_path / "out").exists()
