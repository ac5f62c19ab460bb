"""The gate: graph = module form = an independently hooked reference, for every family."""

from __future__ import annotations

import copy
import functools
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from regsurgery.checkpoints.sums import write_sums
from regsurgery.cli.app import main
from regsurgery.compiler.located import Located
from regsurgery.compiler.match import match
from regsurgery.compiler.surgery import Surgery, perform
from regsurgery.compiler.trace import tensor_inputs, trace
from regsurgery.emit.folder import emit
from regsurgery.frontends.load import load
from regsurgery.images.generated import dead_leaves
from regsurgery.recipe import Recipe
from regsurgery.runtime.surgery import operate
from regsurgery.verification.original import write_record
from tests.conftest import Planted
from tests.picos import OTHER_SIZES, PICOS, Pico
from tests.reference import hook


@functools.cache
def picture(index: int) -> Image.Image:
    return dead_leaves(random.Random(f"parity/{index}"), 256)


def pictures(batch: int, size: tuple[int, int]) -> Tensor:
    """Different pictures on which planted neurons fire, `[B, 3, H, W]` in [-1, 1]."""
    leaves = [picture(index).resize(size[::-1]) for index in range(batch)]
    return torch.stack([pil_to_tensor(image) for image in leaves]).float() / 127.5 - 1


def recipe_for(planted: Planted, num_registers: int, **options: object) -> Recipe:
    neurons = {block: tuple(listed) for block, listed in planted.neurons.items()}
    scale = tuple(1.0 / (1 + register) for register in range(num_registers))
    return Recipe(neurons, num_registers=num_registers, scale=scale, **options)  # type: ignore[arg-type]


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    assert all(left[name].shape == right[name].shape for name in left)
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def module_form(planted: Planted, surgery: Surgery) -> torch.nn.Module:
    return operate(copy.deepcopy(planted.loaded.model), surgery.config_block)


def hooked_model(planted: Planted, recipe: Recipe) -> torch.nn.Module:
    """The independent reference: a copy of the model with hooks."""
    pico, model = planted.pico, copy.deepcopy(planted.loaded.model)
    hook(
        model,
        insert=pico.insert,
        last=pico.last,
        down=pico.down,
        neurons=planted.neurons,
        num_registers=recipe.num_registers,
        num_prefix=pico.prefix,
        scale=recipe.scale,
        inside=pico.inside,
        prefixed=pico.prefixed,
        bias=pico.bias,
        masked=pico.masked,
        collector=pico.collector,
    )
    return model


@functools.lru_cache(maxsize=3)
def located_at(planted: Planted, size: tuple[int, int]) -> Located:
    """The planted model traced at `size`, once for all tests of it that follow one another."""
    loaded = planted.loaded
    if size == loaded.image_size:
        return planted.located
    traced = trace(loaded, size)
    return Located(loaded, traced, match(traced))


def sizes(planted: Planted) -> tuple[tuple[int, int], ...]:
    own = planted.loaded.image_size
    return (own, *OTHER_SIZES) if planted.pico.any_size else (own,)


@pytest.mark.parametrize("num_registers", [1, 4])
def test_graph_equals_module_form_equals_hooked_reference(planted: Planted, num_registers: int) -> None:
    pico, loaded = planted.pico, planted.loaded
    recipe = recipe_for(planted, num_registers)
    hooked = hooked_model(planted, recipe)
    for size in sizes(planted):
        surgery = perform(located_at(planted, size), recipe)
        patched = module_form(planted, surgery)
        images = pictures(3, size)
        with torch.no_grad():
            original = loaded.call(loaded.model, images)
            graph = surgery.graph_module(*tensor_inputs(loaded, images))
            assert largest_difference(graph, loaded.call(patched, images)) <= pico.tolerance
            assert largest_difference(graph, loaded.call(hooked, images)) <= pico.tolerance
            assert largest_difference(graph, original) > 1e-4
            one_by_one = [surgery.graph_module(*tensor_inputs(loaded, images[i : i + 1])) for i in range(3)]
        for name in graph:
            if graph[name].ndim and graph[name].shape[0] == 3 and "per" not in name:
                rows = torch.cat([single[name] for single in one_by_one])
                torch.testing.assert_close(rows, graph[name], rtol=1e-4, atol=1e-5)


def test_no_registers_and_no_neurons_change_nothing(planted: Planted) -> None:
    surgery = perform(planted.located, Recipe({}, num_registers=0, scale=()))
    images = pictures(3, planted.loaded.image_size)
    with torch.no_grad():
        original = planted.loaded.call(planted.loaded.model, images)
        assert largest_difference(original, planted.loaded.call(module_form(planted, surgery), images)) == 0
        graph = surgery.graph_module(*tensor_inputs(planted.loaded, images))
        untouched = planted.traced.graph_module(*tensor_inputs(planted.loaded, images))
        assert largest_difference(untouched, graph) == 0
        assert largest_difference(original, graph) <= planted.pico.tolerance


def test_the_matcher_finds_what_a_person_would_hook(planted: Planted) -> None:
    sites, pico = planted.sites, planted.pico
    assert sites.insert_path == pico.insert
    assert sites.blocks[-1].path == pico.last
    assert [block.down_path for block in sites.blocks] == [
        pico.down.format(block) for block in range(len(sites.blocks))
    ]
    assert [block.hidden_size for block in sites.blocks] == [pico.hidden] * len(sites.blocks)
    assert sites.num_prefix == pico.prefix
    assert sites.placement == ("prefix" if pico.inside else "end")
    assert all(block.in_place for block in sites.blocks)


@pytest.mark.parametrize("pico", [p for p in PICOS if p.core or p.inside], ids=lambda pico: pico.id)
def test_every_option_agrees_between_graph_and_module_form(
    pico: Pico, planted_picos: Callable[[Pico], Planted]
) -> None:
    planted = planted_picos(pico)
    images = pictures(8, planted.loaded.image_size)
    seen = []
    for options in (
        {"fill": "mean"},
        {"fill": "outliers"},
        {"fill": "keep"},
        {"prefix": "fill"},
        {"compat": "reference"},
    ):
        surgery = perform(planted.located, recipe_for(planted, 1, **options))
        with torch.no_grad():
            graph = surgery.graph_module(*tensor_inputs(planted.loaded, images))
            module = planted.loaded.call(module_form(planted, surgery), images)
        assert largest_difference(graph, module) <= planted.pico.tolerance
        assert all(largest_difference(graph, other) > 0 for other in seen)
        seen.append(graph)


def test_a_folder_whose_outliers_are_left_fails_verification(
    planted_picos: Callable[[Pico], Planted], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    planted = planted_picos(next(pico for pico in PICOS if pico.id == "hf-vit"))
    wrong = Recipe({0: (5,)})
    surgery = perform(planted.located, wrong)
    with emit(surgery, tmp_path / "wrong", "transformers") as folder:
        write_record(load(str(planted.folder)), folder)  # its digests are those of the planted weights
        write_sums(folder, {})
    monkeypatch.setattr(sys, "argv", ["regsurgery", "verify", str(tmp_path / "wrong"), "--json", "--num-images", "8"])
    with pytest.raises(SystemExit) as stopped:
        main()
    verdict = json.loads(capsys.readouterr().out)
    assert stopped.value.code == 1
    assert not verdict["passed"] and "outlier tokens per image remain" in verdict["failures"][0]
    assert verdict["outliers_per_image"]["patched"] == pytest.approx(verdict["outliers_per_image"]["original"], rel=0.2)
