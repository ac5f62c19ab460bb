"""`--format onnx`: onnxruntime against the patched graph, and a second client, onnxruntime in Node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import regsurgery
from regsurgery.backends import onnx
from regsurgery.backends.onnx import INEXACT, emit, reload
from regsurgery.checkpoints.sums import write_sums
from regsurgery.cli.app import main
from regsurgery.commands.patch import PatchResult
from regsurgery.compiler.surgery import Surgery, perform
from regsurgery.compiler.trace import tensor_inputs
from regsurgery.recipe import Recipe
from regsurgery.verification.measure import rounding
from regsurgery.verification.patched import folder_format
from tests.conftest import Planted, shared, tiered
from tests.e2e.test_parity import pictures, recipe_for
from tests.picos import PICOS, Pico, by_id
from tests.reference import outlier_patches

BATCHES = (1, 2, 7)
NODE = Path(__file__).parent / "node"

# Of each library, and what is special in a graph: gated MLPs, two towers, relative biases, a mask, noise as an input,
# rotary positions with registers in the prefix, a head over all tokens.
# A gated MLP, a text tower, a bias, a decoder, a mask, rotary positions; every library.
SAMPLES = ("hf-dinov2-swiglu", "hf-clip", "hf-beit-relative", "hf-mae-pretraining", "hf-idefics3", "timm-dinov3",
           "open-clip")  # fmt: skip
if os.environ.get("REGSURGERY_ONNX") == "all":  # minutes
    SAMPLES = tuple(pico.id for pico in PICOS)


def allowed(output: Tensor) -> float:
    return INEXACT * rounding(output)


def surgery_of(planted: Planted, **options: object) -> Surgery:
    return perform(planted.located, recipe_for(planted, 1, **options))


def assert_as_graph(folder: Path, surgery: Surgery) -> None:
    """The folder's model gives what the patched graph gives, and not what the original gives, on any batch."""
    program = reload(folder, {})
    for batch in BATCHES:
        inputs = tensor_inputs(surgery.loaded, pictures(batch, surgery.traced.image_size))
        with torch.no_grad():
            expected, original = surgery.graph_module(*inputs), surgery.traced.graph_module(*inputs)
        outputs = program(*inputs)
        assert list(outputs) == list(surgery.traced.output_names) and outputs.keys() == expected.keys()
        moved = 0.0
        for name, value in expected.items():
            assert outputs[name].shape == value.shape and outputs[name].dtype == value.dtype
            assert float((outputs[name] - value).abs().max()) <= allowed(value)
            if value.is_floating_point():
                moved = max(moved, float((original[name] - outputs[name]).abs().max()) / allowed(value))
        assert moved > 2  # times what may differ


@pytest.mark.parametrize("name", tiered(SAMPLES, ["hf-clip"]))
def test_onnxruntime_gives_what_the_patched_graph_gives(
    name: str, planted_picos: Callable[[Pico], Planted], tmp_path: Path
) -> None:
    surgery = surgery_of(planted_picos(by_id(name)))
    emit(surgery, tmp_path, tmp_path)
    assert_as_graph(tmp_path, surgery)
    state = onnx.state(tmp_path)
    for parameter, value in surgery.graph_module.named_parameters():
        assert parameter not in state or torch.equal(state[parameter], value)
    assert "register_tokens" in state or any(name.endswith(".register_tokens") for name in state)


@pytest.mark.slow
def test_every_kind_of_fill(planted_picos: Callable[[Pico], Planted], tmp_path: Path) -> None:
    surgery = surgery_of(planted_picos(by_id("hf-vit")), fill="outliers", prefix="fill", compat="reference")
    emit(surgery, tmp_path, tmp_path)
    assert_as_graph(tmp_path, surgery)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["native", "bias"])
