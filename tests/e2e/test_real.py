"""The real ViT-Ti in three libraries' formats: figures, agreement, and what users do with the folders.

Figures are taken by this file, from reloaded folders, with hooks on the block outputs, not by the verification.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import regsurgery
from regsurgery.checkpoints.safetensors_file import read_header
from regsurgery.checkpoints.sums import sha256
from regsurgery.cli.app import main
from regsurgery.commands.patch import PatchResult
from regsurgery.frontends.load import load
from tests.conftest import Job, shared
from tests.e2e.test_reload import EVERYTHING, run_fresh, transformers_4_python
from tests.reference import outlier_patches

pytestmark = pytest.mark.real

FOLDERS = {"transformers": "vit-tiny-transformers", "timm": "vit-tiny-timm", "open_clip": "vit-tiny-openclip"}
BLOCK_10 = {"transformers": "vit.layers.10", "timm": "blocks.10", "open_clip": "visual.transformer.resblocks.10"}
FIRST = 40  # photos that the models of transformers and open_clip are compared on with timm's
LIBRARIES = pytest.mark.parametrize("library", list(FOLDERS))


@pytest.fixture(scope="module")
def patched(patched_real: Callable[[str, str], tuple[Path, PatchResult]]) -> dict[str, tuple[Path, PatchResult]]:
    return {library: patched_real(library, "shift") for library in FOLDERS}


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """All labelled photos, preprocessed once, by timm's transform for this network: `[175, 3, 224, 224]`."""
    preprocess = load(str(shared("models", FOLDERS["timm"]))).preprocess
    return preprocess([Image.open(path).convert("RGB") for path in sorted(shared("images", "labelled").glob("*.jpg"))])


def logits_of(library: str, model: nn.Module, images: Tensor) -> Tensor:
    if library == "transformers":
        return model(images).logits
    if library == "timm":
        return model(images)
    head = load_file(shared("models", FOLDERS["open_clip"], "zero_shot_head.safetensors"))
    return model.encode_image(images) @ head["class_embeddings"].T + head["class_bias"]  # type: ignore[operator]


