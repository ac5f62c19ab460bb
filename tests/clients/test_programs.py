"""Runtimes of their own on a patched `.pt2`: ExecuTorch, LiteRT, OpenVINO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regsurgery
from tests.clients.conftest import MODES, Logits, photos, say

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=MODES)
def program(request: pytest.FixtureRequest, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The mode, and the program that `patch --format pt2` wrote."""
    folder = tmp_path_factory.mktemp("programs") / request.param
    regsurgery.patch(str(demo_folder), folder, recipe="demo", mode=request.param, format="pt2", num_images=8,
                     calibrate=False, verification=False)  # fmt: skip
    return request.param, torch.export.load(folder / "model.pt2")


def check(tool: str, mode: str, found: Tensor, expected: Tensor) -> None:
    differs = float((found - expected).abs().max())
    say(f"{tool} from .pt2", mode, "largest difference of logits", differs)
    assert differs < 1e-4


@torch.no_grad()
def test_executorch_lowers_and_runs_it(program: Any) -> None:
    exir = pytest.importorskip("executorch.exir")
    from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

    mode, exported = program
    model, image = Logits(exported.module()), photos(1)
    lowered = exir.to_edge_transform_and_lower(torch.export.export(model, (image,))).to_executorch()
    method = Runtime.get().load_program(lowered.buffer).load_method("forward")
    assert method is not None
    check("executorch", mode, method.execute([image])[0], model(image))


@torch.no_grad()
def test_litert_converts_and_runs_it(program: Any) -> None:
    litert = pytest.importorskip("litert_torch")
    mode, exported = program
    model, image = Logits(exported.module()), photos(1)
    check("litert-torch", mode, torch.from_numpy(litert.convert(model, (image,))(image.numpy())), model(image))


@torch.no_grad()
def test_openvino_reads_it(program: Any) -> None:
    openvino = pytest.importorskip("openvino")
    mode, exported = program
    images = photos()
    compiled = openvino.compile_model(openvino.convert_model(exported), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    expected = exported.module()(images)
    found = compiled(images.numpy())[list(expected).index("logits")]
    check("openvino", mode, torch.from_numpy(found), expected["logits"])
