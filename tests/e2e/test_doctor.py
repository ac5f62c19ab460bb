"""`doctor`: is there anything to fix, where does it start, what causes it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import regsurgery
from regsurgery.cli.app import main
from regsurgery.search.diagnosis import robust_outliers
from tests.conftest import PLANTED, Planted, shared
from tests.picos import CORE, VIT, Pico, _timm, _transformers

FORMATS = ("vit-tiny-transformers", "vit-tiny-timm", "vit-tiny-openclip")


OTHER_IMAGES = [("vit-tiny-timm", None, 24), ("vit-tiny-timm", "calibration", 8)]


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "images", "num_images"), [*((name, "calibration", 24) for name in FORMATS), *OTHER_IMAGES]
)
def test_the_real_vit_has_positional_outliers_from_block_7_on(name: str, images: str | None, num_images: int) -> None:
    folder = shared("images", images) if images else None
    diagnosis = regsurgery.doctor(str(shared("models", name)), images=folder, num_images=num_images)
    assert (diagnosis.verdict, diagnosis.positional, diagnosis.emergence_block) == ("register_neurons", True, 7)
    assert diagnosis.outliers_per_image == pytest.approx(4.0, abs=0.2)
    assert [block.max_over_median > 20 for block in diagnosis.blocks] == [False] * 7 + [True] * 5


@pytest.mark.real
def test_the_negative_control_has_nothing_to_fix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(shared("models", "dinov2-small"))
    monkeypatch.setattr(sys, "argv", ["regsurgery", "doctor", model, "--json", "--num-images", "16"])
    with pytest.raises(SystemExit) as stopped:
        main()
    found = json.loads(capsys.readouterr().out)
    assert stopped.value.code == 3
    assert found["verdict"] == "none" and found["positional"] is None and found["emergence_block"] is None
    assert len(found["max_over_median"]) == 12 and max(found["max_over_median"]) < 2.3


@pytest.mark.slow
def test_planted_neurons_are_content_driven_and_emerge_where_they_were_planted(
    planted_picos: Callable[[Pico], Planted],
) -> None:
    for pico in CORE[:1] + CORE[-1:]:
        diagnosis = regsurgery.doctor(str(planted_picos(pico).folder), num_images=16)
        assert diagnosis.verdict == "register_neurons"
        assert diagnosis.positional is False
        assert diagnosis.emergence_block == min(PLANTED)


def test_untouched_random_weights_have_nothing_to_fix(tmp_path: Path) -> None:
    CORE[0].build(tmp_path / "model")
    assert regsurgery.doctor(str(tmp_path / "model"), num_images=4).verdict == "none"


REGISTERED = {
    "transformers": _transformers(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **VIT, num_register_tokens=4
    ),
    "timm": _timm("vit_small_patch14_reg4_dinov2", num_classes=0),
    "DINOv3": _transformers("DINOv3ViTModel", "DINOv3ViTConfig", **VIT, intermediate_size=128, num_register_tokens=4),
}


@pytest.mark.parametrize("library", REGISTERED)
def test_trained_registers_are_recognised(library: str, tmp_path: Path) -> None:
    REGISTERED[library](tmp_path / "model")
    diagnosis = regsurgery.doctor(str(tmp_path / "model"), num_images=2)
    assert diagnosis.verdict == "already_registered"
    assert diagnosis.reason == "the model was trained with 4 register tokens"


def test_a_hot_spot_in_the_position_embedding_is_no_neurons_doing(tmp_path: Path) -> None:
    CORE[0].build(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    state = load_file(weights)
    state["embeddings.position_embeddings"][0, [5, 20]] += 40 * torch.randn(
        64, generator=torch.Generator().manual_seed(0)
    )
    save_file(state, weights, metadata={"format": "pt"})
    diagnosis = regsurgery.doctor(str(tmp_path / "model"), num_images=4)
    assert (diagnosis.verdict, diagnosis.positional) == ("position_embedding", True)
    assert diagnosis.outliers_per_image == 2


def test_an_unsupported_model_is_a_diagnosis_with_the_reason(tmp_path: Path) -> None:
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    _transformers("ConvNextModel", "ConvNextConfig", **sizes, image_size=64)(tmp_path / "model")
    diagnosis = regsurgery.doctor(str(tmp_path / "model"), num_images=2)
    assert diagnosis.verdict == "unsupported"
    assert diagnosis.reason.startswith(f"{tmp_path / 'model'}: no match: ")


def test_the_threshold_wants_distance_from_the_bulk_and_from_the_median() -> None:
    bulk = torch.linspace(0.9, 1.1, 99)
    for extra, found in ((1.4, False), (2.9, False), (3.1, True)):
        assert bool(robust_outliers(torch.cat([bulk, torch.tensor([extra])])[None])[0, -1]) is found
    wide = torch.cat([torch.linspace(0.1, 2.0, 99), torch.tensor([4.0])])
    assert not robust_outliers(wide[None]).any(), "within ten robust deviations of a wide bulk"


def test_the_public_functions_stay_functions_after_use(demo_folder: Path) -> None:
    for _ in range(2):
        assert regsurgery.doctor(str(demo_folder), num_images=2).verdict == "register_neurons"
    assert callable(regsurgery.verify) and callable(regsurgery.patch) and callable(regsurgery.load)
