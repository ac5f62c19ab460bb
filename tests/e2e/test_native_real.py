"""Native mode on the real ViT-Ti: its figures, taken in stock libraries in a process without regsurgery."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import regsurgery
from regsurgery.commands.patch import PatchResult
from regsurgery.frontends.load import load
from regsurgery.recipe import find_recipe
from tests.conftest import shared
from tests.e2e.test_real import photos as photos
from tests.planting import REAL_NEURON, split_real_neuron
from tests.reference import outlier_patches

STOCK = Path(__file__).parent / "stock_native.py"
BLOCKS = {
    "timm": "blocks.10",
    "transformers": "dinov2_with_registers.encoder.layer.10",
    "open_clip": "visual.trunk.blocks.10",
}
# Of the 125 photos, all of which are what benchmarks.faithful fits on.
FEW, SOME = 36, 42
SHOWN = 80  # of the 175 photos that figures are taken on
PREFIX = 1 + find_recipe("vit-tiny").num_registers  # the class token and the registers


def in_stock_libraries(
    tmp_path: Path, pixels: Tensor, models: dict[str, tuple[str, Path, str, int]], python: str = sys.executable
) -> dict[str, dict[str, Tensor]]:
    """`models`: name -> (library, folder, module path of the last but one block, prefix tokens)."""
    manifest = tmp_path / "manifest"
    jobs = {
        name: {"library": library, "folder": str(folder), "block": block, "patches": patches}
        for name, (library, folder, block, patches) in models.items()
    }
    torch.save({"pixels": pixels, "models": jobs}, manifest)
    subprocess.run([python, str(STOCK), str(manifest)], check=True, cwd=tmp_path)
    return torch.load(f"{manifest}.results")


def figures(original: dict[str, Tensor], patched: dict[str, Tensor]) -> dict[str, float]:
    logits, new_logits, norms = original["output"], patched["output"], patched["norms"]
    return {
        "kl": float(F.kl_div(new_logits.log_softmax(-1), logits.log_softmax(-1), reduction="batchmean",
                             log_target=True)),
        "same": float((new_logits.argmax(-1) == logits.argmax(-1)).float().mean()),
        "outliers": float(outlier_patches(norms).float().sum(dim=1).mean()),
        "worst": float(norms.max()),
    }  # fmt: skip


# --- the real network -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PatchResult]:
    """The ViT-Ti of timm, not calibrated."""
    folder = tmp_path_factory.mktemp("native") / "plain"
    source, images = shared("models", "vit-tiny-timm"), shared("images", "calibration")
    return folder, regsurgery.patch(
        str(source), folder, recipe="vit-tiny", mode="native", calibrate=False, images=images, num_images=FEW
    )


@pytest.mark.real
def test_the_real_vit_in_stock_timm(photos: Tensor, plain: tuple[Path, PatchResult], tmp_path: Path) -> None:
    model = shared("models", "vit-tiny-timm")
    options = {"recipe": "vit-tiny", "mode": "native", "images": shared("images", "calibration")}
    calibrated = regsurgery.patch(str(model), tmp_path / "calibrated", num_images=SOME, **options)
    results = in_stock_libraries(
        tmp_path,
        photos[:SHOWN],
        {
            "original": ("timm", model, BLOCKS["timm"], 1),
            "calibrated": ("timm", tmp_path / "calibrated", BLOCKS["timm"], PREFIX),
            "plain": ("timm", plain[0], BLOCKS["timm"], PREFIX),
        },
    )
    original = results["original"]
    measured = {name: figures(original, results[name]) for name in ("calibrated", "plain")}
    print(measured)
    assert len(original["output"]) == SHOWN
    assert measured["calibrated"]["kl"] <= 0.014 and measured["calibrated"]["same"] >= 0.96
    assert measured["plain"]["kl"] <= 0.033
    for each in measured.values():
        assert each["outliers"] <= 0.01 and each["worst"] <= 40
    for result, num_images in ((calibrated, SOME), (plain[1], FEW)):
        assert result.verdict.passed and result.mode == "native"
        assert result.verdict.num_images == num_images // 3 and "held out" in result.verdict.images
        assert result.verdict.margin is not None and result.verdict.margin > 0.2
        assert result.verdict.register_norm is not None and result.verdict.register_norm > 300


@pytest.mark.real
def test_the_real_vit_is_one_network_in_three_stock_libraries(photos: Tensor, tmp_path: Path) -> None:
    model = shared("models", "vit-tiny-openclip")
    for fmt in ("open_clip", "timm", "transformers"):
        regsurgery.patch(
            str(model), tmp_path / fmt, recipe="vit-tiny", mode="native", calibrate=False, format=fmt,
            images=shared("images", "calibration"), num_images=24,
        )  # fmt: skip
    models = {fmt: (fmt, tmp_path / fmt, block, PREFIX) for fmt, block in BLOCKS.items()}
    models["the trunk alone"] = ("timm", tmp_path / "open_clip", BLOCKS["timm"], PREFIX)
    results = in_stock_libraries(tmp_path, photos[:24], models)
    first = results.pop("open_clip")
    assert outlier_patches(first["norms"]).sum() <= 0.01 * 24
    for other in results.values():
        assert float((first["output"] - other["output"]).abs().max()) <= 1e-4
    head = load_file(model / "zero_shot_head.safetensors")
    logits = first["output"] @ head["class_embeddings"].T + head["class_bias"]
    with torch.no_grad():
        expected = load(str(model)).model.encode_image(photos[:24]) @ head["class_embeddings"].T + head["class_bias"]  # type: ignore[operator]
    kl = F.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), reduction="batchmean", log_target=True)
    assert float(kl) <= 0.033
    moved = tmp_path / "elsewhere"
    (tmp_path / "open_clip").rename(moved)
    assert regsurgery.verify(moved, images=shared("images", "labelled"), num_images=8).passed
    assert torch.equal(regsurgery.load(moved).encode_image(photos[:2]), first["output"][:2])  # type: ignore[operator]


@pytest.mark.real
def test_the_real_neuron_spread_over_several_costs_the_same(plain: tuple[Path, PatchResult], tmp_path: Path) -> None:
    """Same input rows and biases, shares of the output column that sum to 1: the closed form must not care."""
    source, folder = shared("models", "vit-tiny-timm"), tmp_path / "split"
    neurons = split_real_neuron(source, folder, [0.2, 0.4, 0.3, 0.1], range(3))
    recipe = plain[1].recipe
    assert recipe.register_neurons[7] == (REAL_NEURON,)
    spread = replace(recipe, register_neurons={**recipe.register_neurons, 7: tuple(sorted(neurons))})
    split = regsurgery.patch(
        str(folder), tmp_path / "out", recipe=spread, mode="native", calibrate=False,
        images=shared("images", "calibration"), num_images=FEW,
    ).verdict  # fmt: skip
    whole = plain[1].verdict
    assert whole.kl is not None and split.kl is not None
    assert abs(whole.kl - split.kl) <= 0.01
    assert split.outliers_per_image.patched <= 0.01 and split.worst_patch_norm.patched <= 40
