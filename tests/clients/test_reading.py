"""Tools that read, trace or wrap a model: feature extractors, explanations, other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.clients.conftest import MODES, Logits, opened, photos, say

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mode", ["stock", *MODES])
def test_openvino_reads_the_module(mode: str, folders: dict[str, Path]) -> None:
    openvino = pytest.importorskip("openvino")
    model, images = Logits(opened(folders[mode])), photos()
    with torch.no_grad():
        expected = model(images)
    compiled = openvino.compile_model(openvino.convert_model(model, example_input=images), "CPU", {
        "INFERENCE_PRECISION_HINT": "f32"})  # fmt: skip
    differs = float((torch.from_numpy(compiled(images.numpy())[0]) - expected).abs().max())
    say("openvino from the module", mode, "largest difference of logits", differs)
    assert differs < 1e-4


@pytest.mark.parametrize("mode", ["stock", *MODES])
def test_captum_attributes_to_pixels(mode: str, folders: dict[str, Path]) -> None:
    attr = pytest.importorskip("captum.attr")
    model, images = Logits(opened(folders[mode])), photos(2)
    explained = attr.IntegratedGradients(model).attribute(images, target=1, n_steps=32)
    with torch.no_grad():
        expected = model(images)[:, 1] - model(torch.zeros_like(images))[:, 1]
    differs = float((explained.flatten(1).sum(1) - expected).abs().max())
    say("captum", mode, "completeness of integrated gradients", differs)
    assert differs < 0.2


@pytest.mark.parametrize("mode", ["stock", *MODES])
def test_grad_cam_maps_patches(mode: str, folders: dict[str, Path]) -> None:
    grad_cam = pytest.importorskip("pytorch_grad_cam", exc_type=ImportError)
    model: Any = Logits(opened(folders[mode]))
    backbone = next(model.model.children())
    blocks = backbone.layers if hasattr(backbone, "layers") else backbone.encoder.layer
    block = blocks[-1]  # before its attention: after it, the class token alone has gradients
    layer = block.layernorm_before if hasattr(block, "layernorm_before") else block.norm1

    def maps(tokens: Tensor) -> Tensor:
        first = tokens.shape[1] - 144 if mode == "native" else 1  # registers come before the patches, or after them
        return tokens[:, first : first + 144].reshape(len(tokens), 12, 12, -1).permute(0, 3, 1, 2)

    with grad_cam.GradCAM(model, [layer], reshape_transform=maps) as cam:
        found = cam(photos(2), targets=None)  # the class of the largest logit
    say("grad-cam", mode, "largest value of the map", float(found.max()))
    assert found.shape == (2, 96, 96) and float(found.max()) > 0
