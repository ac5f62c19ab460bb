"""`--format dinov2`: weights for facebook's DINOv2 code, held to an independent model of it and to timm."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regsurgery
from regsurgery.backends import dinov2, dinov2_network
from regsurgery.backends.canonical import canonical
from regsurgery.backends.dinov2_network import ENTRIES, Entry
from regsurgery.backends.native_timm import blank_registers
from regsurgery.commands.patch import PatchResult
from regsurgery.emit.published import ABOUT_THE_PATH, _snippet
from regsurgery.errors import CheckpointError, UnsupportedModelError, UserError
from regsurgery.families import FAMILIES
from regsurgery.formats import STOCK_CODE
from regsurgery.frontends.load import load
from regsurgery.recipe import Recipe
from tests.commands import Done
from tests.conftest import build_planted, shared, tiered
from tests.e2e.facebook_dinov2 import SHAPES, Network, hub_load
from tests.picos import DINOV2_VITS14, Pico, _timm, _transformers

SIDE, PATCH_SIZE = 112, 14
TOWER: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": SIDE,
                         "patch_size": PATCH_SIZE}  # fmt: skip
IN_TIMM: dict[str, Any] = {"num_classes": 0, "img_size": SIDE, "patch_size": PATCH_SIZE, "init_values": 1.0}
HF_PATHS, TIMM_PATHS = ("encoder.layer.0", "encoder.layer.3", "encoder.layer.{}.mlp.fc2"), ("", "", "")
SMALL = {
    "hf": Pico("small-hf", _transformers("Dinov2Model", "Dinov2Config", **TOWER), *HF_PATHS),
    "gated": Pico(
        "small-gated",
        _transformers("Dinov2Model", "Dinov2Config", **{**TOWER, "hidden_size": 96}, use_swiglu_ffn=True),
        *HF_PATHS,
        hidden=256,
    ),
    "timm": Pico("small-timm", _timm("vit_small_patch14_dinov2", **IN_TIMM), *TIMM_PATHS),
    "reg4": Pico("small-reg4", _timm("vit_small_patch14_reg4_dinov2", **IN_TIMM), *TIMM_PATHS),
}
# By source: the entry, and what it is told.
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "hf": ("dinov2_pico14", {"num_register_tokens": 2, "img_size": SIDE}),
    "gated": ("dinov2_gated14", {"num_register_tokens": 2, "img_size": SIDE}),
    "timm": ("dinov2_pico14", {"num_register_tokens": 2, "img_size": SIDE}),
    "reg4": (
        "dinov2_pico14",
        {"num_register_tokens": 6, "img_size": SIDE, "interpolate_antialias": True, "interpolate_offset": 0.0},
    ),
}
EXACT = 1e-5


@pytest.fixture(scope="module", autouse=True)
def small_entries() -> Iterator[None]:
    """Two networks of four blocks, as if the code had them."""
    small = tuple(Entry(name, *SHAPES[name]) for name in ("dinov2_pico14", "dinov2_gated14"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dinov2_network, "ENTRIES", (*ENTRIES, *small))
        yield


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, PatchResult]]:
    """Patches a planted tower of a kind, once."""

    @functools.cache
    def patched(name: str) -> tuple[Path, PatchResult]:
        root = tmp_path_factory.mktemp("dinov2")
        planted = build_planted(SMALL[name], root / "model")
        recipe = Recipe({block: tuple(neurons) for block, neurons in planted.neurons.items()}).with_num_registers(2)
        result = regsurgery.patch(
            str(planted.folder), root / "out", recipe=recipe, mode="native", format="dinov2", calibrate=False,
            num_images=8,
        )  # fmt: skip
        return root / "out", result

    return patched


@pytest.fixture(scope="module", params=tiered(SMALL, ["reg4"]))
def written(
    request: pytest.FixtureRequest, patched: Callable[[str], tuple[Path, PatchResult]]
) -> tuple[str, Path, PatchResult]:
    """The name of a kind, the folder, and what `patch` returned."""
    return request.param, *patched(request.param)


def state_of(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "model.pth", weights_only=True)


def independent(name: str, folder: Path) -> Network:
    entry, arguments = CALLS[name]
    network = hub_load("facebookresearch/dinov2", entry, pretrained=False, **arguments)
    network.load_state_dict(state_of(folder))
    return network.eval()


def images_of(height: int, width: int) -> Tensor:
    return torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(height))


def largest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


# --- what is written ------------------------------------------------------------------------------------------------


def test_the_verdict_and_the_files(written: tuple[str, Path, PatchResult]) -> None:
    name, folder, result = written
    assert result.format == "dinov2" and result.verdict is not None and result.verdict.passed
    assert result.verdict.outliers_per_image.original > 1
    assert result.verdict.outliers_per_image.patched <= 0.1 * result.verdict.outliers_per_image.original
    assert 0 <= result.verdict.parity_max_abs < 2e-3
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "SHA256SUMS", "before_after.png", "model.pth", "recipe.yaml", "regsurgery.json",
        "regsurgery_run.json",
    }  # fmt: skip
    config = json.loads((folder / "regsurgery.json").read_text())
    assert (config["format"], config["entry"], config["arguments"]) == ("dinov2", *CALLS[name])


def test_the_layout_is_that_of_the_code(written: tuple[str, Path, PatchResult]) -> None:
    name, folder, _ = written
    state, width = state_of(folder), 96 if name == "gated" else 64
    assert state["pos_embed"].shape == (1, 1 + (SIDE // PATCH_SIZE) ** 2, width)
    assert state["register_tokens"].shape == (1, 6 if name == "reg4" else 2, width)
    assert state["mask_token"].shape == (1, width)
    assert ("blocks.3.mlp.w12.weight" in state) == (name == "gated") and "blocks.0.ls1.gamma" in state


@pytest.mark.parametrize("size", [(SIDE, SIDE), (70, 98), (168, 168)])
def test_the_independent_model_and_ours_give_the_same(
    size: tuple[int, int], written: tuple[str, Path, PatchResult]
) -> None:
    name, folder, _ = written
    images, ours = images_of(*size), regsurgery.load(folder)
    with torch.no_grad():
        expected = independent(name, folder).forward_features(images)
        assert largest(ours.forward_features(images), expected) <= EXACT
        assert torch.equal(ours(images), ours.forward_features(images)["x_norm_clstoken"])
        again = hub_load("facebookresearch/dinov2", CALLS[name][0], pretrained=False, **CALLS[name][1])
        again.load_state_dict(ours.state_dict())


def test_timm_reads_the_file_as_it_reads_facebooks_and_gives_the_same(written: tuple[str, Path, PatchResult]) -> None:
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    name, folder, _ = written
    entry = "vit_giant_patch14_reg4_dinov2" if name == "gated" else "vit_small_patch14_reg4_dinov2"
    registers = CALLS[name][1]["num_register_tokens"]
    tower: Any = timm.create_model(
        entry, embed_dim=96 if name == "gated" else 64, depth=4, num_heads=4, img_size=SIDE, reg_tokens=registers,
        num_classes=0,
        **({"mlp_ratio": 512.5 / 96} if name == "gated" else {}),
    )  # fmt: skip
    tower.load_state_dict(checkpoint_filter_fn(state_of(folder), tower))
    images = images_of(SIDE, SIDE)
    with torch.no_grad():
        tokens = tower.eval().forward_features(images)
        expected = {
            "x_norm_clstoken": tokens[:, 0],
            "x_norm_regtokens": tokens[:, 1 : 1 + registers],
            "x_norm_patchtokens": tokens[:, 1 + registers :],
        }
        assert largest(independent(name, folder).forward_features(images), expected) <= EXACT


def test_verify_eval_and_reproduce(written: tuple[str, Path, PatchResult], run: Callable[..., Done]) -> None:
    name, folder, result = written
    again = regsurgery.verify(folder, num_images=8)
    assert again.passed and again.outliers_per_image.patched == pytest.approx(
        result.verdict.outliers_per_image.patched, abs=0.2
    )
    if name == "hf":
        assert regsurgery.verify(folder, num_images=2, image_size=168).passed
        assert run("eval", "latency", folder, "--num-images", 2).code == 0
    if name == "reg4":
        assert run("eval", "norms", folder, "--num-images", 2).code == 0
        assert regsurgery.reproduce(folder).identical
    done = run("unpatch", folder, "-o", folder.parent / "restored")
    assert done.code == 2 and "native mode changes weights" in done.err


def test_the_cards_snippets_run(
    written: tuple[str, Path, PatchResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, folder, _ = written
    monkeypatch.setattr(torch.hub, "load", hub_load)
    text = (folder / "README.md").read_text()
    (called,) = ABOUT_THE_PATH.findall(text)
    (tmp_path / called).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    found = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(found) == 3
    assert all(
        'torch.load(f"{folder}/model.pth", map' in _snippet(code, called, "USER/NAME", None) for code in found[:2]
    )
    for code in found:
        names: dict[str, Any] = {}
        exec(compile(code, "README.md", "exec"), names)
        assert torch.equal(names["model"].register_tokens, state_of(folder)["register_tokens"])
        if "patches" in names:
            assert names["patches"].shape[:2] == (1, (SIDE // PATCH_SIZE) ** 2)


# --- what does not go -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage, says",
    [
        ({"entry": "dinov2_vitx14"}, "names no network of DINOv2"),
        ({"entry": "dinov2_vits14"}, "not the weights of dinov2_vits14"),
        ({"format": "dinov3"}, "is not one of dinov2, pt2, onnx"),
        ({"arguments": []}, "its model cannot be built"),
    ],
)
def test_a_wrong_config_is_one_line(
    damage: dict[str, Any], says: str, patched: Callable[[str], tuple[Path, PatchResult]], tmp_path: Path
) -> None:
    folder = shutil.copytree(patched("reg4")[0], tmp_path / "copy")
    (folder / "SHA256SUMS").unlink()
    config = json.loads((folder / "regsurgery.json").read_text())
    (folder / "regsurgery.json").write_text(json.dumps({**config, **damage}))
    with pytest.raises(CheckpointError, match=says):
        regsurgery.load(folder)


class Call:
    def __reduce__(self) -> Any:
        return print, ("this ran",)


def test_weights_are_read_as_weights_alone(
    patched: Callable[[str], tuple[Path, PatchResult]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(patched("reg4")[0], tmp_path / "copy")
    torch.save({"cls_token": Call()}, folder / "model.pth")
    with pytest.raises(CheckpointError, match="SHA256SUMS"):
        regsurgery.load(folder)
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="cannot be read as plain weights"):
        regsurgery.load(folder)
    (folder / "model.pth").unlink()
    with pytest.raises(CheckpointError, match=r"model\.pth: missing"):
        regsurgery.load(folder)
    assert "this ran" not in capsys.readouterr().out


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "width": (_timm("vit_small_patch14_dinov2", **{**IN_TIMM, "embed_dim": 32}), "its width is 32, not one of 384"),
    "depth": (_timm("vit_small_patch14_dinov2", **{**IN_TIMM, "depth": 3}), "it has 3 blocks, dinov2_pico14 has 4"),
    "heads": (_timm("vit_small_patch14_dinov2", **{**IN_TIMM, "num_heads": 8}), "it has 8 heads"),
    "patches": (_timm("vit_small_patch14_dinov2", **{**IN_TIMM, "patch_size": 16}), "its patch size is 16, not 14"),
    "oblong": (_timm("vit_small_patch14_dinov2", **{**IN_TIMM, "img_size": (112, 84)}), "of 112x84, not square"),
    "pre-norm": (_timm("vit_small_patch14_dinov2", **IN_TIMM, pre_norm=True), "it has a norm before its blocks"),
    "no layer scale": (_timm("vit_tiny_patch16_224", **{**IN_TIMM, "init_values": None}), "it has no layer scale"),
    "no class token": (
        _timm("vit_small_patch14_dinov2", **IN_TIMM, class_token=False, global_pool="avg"),
        "it has no class token",
    ),
    "activation": (_timm("vit_small_patch14_dinov2", **IN_TIMM, act_layer="relu"), "its activation is ReLU"),
    "quick": (_timm("vit_small_patch14_dinov2", **IN_TIMM, act_layer="gelu_tanh"), "its activation is GELUTanh"),
    "hidden": (_timm("vit_small_patch14_dinov2", **IN_TIMM, mlp_ratio=2.0), "its MLPs have 128 hidden units"),
    "gated": (_timm("vit_giant_patch14_dinov2", **IN_TIMM, mlp_ratio=5.5), "its MLPs are gated"),
    "not gated": (_timm("vit_small_patch14_dinov2", **{**IN_TIMM, "embed_dim": 96}), "its MLPs are not gated"),
    "eps": (_timm("vit_base_patch16_clip_224", **IN_TIMM, pre_norm=False), "its norms have eps 1e-05, not 1e-06"),
    "qk": (_timm("vit_small_patch14_dinov2", **IN_TIMM, qk_norm=True), "cannot hold the tensor 'blocks.0.attn.k_norm"),
    "classes": (_timm("vit_small_patch14_dinov2", **{**IN_TIMM, "num_classes": 10}), "it returns a head's output"),
    "classifier": (
        _transformers("Dinov2ForImageClassification", "Dinov2Config", **TOWER, num_labels=5),
        "it returns a head's output",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_towers_are_refused_by_what_differs(name: str, tmp_path: Path) -> None:
    build, says = REFUSED[name]
    build(tmp_path / "model")
    loaded = load(str(tmp_path / "model"))
    with pytest.raises(UnsupportedModelError) as refused:
        dinov2.check(loaded, 1)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_only_native_mode_writes_it_and_says_so_before_the_search(demo_folder: Path, tmp_path: Path) -> None:
    for options in ({}, {"mode": "shift"}, {"mode": "bias"}, {"recipe": "demo"}):
        with pytest.raises(UserError, match=r"format dinov2: mode (shift|bias) cannot write it; use --mode native"):
            regsurgery.patch(str(demo_folder), tmp_path / "out", format="dinov2", **options)
    with pytest.raises(UnsupportedModelError, match="facebook's DINOv2 code cannot hold the model"):
        regsurgery.patch(str(demo_folder), tmp_path / "out", format="dinov2", mode="native")
    assert not (tmp_path / "out").exists()


# --- the sizes that the code has ------------------------------------------------------------------------------------


def test_the_entries_are_the_codes() -> None:
    assert {entry.name: (entry.width, entry.depth, entry.num_heads, entry.gated) for entry in ENTRIES} == {
        name: shape for name, shape in SHAPES.items() if name[7:10] == "vit"
    }
    for entry in ENTRIES:
        with torch.device("meta"):
            theirs = Network(SHAPES[entry.name], num_register_tokens=2).state_dict()
        ours = dinov2_network.build(entry, theirs, dinov2_network.Interpolation()).state_dict()
        assert {name: value.shape for name, value in ours.items()} == {
            name: value.shape for name, value in theirs.items()
        }


def test_the_matrix_names_it_for_dinov2() -> None:
    rows = {(row.library, row.name) for row in FAMILIES if {*STOCK_CODE} & {*row.native}}
    assert rows == {("transformers", "DINOv2"), ("timm", "DINOv2"), ("timm", "DINOv2 with registers")}


def unchanged(folder: Path, size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The source's own outputs, and the independent model's with its weights and no register."""
    loaded = load(str(folder))
    tower = canonical(loaded, loaded.model.state_dict())
    tower = replace(tower, tensors={name: value.float() for name, value in tower.tensors.items()})
    entry, arguments, tensors = dinov2._contents(tower, blank_registers(tower, 0))
    network = hub_load("facebookresearch/dinov2", entry.name, pretrained=False, **arguments)
    network.load_state_dict(tensors)
    images = images_of(size, size)[:1]
    with torch.no_grad():
        given = loaded.model.float()(pixel_values=images)
        found = network.eval().forward_features(images)
    expected = {"x_norm_clstoken": given.pooler_output, "x_norm_patchtokens": given.last_hidden_state[:, 1:]}
    return expected, found


def test_without_register_and_neuron_nothing_changes(tmp_path: Path) -> None:
    DINOV2_VITS14.build(tmp_path / "model")
    expected, found = unchanged(tmp_path / "model", 84)
    assert largest(found, expected) <= EXACT and found["x_norm_regtokens"].shape[1] == 0


@pytest.mark.real
def test_the_real_dinov2_small_is_the_same_function(tmp_path: Path) -> None:
    expected, found = unchanged(shared("models", "dinov2-small"), 518)
    assert largest(found, expected) <= 1e-4 * float(expected["x_norm_patchtokens"].abs().max())