def test_the_other_modes_patch_and_verify(
    mode: str, planted_picos: Callable[[Pico], Planted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regsurgery.verification.measure.MIN_COSINE_OUTPUT", -1.0)
    planted = planted_picos(by_id("hf-vit"))
    recipe = Recipe({block: tuple(neurons) for block, neurons in planted.neurons.items()})
    result = regsurgery.patch(
        str(planted.folder), tmp_path / "out", recipe=recipe, mode=mode, format="onnx", calibrate=False, num_images=8
    )
    assert folder_format(tmp_path / "out") == "onnx"
    again = regsurgery.verify(tmp_path / "out", num_images=8)
    for verdict in (result.verdict, again):
        assert verdict.passed and verdict.outliers_per_image.original > 0.5
        assert verdict.outliers_per_image.patched <= 0.1 * verdict.outliers_per_image.original
        assert 0 < verdict.parity_max_abs <= verdict.parity_allowed <= 1e-3


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_onnx(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "out"
    regsurgery.patch(str(demo_folder), folder, recipe="demo", format="onnx", num_images=8)
    return folder


@pytest.mark.slow
def test_the_same_surgery_twice_is_the_same_folder_without_paths(
    demo_folder: Path, demo_onnx: Path, tmp_path: Path
) -> None:
    import onnx

    regsurgery.patch(str(demo_folder), tmp_path / "out", recipe="demo", format="onnx", num_images=8)
    assert (tmp_path / "out" / "SHA256SUMS").read_text() == (demo_onnx / "SHA256SUMS").read_text()
    content = (demo_onnx / "model.onnx").read_bytes()
    assert b"site-packages" not in content and b".py" not in content
    model = onnx.load(demo_onnx / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("ScatterElements") == 2 and "ScatterND" not in kinds  # of which float16 crashes onnxruntime
    sizes = [model.graph.input[0].type.tensor_type.shape.dim, model.graph.output[0].type.tensor_type.shape.dim]
    assert [dims[0].dim_param for dims in sizes] == ["batch", "batch"]


@pytest.mark.slow
def test_large_weights_lie_in_a_file_of_their_own(
    planted_picos: Callable[[Pico], Planted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regsurgery.backends.onnx.MAX_ONE_FILE_BYTES", 0)
    surgery = surgery_of(planted_picos(by_id("timm-vit")))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        emit(surgery, tmp_path / name, tmp_path)
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert (tmp_path / "first" / "model.onnx.data").stat().st_size > (tmp_path / "first" / "model.onnx").stat().st_size
    (tmp_path / "first").rename(tmp_path / "moved")
    assert_as_graph(tmp_path / "moved", surgery)


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path, output: Path) -> str:
    command = ["regsurgery", "patch", str(model), "--recipe", "demo", "--format", "onnx", "-q", "-o", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and not list(output.parent.glob("*out*"))
    message = capsys.readouterr().err
    assert message.startswith("error: format onnx: ") and message.count("\n") == 1
    return message


def test_a_missing_package(demo_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = refused(monkeypatch, capsys, demo_folder, tmp_path / "out")
    assert "needs onnxruntime; install with" in message and "pip install 'regsurgery[onnx]'" in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dtype_that_onnxruntime_cannot_run(dtype, demo_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    half = shutil.copytree(demo_folder, tmp_path / "half")
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
    state = {name: value.to(dtype) for name, value in load_file(half / "model.safetensors").items()}
    save_file(state, half / "model.safetensors", metadata={"format": "pt"})
    message = refused(monkeypatch, capsys, half, tmp_path / "out")
    assert str(dtype).removeprefix("torch.") in message and "float32" in message


def test_an_operator_that_onnx_has_not(demo_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    class Unknown(torch.nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": torch.special.airy_ai(x)}

    program = torch.export.export(Unknown(), (torch.zeros(2, 3),))
    monkeypatch.setattr("regsurgery.backends.onnx.lowered", lambda module, inputs: program)
    message = refused(monkeypatch, capsys, demo_folder, tmp_path / "out")
    assert "special_airy_ai" in message and "\x1b" not in message


def test_a_broken_file(demo_onnx: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(demo_onnx, tmp_path / "broken")
    content = (broken / "model.onnx").read_bytes()
    (broken / "model.onnx").write_bytes(content[: len(content) // 2])
    write_sums(broken)
    with pytest.raises(regsurgery.errors.CheckpointError, match=r"model\.onnx: onnxruntime cannot load it"):
        regsurgery.load(broken)


# --- other processes ------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_the_real_vit_with_onnxruntime_and_numpy_alone(
    patched_real: Callable[[str, str], tuple[Path, PatchResult]], tmp_path: Path
) -> None:
    model = str(shared("models", "vit-tiny-transformers"))
    result = regsurgery.patch(
        model, tmp_path / "out", recipe="vit-tiny", format="onnx", images=shared("images", "labelled"), num_images=8
    )
    assert result.verdict.outliers_per_image.patched == 0 and 0 < result.verdict.parity_max_abs <= 1e-4
    images = pictures(max(BATCHES), (224, 224))
    np.save(tmp_path / "images.npy", images.numpy())
    program = (
        "import sys\n"
        "for name in ('regsurgery', 'torch', 'transformers'): sys.modules[name] = None\n"
        "import numpy as np, onnxruntime\n"
        "model, x = onnxruntime.InferenceSession('out/model.onnx'), np.load('images.npy')\n"
        f"for n in {BATCHES}: np.save(f'{{n}}.npy', model.run(None, {{'pixel_values': x[:n]}})[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        expected = regsurgery.load(patched_real("transformers", "shift")[0])(images).logits
    for batch in BATCHES:
        given = torch.from_numpy(np.load(tmp_path / f"{batch}.npy"))
        assert float((given - expected[:batch]).abs().max()) <= allowed(expected)
    quantised_it_has_no_outliers(tmp_path / "out" / "model.onnx", tmp_path / "int8.onnx", images[:2])


def quantised_it_has_no_outliers(program: Path, quantised: Path, images: Tensor) -> None:
    """A quarter of the size, and after each residual addition of each block no patch token is an outlier."""
    import onnx as onnx_package
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(program, quantised)
    assert quantised.stat().st_size <= 0.3 * program.stat().st_size
    graph = (model := onnx_package.load(quantised)).graph
    for node in [node for node in graph.node if node.op_type == "Add"]:
        graph.output.append(onnx_package.ValueInfoProto(name=node.output[0]))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    values = (torch.from_numpy(value) for value in session.run(None, {"pixel_values": images.numpy()}))
    streams = [value for value in values if value.ndim == 3 and value.shape[2] == 192 and value.shape[1] > 197]
    assert len(streams) >= 2 * 12
    for stream_BTD in streams:
        assert not outlier_patches(stream_BTD[:, 1:197].norm(dim=-1)).any()
    assert float(streams[-1][:, 197:].norm(dim=-1).min()) > 100, "the registers have the norm"


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the client and its packages. Where there is no Node the tests skip."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("needs node and npm")
    folder = shutil.copytree(NODE, tmp_path_factory.mktemp("node") / "client")
    # The install script would fetch CUDA libraries; the package has the CPU's.
    command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        message = f"npm cannot install onnxruntime-node from the registry: {done.stderr[-1000:]}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.mark.slow
def test_node_gives_what_the_patched_graph_gives(
    planted_picos: Callable[[Pico], Planted], node_client: Path, tmp_path: Path
) -> None:
    surgery = surgery_of(planted_picos(by_id("hf-vit-classes")))
    emit(surgery, tmp_path, tmp_path)
    batches = [pictures(batch, surgery.traced.image_size) for batch in (1, 3)]
    listed = []
    for index, images in enumerate(batches):
        (tmp_path / f"{index}.in").write_bytes(images.numpy().tobytes())
        listed.append({surgery.traced.image: {"file": f"{index}.in", "dims": list(images.shape)}})
    (tmp_path / "batches.json").write_text(json.dumps(listed))
    done = subprocess.run(
        ["node", str(node_client / "run.js"), str(tmp_path / "model.onnx"), str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for index, (images, shapes) in enumerate(zip(batches, json.loads(done.stdout), strict=True)):
        with torch.no_grad():
            expected, original = surgery.graph_module(images), surgery.traced.graph_module(images)
        assert shapes == {name: list(value.shape) for name, value in expected.items()}
        for name, value in expected.items():
            raw = np.fromfile(tmp_path / f"{index}.{name}.out", dtype=np.float32)
            given = torch.from_numpy(raw).reshape(value.shape)
            assert float((given - value).abs().max()) <= allowed(value)
            assert float((given - original[name]).abs().max()) > 10 * allowed(value)