@torch.no_grad()
def run(library: str, model: nn.Module, photos: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and patch norms after block 10, of every photo."""
    norms: list[Tensor] = []
    handle = model.get_submodule(BLOCK_10[library]).register_forward_hook(
        lambda module, args, output: norms.append(
            (output[0] if isinstance(output, tuple) else output)[:, 1:197].norm(dim=-1)
        )
    )
    logits = torch.cat([logits_of(library, model, batch) for batch in photos.split(25)])
    handle.remove()
    return logits, torch.cat(norms)


@pytest.fixture(scope="module")
def measured(patched: dict[str, tuple[Path, PatchResult]], photos: Tensor) -> dict[str, dict[str, Any]]:
    """All photos in timm; the first ones in the other libraries, which must agree on them."""
    results = {}
    for library, name in FOLDERS.items():
        own = photos if library == "timm" else photos[:FIRST]
        logits, norms = run(library, load(str(shared("models", name))).model, own)
        new_logits, new_norms = run(library, regsurgery.load(patched[library][0]), own)
        results[library] = {"logits": logits, "new_logits": new_logits, "norms": norms, "new_norms": new_norms}
    return results


def outliers_per_image(norms: Tensor) -> float:
    return float(outlier_patches(norms).sum(dim=1).float().mean())


def test_outliers_are_gone_and_the_classes_stay(measured: dict[str, dict[str, Any]]) -> None:
    m = measured["timm"]
    kl = F.kl_div(m["new_logits"].log_softmax(-1), m["logits"].log_softmax(-1), reduction="batchmean", log_target=True)
    same = (m["new_logits"].argmax(-1) == m["logits"].argmax(-1)).float().mean()
    largest, new_largest = m["norms"].amax(dim=1).mean(), m["new_norms"].amax(dim=1).mean()
    print(
        f"outliers {outliers_per_image(m['norms']):.2f} -> {outliers_per_image(m['new_norms']):.2f}, "
        f"max norm {largest:.0f} -> {new_largest:.0f}, KL {kl:.4f}, same argmax {same:.3f}"
    )
    assert len(m["logits"]) == 175
    assert outliers_per_image(m["norms"]) == pytest.approx(3.9, abs=0.05)
    assert outliers_per_image(m["new_norms"]) < 0.05
    assert float(largest) == pytest.approx(546, abs=3)
    assert float(new_largest) == pytest.approx(25.4, abs=1)
    assert float(kl) <= 0.012
    assert float(same) >= 0.96


def test_top_1_is_that_of_the_reference(measured: dict[str, dict[str, Any]]) -> None:
    labels = torch.tensor([int(path.name.split("_")[0]) for path in sorted(shared("images", "labelled").glob("*.jpg"))])
    top_1 = {
        key: float((measured["timm"][key].argmax(-1) == labels).float().mean()) for key in ("logits", "new_logits")
    }
    assert top_1["logits"] == pytest.approx(0.806, abs=0.001)
    assert top_1["new_logits"] >= 0.795


@pytest.mark.parametrize("library", ["transformers", "open_clip"])
def test_the_other_libraries_models_agree(library: str, measured: dict[str, dict[str, Any]]) -> None:
    m, timm = measured[library], measured["timm"]
    assert outliers_per_image(m["norms"]) > 3 and outliers_per_image(m["new_norms"]) < 0.05
    assert float((m["logits"] - timm["logits"][:FIRST]).abs().max()) <= 1e-4
    difference = float((m["new_logits"] - timm["new_logits"][:FIRST]).abs().max())
    print(f"{library} - timm: {difference:.1e}")
    assert difference <= 1e-4
    torch.testing.assert_close(m["norms"], timm["norms"][:FIRST], rtol=1e-3, atol=0)
    torch.testing.assert_close(m["new_norms"], timm["new_norms"][:FIRST], rtol=1e-3, atol=0)


@LIBRARIES
def test_patch_reports_what_it_did(library: str, patched: dict[str, tuple[Path, PatchResult]]) -> None:
    folder, result = patched[library]
    assert result.verdict.passed and result.format == library and result.output == str(folder)
    assert result.verdict.outliers_per_image.patched < 0.05 < result.verdict.outliers_per_image.original
    assert result.verdict.parity_max_abs <= (1e-5 if library == "open_clip" else 0)


@LIBRARIES
def test_original_tensors_are_byte_identical(library: str, patched: dict[str, tuple[Path, PatchResult]]) -> None:
    (original,), folder = load(str(shared("models", FOLDERS[library]))).weights, patched[library][0]
    before, after = read_header(original), read_header(folder / original.name)
    old, new = original.read_bytes(), (folder / original.name).read_bytes()
    found = {tensor.name: tensor for tensor in after.tensors}
    for tensor in before.tensors:
        twin = found.pop(tensor.name)
        assert (tensor.dtype, tensor.shape) == (twin.dtype, twin.shape)
        assert (
            old[before.data_start + tensor.start : before.data_start + tensor.stop]
            == new[after.data_start + twin.start : after.data_start + twin.stop]
        )
    assert [name.split(".")[-1] for name in found] == ["register_tokens"]
    assert {path.name for path in original.parent.iterdir()} <= {path.name for path in folder.iterdir()}


@LIBRARIES
def test_unpatch_gives_back_the_bytes_of_every_file(
    library: str, patched: dict[str, tuple[Path, PatchResult]], tmp_path: Path
) -> None:
    source, folder = shared("models", FOLDERS[library]), patched[library][0]
    done = subprocess.run(
        [sys.executable, "-m", "regsurgery", "unpatch", str(folder), "-o", str(tmp_path / "restored")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after = ({path.name: sha256(path) for path in root.iterdir()} for root in (source, tmp_path / "restored"))
    assert before == after
    record = (folder / "regsurgery_original.json").stat().st_size
    print(f"{library}: record {record} bytes")
    assert record < 40_000
    assert regsurgery.diff(source, tmp_path / "restored").identical


@LIBRARIES
def test_source_and_patched_differ_in_the_registers_alone(
    library: str, patched: dict[str, tuple[Path, PatchResult]]
) -> None:
    source, folder = shared("models", FOLDERS[library]), patched[library][0]
    found, back = regsurgery.diff(source, folder), regsurgery.diff(folder, source)
    assert [tensor.name.split(".")[-1] for tensor in found.only_b] == ["register_tokens"]
    assert back.only_a == found.only_b
    for one in (found, back):
        assert (one.retyped, one.changed, one.num_identical) == ((), (), found.num_identical)
    assert found.only_a == back.only_b == () and found.num_identical > 100


def test_the_same_input_gives_the_same_bytes(patched: dict[str, tuple[Path, PatchResult]], tmp_path: Path) -> None:
    Job("timm", "shift").run(tmp_path / "again")
    assert (tmp_path / "again" / "SHA256SUMS").read_text() == (patched["timm"][0] / "SHA256SUMS").read_text()


def fresh_jobs(
    patched: dict[str, tuple[Path, PatchResult]], photos: Tensor, libraries: list[str]
) -> list[dict[str, Any]]:
    text = torch.zeros(7, 77, dtype=torch.int64)
    inputs = {
        "transformers": {"pixel_values": photos[:7]},
        "timm": {"x": photos[:7]},
        "open_clip": {"image": photos[:7], "text": text},
    }
    return [
        {
            "collects": EVERYTHING,
            "entry": "",
            "library": library,
            "folder": str(patched[library][0]),
            "source": str(shared("models", FOLDERS[library])),
            "architecture": "ViTForImageClassification",
            "auto_class": "AutoModelForImageClassification",
            "output": "logits",
            "inputs": inputs[library],
        }
        for library in libraries
    ]


def check_fresh(results: list[dict[str, Any]], libraries: list[str], measured: dict[str, dict[str, Any]]) -> None:
    head = load_file(shared("models", FOLDERS["open_clip"], "zero_shot_head.safetensors"))
    for library, result in zip(libraries, results, strict=True):
        assert result["problems"] == []
        assert set(result["outputs"]) == {1, 2, 7}
        for size, outputs in result["outputs"].items():
            wanted = measured[library]["new_logits"][:size]
            if library == "open_clip":  # its forward normalises the features
                embedding = outputs["image_features"]
                wanted = torch.linalg.lstsq(head["class_embeddings"], (wanted - head["class_bias"]).T).solution.T
                torch.testing.assert_close(embedding, F.normalize(wanted, dim=-1), rtol=0, atol=1e-5)
            else:
                torch.testing.assert_close(
                    outputs["logits"], wanted, rtol=0, atol=2e-5
                )  # they reach 17; batches of other sizes


def test_a_fresh_process_reproduces_the_figures(
    patched: dict[str, tuple[Path, PatchResult]], photos: Tensor, measured: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    libraries = list(FOLDERS)
    check_fresh(run_fresh(fresh_jobs(patched, photos, libraries), tmp_path / "jobs.pt"), libraries, measured)


def test_transformers_4_reproduces_the_figures(
    patched: dict[str, tuple[Path, PatchResult]], photos: Tensor, measured: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    jobs = fresh_jobs(patched, photos, ["transformers"])
    check_fresh(run_fresh(jobs, tmp_path / "jobs.pt", transformers_4_python()), ["transformers"], measured)


@pytest.mark.parametrize("version", ["4.57", "5"])
def test_users_can_do_what_they_do_with_transformers_models(
    version: str,
    patched: dict[str, tuple[Path, PatchResult]],
    photos: Tensor,
    measured: dict[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    python = transformers_4_python() if version == "4.57" else sys.executable
    torch.save({"images": photos[:7], "logits": measured["transformers"]["new_logits"][:7]}, tmp_path / "inputs.pt")
    image = min(shared("images", "labelled").glob("*tiger_shark*"), default=min(shared("images", "labelled").iterdir()))
    done = subprocess.run(
        [
            python,
            str(Path(__file__).with_name("fresh_transformers.py")),
            str(patched["transformers"][0]),
            str(tmp_path / "inputs.pt"),
            str(tmp_path),
            str(image),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_a_pt2_needs_torch_alone(photos: Tensor, measured: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    library = "open_clip"  # which has texts as inputs too
    regsurgery.patch(
        str(shared("models", FOLDERS[library])),
        tmp_path / "pt2",
        recipe="vit-tiny",
        format="pt2",
        images=shared("images", "labelled"),
        num_images=2,
    )
    torch.save(photos[:7], tmp_path / "images.pt")
    program = (
        "import sys\n"
        "for name in ('regsurgery', 'transformers', 'timm', 'open_clip', 'torchvision'): sys.modules[name] = None\n"
        "import torch\n"
        "model, x = torch.export.load('pt2/model.pt2').module(), torch.load('images.pt')\n"
        "text = torch.zeros(7, 77, dtype=torch.int64)\n"
        "with torch.no_grad():\n"
        "    torch.save({n: dict(model(x[:n], text[:n])) for n in (1, 2, 7)}, 'out.pt')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    check_fresh([{"problems": [], "outputs": torch.load(tmp_path / "out.pt")}], [library], measured)


def test_verify_repeats_the_figures_of_patch(
    patched: dict[str, tuple[Path, PatchResult]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = patched["timm"]
    arguments = [
        "regsurgery",
        "verify",
        str(folder),
        "--json",
        "--images",
        str(shared("images", "labelled")),
        "--num-images",
        str(Job.NUM_IMAGES),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert json.loads(capsys.readouterr().out) == result.verdict.as_dict()


def test_a_half_precision_model_stays_in_half_precision(tmp_path: Path) -> None:
    recipe = regsurgery.Recipe({5: (3,)})
    result = regsurgery.patch(str(shared("models", "dinov2-small")), tmp_path / "out", recipe=recipe, num_images=2)
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    added = next(tensor for tensor in read_header(weights).tensors if tensor.name == "register_tokens")
    assert (added.dtype, added.shape) == ("F16", (1, 1, 384))
    assert result.verdict.outliers_per_image.original == 0
