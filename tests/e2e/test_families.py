"""What families have beyond the parity gate: placement, traps with their cures, precisions, attention, LLaVA whole."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import regsurgery
from regsurgery import cli, match, trace, verification
from regsurgery.backends import pt2
from regsurgery.errors import UnsupportedModelError
from regsurgery.loading import load
from regsurgery.match import match as find_sites
from regsurgery.recipe import Recipe
from regsurgery.surgery import perform
from regsurgery.trace import tensor_inputs
from tests.conftest import Planted, build_planted
from tests.e2e.test_parity import largest_difference, module_form, pictures, recipe_for
from tests.e2e.test_reload import transformers_4_python
from tests.picos import PICOS, SIZE, Pico
from tests.reference import hook


def by_id(name: str) -> Pico:
    return next(pico for pico in PICOS if pico.id == name)


def hooked_model(planted: Planted, recipe: Recipe) -> torch.nn.Module:
    """The hooked reference of the parity gate."""
    pico, model = planted.pico, copy.deepcopy(planted.loaded.model)
    hook(
        model, insert=pico.insert, last=pico.last, down=pico.down, neurons=planted.neurons,
        num_registers=recipe.num_registers, num_prefix=pico.prefix, scale=recipe.scale, inside=pico.inside,
        prefixed=pico.prefixed, bias=pico.bias, masked=pico.masked, collector=pico.collector,
    )  # fmt: skip
    return model


# ViTMAE's decoder, Data2Vec and AIMv2's pooling keep to SDPA.
SDPA_ONLY = ("hf-mae-pretraining", "hf-data2vec", "hf-aimv2")
SWITCHABLE = [pico for pico in PICOS if pico.id.startswith("hf-") and pico.id not in SDPA_ONLY]


@pytest.mark.parametrize("pico", SWITCHABLE, ids=lambda pico: pico.id)
def test_eager_attention(pico: Pico, planted_picos: Callable[[Pico], Planted]) -> None:
    """Traced from eager attention, where biases and masks are added to the scores."""
    planted = planted_picos(pico)
    loaded = planted.loaded
    recipe = recipe_for(planted, 1)
    loaded.model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        traced = trace.trace(loaded)
        assert not any("scaled_dot_product" in node.name for node in traced.graph_module.graph.nodes), "not eager"
        surgery = perform(loaded, recipe, traced, find_sites(traced))
        images = pictures(3, (SIZE, SIZE))
        with torch.no_grad():
            graph = surgery.graph_module(*tensor_inputs(loaded, images))
            assert largest_difference(graph, loaded.call(module_form(planted, surgery), images)) == 0
            assert largest_difference(graph, loaded.call(hooked_model(planted, recipe), images)) == 0
    finally:
        loaded.model.set_attn_implementation("sdpa")  # type: ignore[operator]


@pytest.mark.parametrize("pico", PICOS, ids=lambda pico: pico.id)
def test_pt2(pico: Pico, planted_picos: Callable[[Pico], Planted]) -> None:
    planted = planted_picos(pico)
    surgery = perform(planted.loaded, recipe_for(planted, 1), planted.traced, planted.sites)
    program = pt2.lower(surgery).module()
    for batch in (1, 5):
        inputs = tensor_inputs(planted.loaded, pictures(batch, (SIZE, SIZE)))
        with torch.no_grad():
            difference = largest_difference(program(*inputs), surgery.graph_module(*inputs))
        assert difference <= 1e-5


# --- the traps of REFERENCE.md, each with its cure removed ------------------------------------------------------------


def test_beit_is_off_by_the_mask_that_exporting_builds(planted_picos: Callable[[Pico], Planted]) -> None:
    """Left to itself transformers builds an all-true mask while exporting, and BEiT adds it to its biases."""
    planted = planted_picos(by_id("hf-beit-relative"))
    loaded, recipe = planted.loaded, recipe_for(planted, 1)
    images = pictures(3, (SIZE, SIZE))
    differences = []
    for cure in (nullcontext(), mock.patch.object(trace, "_export_settings", nullcontext)):
        with cure:
            traced = trace.trace(loaded)
        surgery = perform(loaded, recipe, traced, find_sites(traced))
        with torch.no_grad():
            graph = surgery.graph_module(*tensor_inputs(loaded, images))
            differences.append(largest_difference(graph, loaded.call(hooked_model(planted, recipe), images)))
    assert differences[0] == 0 and differences[1] > 1e-3


@pytest.mark.parametrize("name", ["hf-beit-relative", "hf-beit-shared", "hf-data2vec", "timm-beit", "timm-relpos"])
def test_without_padding_a_relative_bias_has_no_room(name: str, planted_picos: Callable[[Pico], Planted]) -> None:
    planted = planted_picos(by_id(name))
    with (
        mock.patch.object(sys.modules["regsurgery.passes.resize_tokens"], "_pad", lambda *args: []),
        pytest.raises(UnsupportedModelError, match="no room for a register: shapes do not fit"),
    ):
        perform(planted.loaded, recipe_for(planted, 1), planted.traced, planted.sites)


INSIDE = [pico for pico in PICOS if pico.inside]


@pytest.mark.parametrize("pico", INSIDE, ids=lambda pico: pico.id)
def test_rotary_attention_takes_no_register_at_the_end(pico: Pico, planted_picos: Callable[[Pico], Planted]) -> None:
    """There the last N tokens are taken for the patches: without the refusal the wrong ones are rotated, silently."""
    planted = planted_picos(pico)
    at_the_end = replace(planted.sites, placement="end")
    recipe = recipe_for(planted, 1)
    with pytest.raises(UnsupportedModelError, match=r"tells them apart by their position \(node '.*attn|attention"):
        perform(planted.loaded, recipe, planted.traced, at_the_end)
    if pico.prefixed:
        inside = perform(planted.loaded, recipe, planted.traced, planted.sites)
        images = pictures(3, (SIZE, SIZE))
        unaware = mock.patch("regsurgery.runtime._make_room", lambda *args: None)
        with torch.no_grad(), unaware:
            graph = inside.graph_module(*tensor_inputs(planted.loaded, images))
            with pytest.raises(RuntimeError, match="size"):
                assert largest_difference(graph, planted.loaded.call(module_form(planted, inside), images)) == 0
                raise RuntimeError("no size mismatch")


@pytest.mark.parametrize("name", ["hf-vit", "hf-clip-vision", "timm-dinov2", "hf-dinov2-registers"])
def test_placement_does_not_matter_where_attention_knows_no_position(
    name: str, planted_picos: Callable[[Pico], Planted]
) -> None:
    planted = planted_picos(by_id(name))
    images = pictures(3, (SIZE, SIZE))
    outputs = []
    for placement in ("end", "prefix"):
        surgery = perform(
            planted.loaded, recipe_for(planted, 2), planted.traced, replace(planted.sites, placement=placement)
        )
        with torch.no_grad():
            outputs.append(surgery.graph_module(*tensor_inputs(planted.loaded, images)))
            module = planted.loaded.call(module_form(planted, surgery), images)
        assert largest_difference(outputs[-1], module) == 0
    assert largest_difference(*outputs) <= 2e-5


def test_a_pre_norm_is_behind_the_registers(planted_picos: Callable[[Pico], Planted]) -> None:
    """A zero register behind `ln_pre` would skip it: the tokens node is the one before."""
    planted = planted_picos(by_id("hf-clip-vision"))
    tokens = next(node for node in planted.traced.graph_module.graph.nodes if node.name == planted.sites.tokens)
    assert any(user.target in match.NORMS for user in tokens.users)


# --- trained registers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hf-dinov2-registers", "hf-dinov3", "timm-reg4", "timm-dinov3"])
def test_models_with_trained_registers_are_patched_on_request(
    name: str, planted_picos: Callable[[Pico], Planted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    planted = planted_picos(by_id(name))
    command = ["regsurgery", "patch", str(planted.folder), "-o", str(tmp_path / "out"), "--num-images", "16", "--json"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 3 and not (tmp_path / "out").exists()
    assert json.loads(capsys.readouterr().out)["verdict"] == "already_registered"
    monkeypatch.setattr(verification, "MIN_COSINE_OUTPUT", -1.0)
    monkeypatch.setattr(sys, "argv", [*command, "--force"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    found = json.loads(capsys.readouterr().out)["register_neurons"]
    assert {int(block): neurons for block, neurons in found.items()} == planted.neurons
    config = json.loads((tmp_path / "out" / "config.json").read_text())["regsurgery"]
    assert config["placement"] == ("prefix" if planted.pico.inside else "end") and config["num_prefix"] == 5


# --- precisions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["hf-vit-classes", "hf-beit-relative", "hf-dinov3", "timm-eva02", "open-clip"])
def test_half_precision_stays(
    name: str, dtype: torch.dtype, planted_picos: Callable[[Pico], Planted], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(verification, "MIN_COSINE_OUTPUT", -1.0)
    pico = by_id(name)
    planted = planted_picos(pico)
    folder = tmp_path / "model"
    pico.build(folder)
    (path,) = load(str(folder)).weights
    (source,) = planted.loaded.weights
    save_file({key: value.to(dtype) for key, value in load_file(source).items()}, path, metadata={"format": "pt"})
    if planted.loaded.library == "transformers":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
    recipe = Recipe({block: tuple(neurons) for block, neurons in planted.neurons.items()})
    result = regsurgery.patch(str(folder), tmp_path / "out", recipe=recipe, num_images=8)
    assert result.verdict.outliers_per_image.patched <= 0.1 * result.verdict.outliers_per_image.original
    before, after = load_file(path), load_file(tmp_path / "out" / path.name)
    assert {value.dtype for value in after.values()} == {dtype}
    (added,) = after.keys() - before.keys()
    assert added.endswith("register_tokens")
    assert all(torch.equal(value, after[key]) for key, value in before.items())


# --- LLaVA, whole ---------------------------------------------------------------------------------------------------


def write_llava(folder: Path) -> Planted:
    """A tiny LLaVA with real processor classes and planted register neurons in its vision tower."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    planted = build_planted(by_id("hf-llava"), folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "<image>": 99}
    vocabulary |= {f"w{index}": index for index in range(4, 99)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    processor = LlavaProcessor(
        image_processor=images, tokenizer=fast, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    processor.save_pretrained(folder)
    return planted


@pytest.mark.parametrize("shards", [1, 3])
def test_llava(shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tmp_path / "llava", tmp_path / "patched"
    planted = write_llava(folder)
    if shards > 1:
        (folder / "model.safetensors").unlink()
        size = sum(p.numel() * p.element_size() for p in planted.loaded.model.parameters())
        planted.loaded.model.save_pretrained(folder, max_shard_size=size // shards)  # type: ignore[operator]
        assert len(list(folder.glob("*.safetensors"))) >= shards
    monkeypatch.setattr(sys, "argv", ["regsurgery", "patch", str(folder), "-o", str(out), "--num-images", "32"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    block = json.loads((out / "config.json").read_text())["regsurgery"]
    assert {int(at): neurons for at, neurons in block["register_neurons"].items()} == planted.neurons
    before = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    after = {name: value for path in out.glob("*.safetensors") for name, value in load_file(path).items()}
    (added,) = after.keys() - before.keys()
    assert added.startswith("vision_tower.") and added.endswith("register_tokens")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert sum(name.startswith("language_model") or "language_model" in name for name in before) > 10
    script = Path(__file__).with_name("fresh_llava.py")
    for python in (sys.executable, transformers_4_python()):
        done = subprocess.run(
            [python, str(script), str(folder), str(out)], capture_output=True, text=True, cwd=tmp_path, check=False,
            env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"),
                 "HOME": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert "tokens generated: 6 and 6" in done.stdout
