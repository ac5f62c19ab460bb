"""Registers that follow the image size, and images of another size than the model's own."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import regsurgery
from regsurgery.backends.formats import backend
from regsurgery.compiler.located import Located
from regsurgery.compiler.surgery import perform
from regsurgery.compiler.trace import tensor_inputs
from regsurgery.emit.run_record import read_run_record
from regsurgery.errors import UserError
from regsurgery.frontends.image_size import at_image_size
from regsurgery.frontends.libraries import frontend
from regsurgery.frontends.load import load
from regsurgery.models import locate
from regsurgery.progress import Progress
from regsurgery.recipe import Recipe
from regsurgery.runtime.surgery import operate
from regsurgery.verification import size_drift
from regsurgery.verification.pair import open_pair
from tests.conftest import Planted, tiered
from tests.e2e.test_parity import hooked_model, largest_difference, pictures
from tests.photos import write_photos
from tests.picos import Pico, by_id

DEFAULT = ("hf-vit-classes", "hf-beit-relative")
GROWING = ("hf-vit", "hf-vit-classes", "hf-dinov2", "hf-beit-relative", "hf-beit-shared", "hf-data2vec", "hf-clip",
           "hf-idefics3", "timm-vit", "timm-dinov2", "open-clip")  # fmt: skip
ONE_SIZE = ("timm-relpos", "timm-beit", "hf-aimv2", "open-clip-over-timm")
SIZES = {(64, 64): 2, (96, 96): 5, (32, 64): 1, (128, 128): 8}


def growing(planted: Planted, num_registers: int = 2, num_patches: int | None = None) -> Recipe:
    neurons = {block: tuple(listed) for block, listed in planted.neurons.items()}
    own = planted.sites.num_tokens - planted.sites.num_prefix
    return Recipe(
        neurons, num_registers=num_registers, num_patches=num_patches or own, scale=(0.5,) * num_registers
    )  # fmt: skip


@pytest.mark.parametrize("name", tiered(GROWING, DEFAULT))
def test_module_form_equals_the_graph_of_every_size(name: str, planted_picos: Callable[[Pico], Planted]) -> None:
    planted = planted_picos(by_id(name))
    recipe, tolerance = growing(planted), planted.pico.tolerance
    block = perform(planted.located, recipe).config_block
    assert (block["num_registers"], block["num_patches"]) == (2, 64)
    for size, num_registers in SIZES.items():
        if size == (64, 64) and not planted.pico.bias:  # its own size, as in test_parity.py
            continue
        loaded = frontend(planted.loaded.library).at_size(planted.loaded, size)
        located = locate(loaded, Progress(), size)
        traced, sites = located.traced, located.sites
        surgery = perform(Located(loaded, traced, sites), recipe)
        assert surgery.plan.num_registers == num_registers
        assert surgery.config_block == block
        (added,) = surgery.new_tensors().values()
        assert added.shape == (1, 2, sites.width)
        images = pictures(3, size)
        fixed = replace(recipe, num_registers=num_registers, num_patches=None, scale=(0.5,) * num_registers)
        with torch.no_grad():
            graph = surgery.graph_module(*tensor_inputs(loaded, images))
            module = operate(copy.deepcopy(loaded.model), block)
            assert largest_difference(graph, loaded.call(module, images)) <= tolerance
            hooked = hooked_model(replace(planted, located=replace(planted.located, loaded=loaded)), fixed)
            if not planted.pico.bias or size == (64, 64):  # the reference's hooks do not know interpolated biases
                assert largest_difference(graph, loaded.call(hooked, images)) <= tolerance
            if num_registers != 2:
                two = perform(Located(loaded, traced, sites), replace(recipe, num_patches=None)).graph_module
                assert largest_difference(graph, two(*tensor_inputs(loaded, images))) > 1e-4


@pytest.mark.parametrize("name", ONE_SIZE)
def test_models_of_one_size_take_what_a_recipe_of_another_says(
    name: str, planted_picos: Callable[[Pico], Planted]
) -> None:
    planted = planted_picos(by_id(name))
    own = planted.sites.num_tokens - planted.sites.num_prefix
    surgery = perform(planted.located, growing(planted, 2, own // 2))
    assert surgery.plan.num_registers == 4
    images = pictures(3, planted.loaded.image_size)
    with torch.no_grad():
        graph = surgery.graph_module(*tensor_inputs(planted.loaded, images))
        module = operate(copy.deepcopy(planted.loaded.model), surgery.config_block)
        assert largest_difference(graph, planted.loaded.call(module, images)) <= planted.pico.tolerance
    with pytest.raises(UserError, match=r"takes only images of .* pixels"):
        at_image_size(planted.loaded, 2 * planted.loaded.image_size[0])


@pytest.mark.parametrize("name", ["timm-reg4", "hf-dinov3"])
def test_inside_the_prefix_the_number_is_fixed(
    name: str, planted_picos: Callable[[Pico], Planted], tmp_path: Path
) -> None:
    planted = planted_picos(by_id(name))
    own = planted.sites.num_tokens - planted.sites.num_prefix
    surgery = perform(planted.located, growing(planted, 2, own // 2))
    assert (surgery.plan.num_registers, surgery.config_block["num_patches"]) == (2, None)
    sizes = regsurgery.patch(
        str(planted.folder), tmp_path / "out", recipe=growing(planted, 2, own // 2), num_images=8
    ).sizes
    note = "the registers are inside the prefix: there are 2 at every image size"
    assert (note in sizes.notes) == (len(sizes.rows) > 1) and {row.num_registers for row in sizes.rows} == {2}


def test_shapes_gradients_and_hosts_at_another_size(planted_picos: Callable[[Pico], Planted]) -> None:
    planted = planted_picos(by_id("hf-vit-classes"))
    block = perform(planted.located, growing(planted)).config_block
    stock = copy.deepcopy(planted.loaded.model)
    stock.set_attn_implementation("eager")  # type: ignore[operator]
    model = operate(copy.deepcopy(stock), block)
    images = pictures(2, (128, 128))
    given = {"pixel_values": images, "interpolate_pos_encoding": True, "output_hidden_states": True,
             "output_attentions": True}  # fmt: skip
    before, after = stock(**given), model(**given)
    assert len(after.hidden_states) == len(before.hidden_states) == 5
    assert all(a.shape == b.shape for a, b in zip(after.hidden_states, before.hidden_states, strict=True))
    assert all(a.shape == b.shape for a, b in zip(after.attentions, before.attentions, strict=True))
    sums = after.attentions[-1].sum(dim=-1)
    assert float(sums.max()) < 1 and float(sums.min()) > 0
    after.logits.sum().backward()
    (gradient,) = [p.grad for n, p in model.named_parameters() if n.endswith("register_tokens")]
    assert gradient is not None and gradient.shape == (1, 2, 64) and float(gradient.abs().min(dim=1).values.max()) > 0
    with torch.no_grad():
        plain = model(pixel_values=images, interpolate_pos_encoding=True).logits
        again = copy.deepcopy(model)(pixel_values=images, interpolate_pos_encoding=True).logits
        assert torch.equal(plain, again)
    bare = planted_picos(by_id("hf-vit"))
    kept = operate(
        copy.deepcopy(bare.loaded.model),
        perform(bare.located, growing(bare)).config_block,
        keep_registers=True,
    )
    with torch.no_grad():
        for size, num_registers in SIZES.items():
            tokens = kept(pictures(2, size), interpolate_pos_encoding=True).last_hidden_state
            assert tokens.shape[1] == 1 + size[0] * size[1] // 64 + num_registers


@pytest.mark.slow
def test_compiled_exported_and_traced(planted_picos: Callable[[Pico], Planted]) -> None:
    planted = planted_picos(by_id("timm-vit"))
    block = perform(planted.located, growing(planted)).config_block
    loaded = frontend("timm").at_size(planted.loaded, (96, 96))
    model = operate(copy.deepcopy(loaded.model), block).eval()
    images = pictures(3, (96, 96))
    with torch.no_grad():
        expected = model(images)
        exported = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(exported(images), expected, rtol=0, atol=1e-5)
        scripted = torch.jit.trace(model, images, check_trace=False)  # type: ignore[attr-defined]
        torch.testing.assert_close(scripted(images), expected, rtol=0, atol=1e-5)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for size in ((96, 96), (64, 64), (128, 128)):
            other = pictures(2, size)
            torch.testing.assert_close(compiled(other), model(other), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf-vit-classes", "timm-vit", "open-clip"])
def test_patched_at_another_size(name: str, planted_picos: Callable[[Pico], Planted], tmp_path: Path) -> None:
    planted = planted_picos(by_id(name))
    folder = tmp_path / "patched"
    result = regsurgery.patch(
        str(planted.folder), folder, recipe=growing(planted), image_size=96, num_images=8
    )  # fmt: skip
    assert result.verdict.outliers_per_image.patched == 0 and result.verdict.parity_max_abs <= 1e-5
    assert [(row.image_size, row.num_registers) for row in result.sizes.rows] == [
        ((96, 96), 5), ((144, 144), 10), ((192, 192), 18)
    ]  # fmt: skip
    assert result.as_dict()["sizes"][0]["num_images"] == size_drift.MIN_IMAGES
    record = read_run_record(folder)
    assert record["run"]["image_size"] == 96 and len(record["sizes"]) == 3
    card = (folder / "README.md").read_text()
    assert f"| 144x144 | 10 | {size_drift.MIN_IMAGES} |" in card and "follows the image size" in card
    for size in (None, 128):
        verdict = regsurgery.verify(folder, image_size=size, num_images=8)
        assert verdict.passed and verdict.parity_max_abs <= 1e-5
    assert regsurgery.reproduce(folder).identical
    with open_pair(folder) as pair:
        surgery = pair.at_size((128, 128)).surgery
        assert surgery is not None and surgery.plan.num_registers == 8


def test_a_program_keeps_its_size(planted_picos: Callable[[Pico], Planted], tmp_path: Path) -> None:
    planted = planted_picos(by_id("timm-vit"))
    folder = tmp_path / "program"
    result = regsurgery.patch(
        str(planted.folder), folder, recipe=growing(planted), format="pt2", image_size=96, num_images=8
    )
    assert [row.image_size for row in result.sizes.rows] == [(96, 96)]
    assert result.sizes.notes == ("the written model takes only images of 96x96 pixels",)
    config = json.loads((folder / "regsurgery.json").read_text())
    assert config["image_size"] == [96, 96]
    assert (config["regsurgery"]["num_registers"], config["regsurgery"]["num_patches"]) == (5, None)
    assert regsurgery.verify(folder, num_images=8).passed
    with pytest.raises(UserError, match=r"holds a program .* takes only images of \[96, 96\]"):
        regsurgery.verify(folder, image_size=64, num_images=8)


def test_a_folder_without_the_key_is_fixed(planted_picos: Callable[[Pico], Planted]) -> None:
    planted = planted_picos(by_id("hf-vit"))
    recipe = replace(growing(planted), num_patches=None)
    block = perform(planted.located, recipe).config_block
    older = {name: value for name, value in block.items() if name != "num_patches"}
    images = pictures(2, (128, 128))
    with torch.no_grad():
        outputs = [planted.loaded.call(operate(copy.deepcopy(planted.loaded.model), b), images) for b in (block, older)]
    assert largest_difference(*outputs) == 0


@pytest.mark.slow
def test_a_fresh_process_loads_it_at_another_size(
    planted_picos: Callable[[Pico], Planted], tmp_path: Path
) -> None:  # fmt: skip
    planted = planted_picos(by_id("hf-vit-classes"))
    folder = tmp_path / "patched"
    surgery = perform(planted.located, growing(planted))
    folder.mkdir()
    backend("transformers").emit(surgery, folder, folder)
    images = pictures(2, (128, 128))
    with torch.no_grad():
        expected = planted.loaded.call(operate(copy.deepcopy(planted.loaded.model), surgery.config_block), images)
    torch.save({"images": images, "logits": expected["logits"]}, tmp_path / "inputs.pt")
    script = (
        "import sys; sys.modules['regsurgery'] = None\n"
        "import torch\nfrom transformers import AutoModelForImageClassification\n"
        f"given = torch.load({str(tmp_path / 'inputs.pt')!r})\n"
        f"model = AutoModelForImageClassification.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()\n"
        "with torch.no_grad():\n"
        "    found = model(given['images'], interpolate_pos_encoding=True).logits\n"
        "assert float((found - given['logits']).abs().max()) <= 1e-5\nprint('same')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "same" in done.stdout


@pytest.mark.parametrize("size, said", [(97, "multiple of 8, such as 96 or 104"), (10**9, "must be from 1 to")])
def test_a_size_that_cannot_be(size: int, said: str, planted_picos: Callable[[Pico], Planted], tmp_path: Path) -> None:
    planted = planted_picos(by_id("hf-vit"))
    with pytest.raises(UserError, match=said):
        regsurgery.patch(str(planted.folder), tmp_path / "out", recipe=growing(planted), image_size=size)
    assert not (tmp_path / "out").exists()


def test_drift_at_sizes_uses_up_to_16_photos_and_fewer_for_costly_sizes(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(size_drift, "MAX_IMAGES", 16)
    files = write_photos(tmp_path / "photos", 20)

    def counts(name: str, **options: Any) -> list[int]:
        result = regsurgery.patch(str(demo_folder), tmp_path / name, recipe="demo", **options)
        assert result.sizes is not None and len(result.sizes.rows) == 3
        return [row.num_images for row in result.sizes.rows]

    assert counts("a", images=files) == [16, 16, 16]
    assert counts("b", num_images=20) == [4, 4, 4], "generated pictures say less"
    num_parameters = sum(parameter.numel() for parameter in load(str(demo_folder)).model.parameters())
    monkeypatch.setattr(size_drift, "MAX_WORK", 5.5 * num_parameters * (192 // 8) ** 2)
    assert counts("c", images=files) == [16, 9, 5]
