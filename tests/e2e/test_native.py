"""Native mode: stock libraries, in a process without regsurgery, load weights that do what the shift does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModel

import regsurgery
from regsurgery.cli.app import main
from regsurgery.compiler.modes.native import _checked_on
from regsurgery.emit.run_record import RUN_RECORD_NAME
from regsurgery.errors import CheckpointError, RecipeError, UnsupportedModelError, UserError, VerificationError
from regsurgery.frontends.load import load
from regsurgery.images.image_set import ImageSet, image_set
from regsurgery.progress import Progress
from regsurgery.recipe import Recipe, find_recipe, parse_recipe
from tests.conftest import Done, Planted, build_planted, tiered
from tests.e2e.test_families import hosts_of
from tests.e2e.test_native_real import in_stock_libraries
from tests.e2e.test_reload import transformers_4_python
from tests.photos import write_photos
from tests.picos import CLIP_VISION, CORE, PICOS, VIT, Pico, _open_clip, _timm, _transformers
from tests.planting import plant_only, random_counts
from tests.reference import outlier_patches

# --- planted ground truth -------------------------------------------------------------------------------------------

# Where an output is all that a host of another library has of the source's.
HOSTS = {"timm": ("timm", "transformers"), "open_clip": ("open_clip", "timm"), "transformers": ("transformers", "timm")}


@pytest.mark.parametrize("pico", [*CORE, *(p for p in PICOS if p.id == "timm-reg4")], ids=lambda pico: pico.id)
def test_every_planted_model_in_every_host_that_can_hold_it(
    pico: Pico, planted_picos: Callable[[Pico], Planted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A random head over the mean of few patches does not survive the loss of its outliers; that is not the point here.
    monkeypatch.setattr("regsurgery.verification.measure.MIN_COSINE_OUTPUT", -1.0)
    planted = planted_picos(pico)
    recipe = Recipe({block: tuple(neurons) for block, neurons in planted.neurons.items()})
    written = []
    for fmt in HOSTS[planted.loaded.library]:
        try:
            result = regsurgery.patch(
                str(planted.folder), tmp_path / fmt, recipe=recipe, mode="native", calibrate=False, format=fmt,
                num_images=16,
            )  # fmt: skip
        except UnsupportedModelError as error:
            assert "native mode" in str(error)
            assert not (tmp_path / fmt).exists()
            continue
        written.append(fmt)
        assert result.verdict.outliers_per_image.original > 1
        assert result.verdict.outliers_per_image.patched <= 0.1 * result.verdict.outliers_per_image.original
        assert 0 <= result.verdict.parity_max_abs < 2e-3
        assert not (tmp_path / fmt / "modeling_regsurgery.py").exists()
        if fmt == "timm":
            transformers_opens_it_too(tmp_path / fmt)
        if len(written) == 1:
            again = regsurgery.verify(tmp_path / fmt, num_images=16)
            assert again.passed
            patched = result.verdict.outliers_per_image.patched
            assert again.outliers_per_image.patched == pytest.approx(patched, abs=0.2)
            assert again.cosine_output == pytest.approx(result.verdict.cosine_output, abs=2e-3)
    assert set(written) == hosts_of(planted) & set(HOSTS[planted.loaded.library])


@torch.no_grad()
def transformers_opens_it_too(folder: Path) -> None:
    """Stock transformers has timm's tower of `folder` in a `TimmWrapperModel`."""
    tower, wrapper = timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), AutoModel.from_pretrained(folder)
    images = torch.randn(2, 3, *tower.patch_embed.img_size)
    assert torch.equal(wrapper.eval()(images).last_hidden_state, tower.forward_features(images))


WIDE = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "image_size": 96, "patch_size": 8}
KINDS = {
    "gelu": ("Dinov2Model", "Dinov2Config", {**WIDE}),
    "swiglu": ("Dinov2Model", "Dinov2Config", {**WIDE, "use_swiglu_ffn": True}),
    "quickgelu": ("CLIPVisionModel", "CLIPVisionConfig", {**CLIP_VISION, **WIDE}),
}


