"""Tools that rewrite `.onnx` files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import regsurgery
from regsurgery.recipe import Recipe
from tests.clients.conftest import MODES, photos, say

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["stock", *MODES])
def program(request: pytest.FixtureRequest, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / request.param
    stock = request.param == "stock"
    recipe = Recipe({}, num_registers=0, scale=()) if stock else "demo"
    mode = None if stock else request.param
    regsurgery.patch(
        str(demo_folder), folder, recipe=recipe, mode=mode, format="onnx", num_images=8, verification=False
    )
    return folder / "model.onnx"


def logits(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: photos().numpy()})[0]


def test_no_weight_is_transposed_at_run_time(program: Path) -> None:
    graph = onnx.load(program).graph
    names = {one.name for one in graph.initializer}
    assert not [node.name for node in graph.node if node.op_type == "Transpose" and node.input[0] in names]
    assert sum(name.endswith(".T") for name in names) >= 24


def test_dynamic_quantisation_shrinks_the_file(program: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(program, tmp_path / "int8.onnx")
    share = (tmp_path / "int8.onnx").stat().st_size / program.stat().st_size
    expected = logits(program)
    moved = float(abs(logits(tmp_path / "int8.onnx") - expected).max() / abs(expected).max())
    say("onnxruntime quantize_dynamic", program.parent.name, "share of the size", share)
    say("onnxruntime quantize_dynamic", program.parent.name, "largest change of logits, relative", moved)
    # A quarter, and what a small model has besides its weights. One scale for a whole activation suits no model with
    # extreme values, stock or patched: logits move by 0.2 to 0.8 of the largest.
    assert share < 0.45 and 0 < moved < 1


def test_float16_runs(program: Path, tmp_path: Path) -> None:
    float16 = pytest.importorskip("onnxconverter_common.float16")
    onnx.save(float16.convert_float_to_float16(onnx.load(program), keep_io_types=True), tmp_path / "half.onnx")
    expected = logits(program)
    moved = float(abs(logits(tmp_path / "half.onnx") - expected).max() / abs(expected).max())
    tool = "onnxconverter-common convert_float_to_float16"
    say(tool, program.parent.name, "largest change of logits, relative", moved)
    assert 0 < moved < 0.01


def test_onnxsim_changes_nothing(program: Path, tmp_path: Path) -> None:
    onnxsim = pytest.importorskip("onnxsim")
    simplified, same = onnxsim.simplify(onnx.load(program))
    onnx.save(simplified, tmp_path / "simplified.onnx")
    differs = float(abs(logits(tmp_path / "simplified.onnx") - logits(program)).max())
    say("onnxsim", program.parent.name, "largest difference of logits", differs)
    assert same and differs < 1e-4


def test_openvino_runs_the_file(program: Path) -> None:
    openvino = pytest.importorskip("openvino")
    compiled = openvino.compile_model(program, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    differs = float(abs(compiled(photos().numpy())[0] - logits(program)).max())
    say("openvino from .onnx", program.parent.name, "largest difference of logits", differs)
    assert differs < 1e-4
