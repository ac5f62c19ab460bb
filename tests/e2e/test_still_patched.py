"""`still_patched` and `check`: what wraps or copies a model keeps the surgery; what drops it is noticed."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import regsurgery
from regsurgery.errors import UserError
from tests.commands import Done
from tests.e2e.test_parity import pictures

MODES = ("shift", "bias", pytest.param("native", marks=pytest.mark.slow))
Folders = Callable[[str], Path]
IMAGES = pictures(4, (96, 96))


@pytest.fixture(scope="module")
def folders(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Mode -> folder that `patch` wrote when it was first asked for; `stock` is the original."""

    @functools.cache
    def folder(mode: str) -> Path:
        if mode == "stock":
            return demo_folder
        made = tmp_path_factory.mktemp("still") / mode
        regsurgery.patch(str(demo_folder), made, recipe="demo", mode=mode, num_images=8, verification=False)
        return made

    return folder


def opened(folder: Path) -> Any:
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()


class Adapted(nn.Module):
    """What an adapter puts in the place of a linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.lora = base, nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 0.0 * self.lora(x)


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def replaced(model: nn.Module, kind: type[nn.Module], made: Callable[[Any], nn.Module]) -> nn.Module:
    """`model` with each module of a class (or one derived from it) in its MLPs replaced."""
    for name, module in list(model.named_modules()):
        if isinstance(module, kind) and ".mlp." in name:
            holder, _, last = name.rpartition(".")
            setattr(model.get_submodule(holder), last, made(module))
    return model


@pytest.mark.parametrize("mode", MODES)
def test_copies_wrappers_and_adapters_are_still_patched(mode: str, folders: Folders) -> None:
    model = opened(folders(mode))
    found = regsurgery.still_patched(model, IMAGES)
    assert found and found.mode == mode and found.problems == () and found.outliers_per_image == 0
    assert found.block == 2 and 0 < found.max_patch_norm < 5
    assert found.blocks == (() if mode == "native" else (1, 2)) and found.silent == ((2,) if mode == "shift" else ())
    for other in (copy.deepcopy(model), Wrapped(model), replaced(copy.deepcopy(model), nn.Linear, Adapted)):
        assert regsurgery.still_patched(other, IMAGES) == found
        assert regsurgery.still_patched(other, IMAGES, folder=folders(mode)) == found


@pytest.mark.parametrize("mode", ["shift", "bias"])
def test_a_tool_that_builds_modules_again_is_noticed(mode: str, folders: Folders) -> None:
    """As quantisation-aware training does it; here with what makes the hidden activation."""
    model = opened(folders(mode))
    activation = type(opened(folders("stock")).vit.layers[0].mlp.activation_fn)
    lost, outliers = regsurgery.still_patched(replaced(model, activation, lambda _: nn.GELU()), IMAGES).problems
    assert lost.startswith("block 1: its register neurons are up to ") and lost.endswith("the shift is not in effect")
    assert outliers.endswith(" outlier tokens per image after block 2")


def test_a_stock_model_is_not_patched(folders: Folders) -> None:
    stock = opened(folders("stock"))
    with pytest.raises(UserError, match="carries no record of a surgery"):
        regsurgery.still_patched(stock, IMAGES)
    for mode in ("shift", "bias"):
        found = regsurgery.still_patched(stock, IMAGES, folder=folders(mode))
        assert not found and found.outliers_per_image > 0.5 and len(found.problems) == 2
    with pytest.raises(UserError, match="its modules are not those"):
        regsurgery.still_patched(nn.Linear(2, 2), IMAGES, folder=folders("shift"))


def test_registers_that_do_not_hold_the_extremes_are_noticed(folders: Folders) -> None:
    """All that can be seen of a shift that leaves patches as they are (`fill: keep`)."""
    model = opened(folders("shift"))
    model.config.regsurgery = {**model.config.regsurgery, "fill": "keep"}
    assert regsurgery.still_patched(model, IMAGES)
    stock = replaced(model, type(opened(folders("stock")).vit.layers[0].mlp.activation_fn), lambda _: nn.GELU())
    assert regsurgery.still_patched(stock, IMAGES).problems[0].startswith("block 1: register 0 does not hold")


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_folder_that_was_trained_and_saved_is_checked(
    mode: str, folders: Folders, tmp_path: Path, run: Callable[..., Done]
) -> None:
    model = opened(folders(mode))
    with torch.no_grad():
        model.classifier.weight.mul_(2)
    model.save_pretrained(tmp_path / "trained")
    done = run("check", str(tmp_path / "trained"), "--json")
    found = json.loads(done.out)
    assert done.code == 0 and found["patched"] and found["mode"] == mode and found["num_images"] == 8


def test_a_folder_whose_surgery_is_lost_is_told(folders: Folders, tmp_path: Path, run: Callable[..., Done]) -> None:
    """Its loader file shifts other neurons, so only the norms show it."""
    shutil.copytree(folders("shift"), tmp_path / "lost")
    (tmp_path / "lost" / "SHA256SUMS").unlink()
    config = json.loads((tmp_path / "lost" / "config.json").read_text())
    config["regsurgery"]["register_neurons"] = {"1": [0]}
    config["regsurgery"]["layouts"][0]["down"].pop("2")
    config["regsurgery"]["layouts"][1]["down"].pop("2")
    (tmp_path / "lost" / "config.json").write_text(json.dumps(config))
    done = run("check", str(tmp_path / "lost"))
    assert done.code == 1 and "outlier tokens per image after block 2" in done.out
    assert done.out.endswith("the surgery is not in effect\n")


def test_a_program_cannot_be_looked_into(tmp_path: Path, run: Callable[..., Done]) -> None:
    (tmp_path / "regsurgery.json").write_text(json.dumps({"format": "pt2"}))
    done = run("check", str(tmp_path))
    assert done.code == 2 and "use regsurgery verify" in done.err