@pytest.mark.parametrize(("kind", "seed"), tiered([("gelu", 1), ("swiglu", 0), ("quickgelu", 0)], [("swiglu", 0)]))
def test_planted_sets_are_gone_or_the_margin_is_too_small(kind: str, seed: int, tmp_path: Path) -> None:
    architecture, config_class, config = KINDS[kind]
    _transformers(architecture, config_class, **config)(tmp_path / "model")
    neurons = plant_only(tmp_path / "model", random_counts(seed, 6), seed)
    try:
        result = regsurgery.patch(
            tmp_path / "model", tmp_path / "out", recipe=Recipe(neurons), mode="native", calibrate=False, num_images=48
        )
    except UnsupportedModelError as error:
        assert "margin" in str(error)
        pytest.fail(f"a margin error is allowed, but none was seen when this was written: {error}")
    assert result.verdict.outliers_per_image.original > 1
    assert result.verdict.outliers_per_image.patched <= 0.05


@pytest.mark.parametrize(
    ("architecture", "fmt"), [("DeiTForImageClassification", "timm"), ("DeiTModel", "transformers")]
)
def test_a_distillation_token_becomes_a_register_of_its_own(architecture: str, fmt: str, tmp_path: Path) -> None:
    # Its class token starts as zeros, whose norm is all eps: timm has no 1e-12.
    config = {**WIDE, "image_size": 64, "num_labels": 10, "layer_norm_eps": 1e-6}
    _transformers(architecture, "DeiTConfig", **config, intermediate_size=256)(tmp_path / "model")
    neurons = plant_only(tmp_path / "model", {1: 2, 3: 1}, 0)
    result = regsurgery.patch(
        str(tmp_path / "model"), tmp_path / "out", recipe=Recipe(neurons), mode="native", calibrate=False, format=fmt
    )
    assert result.verdict.outliers_per_image.patched <= 0.05 < 1 < result.verdict.outliers_per_image.original
    assert result.verdict.parity_max_abs < 1e-4
    assert regsurgery.verify(tmp_path / "out", num_images=8).passed


TOWERS = {
    "deit3": (_timm("deit3_small_patch16_224", init_values=1.0), ("timm", "transformers")),
    "siglip": (_timm("vit_base_patch16_siglip_224", num_classes=0), ("timm",)),
    "reg4": (_timm("vit_tiny_patch16_224", reg_tokens=4), ("timm", "transformers")),
    "open_clip over timm": (
        _open_clip(timm_model_name="test_vit", timm_pool="token", image_size=160),
        ("open_clip", "timm"),
    ),
}


@pytest.mark.parametrize("name", tiered(TOWERS, ["siglip"]))
def test_other_towers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regsurgery.verification.measure.MIN_COSINE_OUTPUT", -1.0)
    build, hosts = TOWERS[name]
    planted = build_planted(Pico(name, build, "", "", ""), tmp_path / "model")
    recipe = Recipe({block: tuple(neurons) for block, neurons in planted.neurons.items()})
    for fmt in hosts:
        result = regsurgery.patch(
            str(tmp_path / "model"), tmp_path / fmt, recipe=recipe, mode="native", calibrate=False, format=fmt,
            num_images=16,
        )  # fmt: skip
        assert result.verdict.outliers_per_image.patched <= 0.05 < 1 < result.verdict.outliers_per_image.original
        assert regsurgery.verify(tmp_path / fmt, num_images=8).passed


@pytest.mark.parametrize("fmt", tiered(["transformers", "timm"], ["timm"]))
def test_a_position_embedding_of_another_size_than_the_images(fmt: str, tmp_path: Path) -> None:
    """As DINOv2 has it: made for 518 px, run at 224; hosts interpolate differently, but keep the embedding whole."""
    _transformers("Dinov2Model", "Dinov2Config", **WIDE)(tmp_path / "model")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    neurons = plant_only(tmp_path / "model", {1: 2, 3: 1}, 0)
    result = regsurgery.patch(
        str(tmp_path / "model"), tmp_path / "out", recipe=Recipe(neurons), mode="native", calibrate=False, format=fmt
    )
    assert result.verdict.outliers_per_image.patched <= 0.05 < 1 < result.verdict.outliers_per_image.original
    assert 0 < result.verdict.parity_max_abs < 1e-4
    name = {"transformers": "embeddings.position_embeddings", "timm": "pos_embed"}[fmt]
    assert load_file(tmp_path / "out" / "model.safetensors")[name].shape[1] == 1 + (fmt == "timm") + 12 * 12
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("model", "out"))
    assert torch.equal(before["embeddings.position_embeddings"][:, -144:], after[name][:, -144:])


