"""Mode bias: the neurons cleared, one constant key and value for every head, no token on the stream."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import regsurgery
from regsurgery.compiler.modes import bias
from regsurgery.compiler.modes.operation import Operation
from regsurgery.compiler.trace import tensor_inputs
from regsurgery.images.image_set import image_set
from regsurgery.recipe import Recipe
from regsurgery.runtime.surgery import operate
from tests.conftest import CHOSEN, Planted, shared
from tests.e2e.test_parity import largest_difference, module_form, pictures
from tests.picos import CORE, OTHERS, Pico
from tests.reference import naive_shift, pad_what_it_makes


def bias_recipe(planted: Planted) -> Recipe:
    return Recipe({block: tuple(neurons) for block, neurons in planted.neurons.items()}, mode="bias")


def hook_bias(
    planted: Planted, model: nn.Module, constants: dict[int, Tensor], attention_path: Callable[[int], str]
) -> None:
    """The reference: hooks zero the neurons, and add a row to what attention reads and cut it out of what it gives."""
    pico, num_tokens = planted.pico, planted.sites.num_tokens
    row = pico.prefix if pico.inside else num_tokens
    for block, listed in planted.neurons.items():

        def clear(module: nn.Module, args: tuple, listed: list[int] = listed) -> tuple:
            return (naive_shift(args[0], listed, 0, pico.prefix, ()), *args[1:])

        model.get_submodule(planted.pico.down.format(block)).register_forward_pre_hook(clear)
    for block, constant in constants.items():

        def longer(module: nn.Module, args: tuple, kwargs: dict, constant: Tensor = constant) -> tuple:
            def grown(x: object) -> object:
                if not isinstance(x, Tensor) or x.ndim < 3:
                    return x
                if x.ndim == 4:  # a bias or mask over pairs of tokens
                    return torch.nn.functional.pad(x, (0, 1, 0, 1), value=bool(x.dtype == torch.bool))
                return torch.cat([x[:, :row], constant.expand(x.shape[0], 1, -1), x[:, row:]], dim=1)

            return tuple(map(grown, args)), {name: grown(value) for name, value in kwargs.items()}

        def shorter(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
            tokens = output[0] if isinstance(output, tuple) else output
            tokens = torch.cat([tokens[:, :row], tokens[:, row + 1 :]], dim=1)
            return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

        attention = model.get_submodule(attention_path(block))
        if pico.prefixed:
            attention.num_prefix_tokens += 1  # type: ignore[operator]
        made_here = pico.bias.format(block).startswith(attention_path(block)) if pico.bias else False
        if made_here:
            pad_what_it_makes(model.get_submodule(pico.bias.format(block)), 1)
        attention.register_forward_pre_hook(longer, with_kwargs=True)
        attention.register_forward_hook(shorter)


def test_graph_equals_module_form_equals_hooked_reference(planted: Planted) -> None:
    surgery = bias.operate(Operation(planted.located, bias_recipe(planted), image_set(None, 8)))
    blocks = surgery.plan.constant_blocks
    assert blocks == tuple(range(2, len(planted.sites.blocks)))
    constants = surgery.graph_module.get_parameter(surgery.added_name).detach()
    assert constants.shape == (len(blocks), planted.sites.width) and float(constants.norm(dim=1).min()) > 0
    hooked = copy.deepcopy(planted.loaded.model)
    layout = surgery.config_block["layouts"][-1]
    tower = f"{layout['tower']}.".lstrip(".")
    hook_bias(planted, hooked, dict(zip(blocks, constants, strict=True)), lambda b: tower + layout["attentions"][b])
    patched = module_form(planted, surgery)
    with torch.no_grad():
        patched.get_parameter(surgery.added_name).copy_(constants)
        images = pictures(3, planted.loaded.image_size)
        graph = surgery.graph_module(*tensor_inputs(planted.loaded, images))
        tolerance = planted.pico.tolerance
        assert largest_difference(graph, planted.loaded.call(patched, images)) <= tolerance
        assert largest_difference(graph, planted.loaded.call(hooked, images)) <= tolerance
        without = operate(copy.deepcopy(planted.loaded.model), surgery.config_block)
        spread = max(float(value.max() - value.min()) for value in graph.values() if value.is_floating_point())
        assert largest_difference(graph, planted.loaded.call(without, images)) > max(10 * tolerance, 1e-5 * spread)


WRITTEN = (*CORE, *(pico for pico in OTHERS if pico.id in CHOSEN))


@pytest.mark.parametrize("pico", WRITTEN, ids=lambda pico: pico.id)
def test_planted_outliers_are_gone_and_the_folder_verifies(
    pico: Pico, planted_picos: Callable[[Pico], Planted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A random head over the mean of few patches does not survive the loss of its outliers; that is not the point here.
    monkeypatch.setattr("regsurgery.verification.measure.MIN_COSINE_OUTPUT", -1.0)
    planted = planted_picos(pico)
    result = regsurgery.patch(str(planted.folder), tmp_path / "out", recipe=bias_recipe(planted), num_images=16)
    assert result.mode == "bias" and result.verdict.register_norm is None
    assert result.verdict.outliers_per_image.original > 1 and result.verdict.outliers_per_image.patched <= 0.05
    if planted.loaded.library != "transformers" or pico.id == "hf-vit":
        assert regsurgery.verify(tmp_path / "out", num_images=8).passed


def test_pt2(demo_folder: Path, tmp_path: Path) -> None:
    result = regsurgery.patch(
        str(demo_folder), tmp_path / "out", recipe="demo", mode="bias", format="pt2", num_images=8
    )
    again = regsurgery.verify(tmp_path / "out", original=str(demo_folder), num_images=8)
    for verdict in (result.verdict, again):
        assert verdict is not None and verdict.passed and verdict.parity_max_abs <= 1e-5


@pytest.mark.real
@pytest.mark.parametrize("name", ["vit-tiny-timm", "vit-tiny-openclip"])
def test_the_real_vit(name: str, tmp_path: Path) -> None:
    regsurgery.patch(
        str(shared("models", name)), tmp_path / "out", recipe="vit-tiny", mode="bias",
        images=shared("images", "calibration"), num_images=36,
    )  # fmt: skip
    num_images = 60 if name == "vit-tiny-timm" else 36
    verdict = regsurgery.verify(tmp_path / "out", images=shared("images", "labelled"), num_images=num_images)
    assert verdict.outliers_per_image.original == pytest.approx(3.9, abs=0.1)
    assert verdict.outliers_per_image.patched <= 0.01 and verdict.worst_patch_norm.patched <= 40
    if verdict.kl is not None:
        assert verdict.kl <= 0.11
