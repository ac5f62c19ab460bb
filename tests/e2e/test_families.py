"""What families have beyond the parity gate: placement, traps with their cures, precisions, attention, LLaVA whole."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx

import regsurgery
from regsurgery.backends import pt2
from regsurgery.backends.formats import backend
from regsurgery.cli.app import main
from regsurgery.compiler import trace
from regsurgery.compiler.comparison import probe_nodes
from regsurgery.compiler.located import Located
from regsurgery.compiler.match import NORMS
from regsurgery.compiler.match import match as find_sites
from regsurgery.compiler.modes.operate import operate as operate_mode
from regsurgery.compiler.modes.operation import Operation
from regsurgery.compiler.sites import Sites
from regsurgery.compiler.surgery import perform
from regsurgery.compiler.taps import tap
from regsurgery.compiler.trace import Traced, tensor_inputs
from regsurgery.errors import UnsupportedModelError
from regsurgery.families import FAMILIES, REFUSED, Family, family_of
from regsurgery.formats import LIBRARIES
from regsurgery.frontends.libraries import frontend
from regsurgery.frontends.load import load
from regsurgery.images.image_set import image_set
from regsurgery.modes import NATIVE
from regsurgery.recipe import Recipe
from regsurgery.runtime.surgery import operate
from tests.conftest import Planted, build_planted
from tests.e2e.test_parity import hooked_model, largest_difference, module_form, pictures, recipe_for
from tests.e2e.test_reload import transformers_4_python
from tests.picos import OTHERS, PICOS, SIZE, WHOLES, Pico, _open_clip, by_id
from tests.reference import outlier_patches


def sites_of(planted: Planted, traced: Traced) -> Sites:
    """The sites of another trace of the same model; trained registers are told from the model, not the graph."""
    return replace(find_sites(traced), placement=planted.sites.placement)


# --- the matrix -----------------------------------------------------------------------------------------------------


def row_of(planted: Planted) -> Family:
    family = family_of(planted.loaded.library, planted.loaded.architecture)
    assert family is not None, f"no row for {planted.loaded.architecture}"
    return family


def hosts_of(planted: Planted) -> set[str]:
    """The stock hosts of native mode that the matrix, or the pico, says."""
    return set(row_of(planted).native if planted.pico.hosts is None else planted.pico.hosts)


@pytest.mark.parametrize("pico", (*PICOS, *WHOLES), ids=lambda pico: pico.id)
def test_every_cell_is_as_the_matrix_says(pico: Pico, planted_picos: Callable[[Pico], Planted]) -> None:
    planted = planted_picos(pico)
    loaded, row = planted.loaded, row_of(planted)
    assert planted.sites.placement == row.placement
    hosts = set()
    for name in LIBRARIES:
        try:
            backend(name, NATIVE).check(loaded, 1)
            hosts.add(name)
        except UnsupportedModelError as error:
            assert str(error).startswith("native mode: ")
    assert hosts == hosts_of(planted) & {*LIBRARIES}  # test_dinov2_format.py has the sizes of dinov2
    size = (96, 80)
    try:
        other = frontend(loaded.library).at_size(loaded, size)
        traced = trace.trace(other, size)
    except UnsupportedModelError as error:
        assert not row.any_size, error
        return
    assert row.any_size
    surgery = perform(Located(other, traced, sites_of(planted, traced)), recipe_for(planted, 1))
    images = pictures(2, size)
    with torch.no_grad():
        graph = surgery.graph_module(*tensor_inputs(other, images))
        module = other.call(operate(copy.deepcopy(other.model), surgery.config_block), images)
        assert largest_difference(graph, module) <= pico.tolerance


@pytest.mark.families
def test_every_row_and_every_member_has_a_model(tmp_path: Path) -> None:
    found = []
    for pico in (*PICOS, *WHOLES):
        pico.build(tmp_path / pico.id)
        pico.publish(tmp_path / pico.id)
        loaded = load(str(tmp_path / pico.id))
        found.append((loaded.library, loaded.architecture))
    for row in FAMILIES:
        for member in row.members:
            mine = [name for library, name in found if library == row.library and fnmatch(name, member)]
            assert any(family_of(row.library, name) is row for name in mine) or (row.library, member) in ELSEWHERE


def test_the_documentation_has_the_matrix(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["regsurgery", "families", "--markdown"])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr().out
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text("utf-8")
    assert f"<!-- regsurgery families --markdown -->\n{printed}<!-- end -->" in page
    assert printed.count("\n") > len(FAMILIES) + len(REFUSED)
    monkeypatch.setattr(sys, "argv", ["regsurgery", "families"])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().out
    assert all(name.split(",")[0] in shown for name in ("LLaVA", "DINOv3", "Pixtral"))


ELSEWHERE = {("open_clip", "CustomTextCLIP/VisionTransformer")}  # CLIP with a text tower of its own


# One of each row that the slower tests do not cover.
SAMPLES = ("mae", "ijepa", "beit-relative", "siglip-vision", "aimv2", "internvl", "idefics3", "dinov3", "llava",
           "relpos", "coca")  # fmt: skip


@pytest.mark.parametrize("mode", ["bias", "native"])
@pytest.mark.parametrize("pico", [p for p in OTHERS if p.id.endswith(SAMPLES)], ids=lambda pico: pico.id)
def test_pt2_of_the_other_modes_graphs(pico: Pico, mode: str, planted_picos: Callable[[Pico], Planted]) -> None:
    planted = planted_picos(pico)
    recipe = Recipe({block: tuple(neurons) for block, neurons in planted.neurons.items()}, mode=mode)
    surgery = operate_mode(Operation(planted.located, recipe, image_set(None, 8)))
    images = pictures(5, planted.loaded.image_size)
    inputs = tensor_inputs(planted.loaded, images)
    archive = io.BytesIO()
    torch.export.save(pt2.lower(surgery), archive)
    archive.seek(0)
    with torch.no_grad():
        program = torch.export.load(archive).module()
        assert largest_difference(program(*inputs), surgery.graph_module(*inputs)) <= 1e-5
    counts = [num_outliers(graph, planted, inputs) for graph in (planted.traced.graph_module, surgery.graph_module)]
    assert counts[0] > 0.5 * len(images) and counts[1] <= 0.1 * counts[0]


def num_outliers(graph_module: fx.GraphModule, planted: Planted, inputs: list[torch.Tensor]) -> int:
    """Outlier patches after the last but one block."""
    with torch.no_grad():
        _, taps = tap(graph_module, {"probe": probe_nodes(planted.sites)["probe"]}, early_exit=True)(*inputs)
    num_added = taps["probe"].shape[1] - planted.sites.num_tokens
    norms_BN = taps["probe"][:, planted.sites.patched(num_added)[0]].norm(dim=-1)
    return int(outlier_patches(norms_BN).sum())


# A gated MLP inside the prefix, a tower below a language model, a bias over pairs of tokens.
WRITTEN = ("eva02", "llava", "beit-relative")


@pytest.mark.parametrize("mode", ["bias", "native"])
@pytest.mark.parametrize("pico", [p for p in OTHERS if p.id.endswith(WRITTEN)], ids=lambda pico: pico.id)
def test_pt2_in_the_other_modes(
    pico: Pico, mode: str, planted_picos: Callable[[Pico], Planted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regsurgery.verification.measure.MIN_COSINE_OUTPUT", -1.0)
    planted = planted_picos(pico)
    recipe = Recipe({block: tuple(neurons) for block, neurons in planted.neurons.items()})
    result = regsurgery.patch(
        str(planted.folder), tmp_path / "out", recipe=recipe, mode=mode, format="pt2", calibrate=False, num_images=8
    )
    before, after = result.verdict.outliers_per_image.original, result.verdict.outliers_per_image.patched
    assert before > 0.5 and after <= 0.1 * before


# ViTMAE's decoder, Data2Vec and AIMv2's pooling keep to SDPA.
SDPA_ONLY = ("hf-mae-pretraining", "hf-data2vec", "hf-aimv2")
PLAIN = ("hf-vit-classes", "hf-clip", "hf-dinov2-swiglu", "hf-dinov3-gated")
SWITCHABLE = [
    pico
    for pico in PICOS
    if pico.id in PLAIN or (pico.id.startswith("hf-") and (pico.bias or pico.masked) and pico.id not in SDPA_ONLY)
]


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
        surgery = perform(Located(loaded, traced, sites_of(planted, traced)), recipe)
        images = pictures(3, planted.loaded.image_size)
        with torch.no_grad():
            graph = surgery.graph_module(*tensor_inputs(loaded, images))
            assert largest_difference(graph, loaded.call(module_form(planted, surgery), images)) == 0
            assert largest_difference(graph, loaded.call(hooked_model(planted, recipe), images)) == 0
    finally:
        loaded.model.set_attn_implementation("sdpa")  # type: ignore[operator]


@pytest.mark.parametrize("pico", PICOS, ids=lambda pico: pico.id)
def test_pt2(pico: Pico, planted_picos: Callable[[Pico], Planted]) -> None:
    planted = planted_picos(pico)
    surgery = perform(planted.located, recipe_for(planted, 1))
    program = pt2.lower(surgery).module()
    for batch in (1, 5):
        inputs = tensor_inputs(planted.loaded, pictures(batch, planted.loaded.image_size))
        with torch.no_grad():
            difference = largest_difference(program(*inputs), surgery.graph_module(*inputs))
        assert difference <= 1e-5


TOWERS = {  # entry point, open_clip's settings, image size, last block, whether native mode can hold it
    "EVA-02": ("eva02_tiny_patch14_224", {"timm_pool": "token", "timm_proj": "linear"}, 224, 11, False),
    "SigLIP": ("test_vit3", {"timm_pool": "map", "timm_proj": "none"}, 160, 8, True),
}


@pytest.mark.parametrize("name", TOWERS)
def test_open_clip_over_other_timm_towers(name: str, tmp_path: Path) -> None:
    entry, settings, size, last, native = TOWERS[name]
    blocks = "visual.trunk.blocks."
    inside = {"inside": True, "prefixed": blocks + "{}.attn"} if name == "EVA-02" else {}
    pico = Pico(
        name, _open_clip(timm_model_name=entry, image_size=size, **settings), f"{blocks}0", f"{blocks}{last}",
        blocks + "{}.mlp.fc2", **inside,
    )  # fmt: skip
    pico.build(tmp_path / "model")
    loaded = load(str(tmp_path / "model"))
    for parameter_name, parameter in loaded.model.named_parameters():
        if parameter_name.endswith("gamma"):
            parameter.data.fill_(1.0)  # a layer scale of 1e-5 would hide every difference
    traced = trace.trace(loaded)
    planted = Planted(pico, tmp_path / "model", Located(loaded, traced, find_sites(traced)), {1: [3, 5], 4: [7]})
    recipe = recipe_for(planted, 2)
    surgery = perform(planted.located, recipe)
    images = pictures(2, (size, size))
    with torch.no_grad():
        graph = surgery.graph_module(*tensor_inputs(loaded, images))
        assert largest_difference(graph, loaded.call(module_form(planted, surgery), images)) <= 1e-6
        assert largest_difference(graph, loaded.call(hooked_model(planted, recipe), images)) <= 1e-6
        assert largest_difference(graph, loaded.call(loaded.model, images)) > 1e-5
    if not native:
        with pytest.raises(UnsupportedModelError, match=r"^native mode: .* does not take reg_tokens"):
            backend("open_clip", NATIVE).check(loaded, 1)


# --- the traps of REFERENCE.md, each with its cure removed ------------------------------------------------------------


@pytest.mark.usefixtures("exported_anew")
def test_beit_is_off_by_the_mask_that_exporting_builds(planted_picos: Callable[[Pico], Planted]) -> None:
    """Left to itself transformers builds an all-true mask while exporting, and BEiT adds it to its biases."""
    planted = planted_picos(by_id("hf-beit-relative"))
    loaded, recipe = planted.loaded, recipe_for(planted, 1)
    images = pictures(3, planted.loaded.image_size)
    differences = []
    for cure in (nullcontext(), mock.patch.object(trace, "_export_settings", nullcontext)):
        with cure:
            traced = trace.trace(loaded)
        surgery = perform(Located(loaded, traced, find_sites(traced)), recipe)
        with torch.no_grad():
            graph = surgery.graph_module(*tensor_inputs(loaded, images))
            differences.append(largest_difference(graph, loaded.call(hooked_model(planted, recipe), images)))
    assert differences[0] == 0 and differences[1] > 1e-3


@pytest.mark.parametrize("name", ["hf-beit-relative", "hf-beit-shared", "hf-data2vec", "timm-beit", "timm-relpos"])
def test_without_padding_a_relative_bias_has_no_room(name: str, planted_picos: Callable[[Pico], Planted]) -> None:
    planted = planted_picos(by_id(name))
    with (
        mock.patch.object(sys.modules["regsurgery.compiler.passes.resize_tokens"], "_pad", lambda *args: []),
        pytest.raises(UnsupportedModelError, match="no room for a register: shapes no longer fit"),
    ):
        perform(planted.located, recipe_for(planted, 1))


INSIDE = [pico for pico in PICOS if pico.inside and pico.id not in ("hf-dinov2-registers", "timm-reg4")]


@pytest.mark.parametrize("pico", INSIDE, ids=lambda pico: pico.id)
def test_rotary_attention_takes_no_register_at_the_end(pico: Pico, planted_picos: Callable[[Pico], Planted]) -> None:
    """There the last N tokens are taken for the patches: without the refusal the wrong ones are rotated, silently."""
    planted = planted_picos(pico)
    at_the_end = replace(planted.sites, placement="end")
    recipe = recipe_for(planted, 1)
    with pytest.raises(UnsupportedModelError, match=r"tells them apart by their position \(node '.*attn|attention"):
        perform(Located(planted.loaded, planted.traced, at_the_end), recipe)
    if pico.prefixed:
        inside = perform(planted.located, recipe)
        images = pictures(3, planted.loaded.image_size)
        unaware = mock.patch("regsurgery.runtime.surgery._make_room", lambda *args, **kwargs: None)
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
    images = pictures(3, planted.loaded.image_size)
    outputs = []
    for placement in ("end", "prefix"):
        surgery = perform(
            Located(planted.loaded, planted.traced, replace(planted.sites, placement=placement)), recipe_for(planted, 2)
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
    assert any(user.target in NORMS for user in tokens.users)


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
        main()
    assert stopped.value.code == 3 and not (tmp_path / "out").exists()
    assert json.loads(capsys.readouterr().out)["verdict"] == "already_registered"
    monkeypatch.setattr("regsurgery.verification.measure.MIN_COSINE_OUTPUT", -1.0)
    monkeypatch.setattr(sys, "argv", [*command, "--force"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    found = json.loads(capsys.readouterr().out)["register_neurons"]
    assert {int(block): neurons for block, neurons in found.items()} == planted.neurons
    config = json.loads((tmp_path / "out" / "config.json").read_text())["regsurgery"]
    assert config["placement"] == "prefix" and config["num_prefix"] == 5


# --- precisions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["hf-vit-classes", "hf-beit-relative", "hf-dinov3", "timm-eva02", "open-clip"])
def test_half_precision_stays(
    name: str, dtype: torch.dtype, planted_picos: Callable[[Pico], Planted], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("regsurgery.verification.measure.MIN_COSINE_OUTPUT", -1.0)
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
    images = CLIPImageProcessor(
        size={"height": SIZE, "width": SIZE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor = LlavaProcessor(
        image_processor=images, tokenizer=fast, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    processor.save_pretrained(folder)
    images.save_pretrained(folder)
    # As published folders have it; transformers 4 does not know the names that 5 writes.
    path = folder / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    path.write_text(json.dumps(settings))
    return planted


@pytest.mark.slow
def test_llava(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tmp_path / "llava", tmp_path / "patched"
    planted = write_llava(folder)
    (folder / "model.safetensors").unlink()
    size = sum(p.numel() * p.element_size() for p in planted.loaded.model.parameters())
    planted.loaded.model.save_pretrained(folder, max_shard_size=size // 3)  # type: ignore[operator]
    assert len(list(folder.glob("*.safetensors"))) >= 3
    monkeypatch.setattr(sys, "argv", ["regsurgery", "patch", str(folder), "-o", str(out), "--num-images", "32"])
    with pytest.raises(SystemExit) as stopped:
        main()
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