def test_a_host_that_computes_something_else_fails_verification(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regsurgery.backends import canonical

    query = canonical.VIT_BLOCK["attn.q"]
    monkeypatch.setitem(canonical.VIT_BLOCK, "attn.q", canonical.VIT_BLOCK["attn.v"])
    monkeypatch.setitem(canonical.VIT_BLOCK, "attn.v", query)
    with pytest.raises(VerificationError, match="differs from the patched graph"):
        regsurgery.patch(
            str(demo_folder), tmp_path / "out", recipe="demo", mode="native", calibrate=False, num_images=8
        )
    assert list(tmp_path.iterdir()) == []


# --- what a folder is -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("pictures") / "photos", 32, 7)


@pytest.fixture(scope="module")
def demo_native(demo_folder: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "out"
    regsurgery.patch(str(demo_folder), folder, recipe="demo", mode="native", images=pictures)
    return folder


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(
    demo_folder: Path, demo_native: Path, pictures: Path, tmp_path: Path
) -> None:
    regsurgery.patch(str(demo_folder), tmp_path / "out", recipe="demo", mode="native", images=pictures)
    names = sorted(path.name for path in demo_native.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [name for name in names if (demo_native / name).read_bytes() != (tmp_path / "out" / name).read_bytes()] == []


def test_calibration_pays_on_images_that_it_has_not_seen(
    demo_folder: Path, demo_native: Path, pictures: Path, tmp_path: Path
) -> None:
    options = {"recipe": "demo", "mode": "native", "images": pictures}
    regsurgery.patch(str(demo_folder), tmp_path / "out", calibrate=False, **options)
    plain = regsurgery.verify(tmp_path / "out")
    calibrated = regsurgery.verify(demo_native)
    assert plain.kl is not None and calibrated.kl is not None
    assert calibrated.kl < 0.9 * plain.kl
    block = json.loads((demo_native / "config.json").read_text())["regsurgery"]
    assert block["mode"] == "native" and block["fit"]["calibration"]["steps"] > 0
    assert block["fit"]["calibration"]["loss_after"] < block["fit"]["calibration"]["loss_before"]
    card = (demo_native / "README.md").read_text()
    assert "trust_remote_code" not in card and "from_pretrained(" in card and "held-out images" in card


def test_only_the_neurons_rows_and_columns_and_the_registers_change(demo_folder: Path, demo_native: Path) -> None:
    from transformers import AutoModelForImageClassification

    before = load_file(demo_folder / "model.safetensors")
    after = load_file(demo_native / "model.safetensors")
    neurons = find_recipe("demo").register_neurons
    for index in range(4):
        up = f"layer.{index}.intermediate.dense.weight"
        old = next(value for name, value in before.items() if name.endswith(up))
        new = after[f"dinov2_with_registers.encoder.layer.{index}.mlp.fc1.weight"]
        assert (old != new).any(dim=1).nonzero().flatten().tolist() == list(neurons.get(index, ()))
        old = next(value for name, value in before.items() if name.endswith(f"layer.{index}.output.dense.weight")
                   and "attention" not in name)  # fmt: skip
        new = after[f"dinov2_with_registers.encoder.layer.{index}.mlp.fc2.weight"]
        assert (old != new).any(dim=0).nonzero().flatten().tolist() == list(neurons.get(index, ()))
    model = AutoModelForImageClassification.from_pretrained(demo_native)
    assert type(model).__name__ == "Dinov2WithRegistersForImageClassification"
    assert model.config.num_register_tokens == 1


@pytest.mark.slow
def test_transformers_4_loads_the_same(demo_folder: Path, demo_native: Path, tmp_path: Path) -> None:
    pixels = next(image_set(None, 8).batches(8, load(str(demo_folder)).preprocess))
    model = {"demo": ("transformers", demo_native, "dinov2_with_registers.encoder.layer.2", 2)}
    now = in_stock_libraries(tmp_path, pixels, model)["demo"]
    then = in_stock_libraries(tmp_path, pixels, model, transformers_4_python())["demo"]
    assert float((now["output"] - then["output"]).abs().max()) <= 1e-5


@pytest.mark.parametrize("fmt", ["transformers", "timm"])
def test_other_image_sizes_work_in_the_host(fmt: str, demo_folder: Path, tmp_path: Path) -> None:
    import timm
    import transformers

    regsurgery.patch(
        str(demo_folder), tmp_path / "out", recipe="demo", mode="native", calibrate=False, format=fmt, num_images=8
    )
    loaded = load(str(demo_folder))
    pixels = next(image_set(None, 8).batches(8, loaded.preprocess))
    larger = F.interpolate(pixels, (128, 128), mode="bicubic", antialias=True)
    norms = []
    if fmt == "timm":
        model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        block = model.blocks[2]
    else:
        model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
        block = model.dinov2_with_registers.encoder.layer[2]
    block.register_forward_hook(
        lambda m, i, out: norms.append((out[0] if isinstance(out, tuple) else out).norm(dim=-1))
    )
    with torch.no_grad():
        model(larger)
    assert norms[0].shape == (8, 1 + 1 + 16 * 16)
    patches = norms[0][:, 2:]
    assert outlier_patches(patches).sum() == 0
    assert (norms[0][:, 1] > 5 * patches.median(dim=1).values).all()


@pytest.mark.parametrize("num_registers", tiered([2, 4], [2]))
def test_each_of_several_registers_gets_the_whole_constants(
    num_registers: int, demo_folder: Path, tmp_path: Path
) -> None:
    result = regsurgery.patch(
        str(demo_folder), tmp_path / "out", recipe="demo", mode="native", calibrate=False,
        num_registers=num_registers, num_images=8,
    )  # fmt: skip
    assert result.verdict.passed and result.verdict.outliers_per_image.patched <= 0.05
    tokens = load_file(tmp_path / "out" / "model.safetensors")["dinov2_with_registers.embeddings.register_tokens"]
    assert tokens.shape == (1, num_registers, 64)
    one = regsurgery.patch(
        str(demo_folder), tmp_path / "one", recipe="demo", mode="native", calibrate=False, num_images=8
    ).verdict
    assert one.register_norm is not None and result.verdict.register_norm is not None
    assert result.verdict.register_norm == pytest.approx(one.register_norm, rel=0.1)


@pytest.mark.slow
def test_pt2_runs_with_torch_alone_and_verifies(
    demo_folder: Path, demo_native: Path, pictures: Path, tmp_path: Path
) -> None:
    regsurgery.patch(str(demo_folder), tmp_path / "out", recipe="demo", mode="native", format="pt2", images=pictures)
    assert regsurgery.verify(tmp_path / "out", num_images=8).passed
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    pixels = next(image_set(None, 4).batches(4, load(str(demo_folder)).preprocess))
    with torch.no_grad():
        host = regsurgery.load(demo_native)(pixel_values=pixels).logits
        torch.testing.assert_close(program(pixels)["logits"], host, rtol=1e-4, atol=1e-5)


# --- when it is calibrated ------------------------------------------------------------------------------------------


def fit_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["regsurgery"]["fit"]


def test_without_photos_the_closed_form_is_written_and_that_is_said(
    demo_folder: Path, tmp_path: Path, run: Callable[..., Done]
) -> None:
    done = run(
        "patch", demo_folder, "-o", tmp_path / "out", "--recipe", "demo", "--mode", "native", "--num-images", "8"
    )
    assert done.code == 0 and "not calibrated: calibration needs photos; give some with --images DIR" in done.err
    assert fit_of(tmp_path / "out")["calibration"] is None
    assert json.loads((tmp_path / "out" / RUN_RECORD_NAME).read_text())["run"]["calibrate"] is False


@pytest.mark.slow
@pytest.mark.parametrize("gains", [True, False])
def test_calibration_on_generated_pictures_counts_where_pictures_of_another_kind_confirm_it(
    gains: bool, demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"recipe": "demo", "mode": "native", "num_images": 8}
    regsurgery.patch(str(demo_folder), tmp_path / "plain", calibrate=False, **options)
    real = _checked_on

    def checked(check: ImageSet, *given: Any) -> dict[str, Any]:
        assert check.note == "32 generated noise pictures"
        return {**real(check, *given), "loss_before": 0.5, "loss_after": 0.4 if gains else 0.6}

    monkeypatch.setattr("regsurgery.compiler.modes.native._checked_on", checked)
    regsurgery.patch(str(demo_folder), tmp_path / "out", calibrate=True, **options)
    found = fit_of(tmp_path / "out")["calibration"]
    assert found["loss_after"] < found["loss_before"] and (found["steps"] > 0) == gains
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "out")]
    assert (weights[0] == weights[1]) != gains


@pytest.mark.slow
def test_an_interrupt_keeps_the_best_weights_so_far_and_reproduce_gives_the_same(
    demo_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    class Interrupting(Progress):
        name, lines = "", ()

        def stage(self, name: str, total: int | None = None, *, in_bytes: bool = False) -> None:
            self.name, self.steps = name, 0

        def advance(self, number: int) -> None:
            self.steps += number
            if self.name == "calibration" and self.steps == 23:
                raise KeyboardInterrupt

        def say(self, line: str) -> None:
            self.lines = (*self.lines, line)

    progress = Interrupting()
    regsurgery.patch(
        str(demo_folder), tmp_path / "out", recipe="demo", mode="native", images=pictures, progress=progress
    )
    assert any("60 steps, about" in line and "Ctrl-C keeps" in line for line in progress.lines)
    assert any("interrupted after 22 of 60 steps" in line for line in progress.lines)
    found = fit_of(tmp_path / "out")["calibration"]
    assert found["stopped_after"] == 22 and found["steps"] == 20
    assert regsurgery.reproduce(tmp_path / "out", images=pictures).identical


@pytest.mark.slow
def test_calibration_ends_at_the_first_check_if_it_made_the_closed_form_much_worse(
    demo_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = iter([0.001, 0.0021])  # a third would raise StopIteration
    monkeypatch.setattr("regsurgery.compiler.modes.calibrate.Loss.mean", lambda *_: next(checks))
    options = {"recipe": "demo", "mode": "native", "images": pictures, "verification": False}
    regsurgery.patch(str(demo_folder), tmp_path / "out", **options)
    found = fit_of(tmp_path / "out")["calibration"]
    assert found["steps"] == 0 and found["loss_after"] == 0.001 and "stopped_after" not in found
    regsurgery.patch(str(demo_folder), tmp_path / "plain", calibrate=False, **options)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "out")]
    assert weights[0] == weights[1]


# --- refusals -------------------------------------------------------------------------------------------------------


def test_recipes_that_native_mode_cannot_follow_are_refused() -> None:
    for options in ({"compat": "reference"}, {"num_registers": 2, "scale": (1.0, 0.5)}):
        with pytest.raises(RecipeError, match="mode native needs"):
            Recipe({1: (2,)}, **options).with_mode("native")
    assert Recipe({1: (2,)}, fill="outliers").with_mode("native").fill == "zero"
    with pytest.raises(RecipeError, match="mode native needs fill: zero"):
        parse_recipe("schema: 1\nregister_neurons: {1: [2]}\nmode: native\nfill: mean\n", "some.yaml")
    with pytest.raises(RecipeError, match="needs register neurons"):
        Recipe({}).with_mode("bias")
    with pytest.raises(RecipeError, match="did you mean 'native'"):
        Recipe({1: (2,)}).with_mode("nativ")


def test_a_model_that_no_stock_host_holds_is_refused_before_any_fitting(
    demo_folder: Path, tmp_path: Path, planted_picos: Callable[[Pico], Planted]
) -> None:
    with pytest.raises(UnsupportedModelError, match="needs a text tower"):
        regsurgery.patch(str(demo_folder), tmp_path / "out", recipe="demo", mode="native", format="open_clip")
    clip = planted_picos(next(pico for pico in CORE if pico.id == "timm-clip"))
    with pytest.raises(UnsupportedModelError, match="has no norm before its blocks; use --format timm"):
        regsurgery.patch(
            str(clip.folder), tmp_path / "out", recipe=Recipe({1: (2,)}), mode="native", format="transformers"
        )
    assert list(tmp_path.iterdir()) == []


def test_too_few_images_to_fit_on_some_and_verify_on_others(demo_folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    for index in range(7):
        Image.new("RGB", (64, 64), (index * 30, 0, 0)).save(tmp_path / "images" / f"{index}.png")
    with pytest.raises(
        UserError, match="7 images of images: too few to fit on some and verify on others; give at least 8"
    ):
        regsurgery.patch(str(demo_folder), tmp_path / "out", recipe="demo", mode="native", images=tmp_path / "images")


def test_a_register_that_cannot_be_told_apart_is_an_error(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    monkeypatch.setattr("regsurgery.compiler.modes.closed_form.MIN_MARGIN", 2.0)
    arguments = ["patch", str(demo_folder), "-o", str(tmp_path / "out"), "--recipe", "demo", "--mode", "native"]
    monkeypatch.setattr(sys, "argv", ["regsurgery", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "separates the register" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_verify_wants_the_very_original(demo_native: Path, tmp_path: Path) -> None:
    _transformers("ViTModel", "ViTConfig", **VIT, intermediate_size=256)(tmp_path / "other")
    with pytest.raises(CheckpointError, match="sha256 differs"):
        regsurgery.verify(demo_native, original=str(tmp_path / "other"), num_images=8)
