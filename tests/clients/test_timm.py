"""timm's own arguments, groups of parameters and extractors, on a timm folder; stock where timm builds the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import regsurgery
from regsurgery.backends.modeling import import_modeling
from regsurgery.backends.timm import loader_digest
from regsurgery.recipe import Recipe
from tests.conftest import Planted
from tests.e2e.test_parity import pictures
from tests.picos import Pico, by_id

pytestmark = pytest.mark.slow
ARGUMENTS = (
    {"num_classes": 10}, {"num_classes": 7}, {"num_classes": 0}, {"num_classes": 7, "global_pool": "avg"},
    {"num_classes": 0, "global_pool": "avg"}, {"features_only": True}, {"features_only": True, "out_indices": (0, 2)},
    {"in_chans": 1}, {"drop_path_rate": 0.1},
)  # fmt: skip


@pytest.fixture(scope="module", params=["shift", "bias"])
def pair(
    request: pytest.FixtureRequest,
    planted_picos: Callable[[Pico], Planted],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """The original's folder and the patched one."""
    planted = planted_picos(by_id("timm-vit"))
    folder = tmp_path_factory.mktemp("timm") / request.param
    recipe = Recipe({block: tuple(listed) for block, listed in planted.neurons.items()})
    regsurgery.patch(str(planted.folder), folder, recipe=recipe, mode=request.param, num_images=4, verification=False)
    return planted.folder, folder


def opened(folder: Path, **arguments: Any) -> Any:
    return import_modeling(folder, loader_digest(), trusted=False).load(folder, **arguments)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@torch.no_grad()
def test_load_takes_the_arguments_of_timm(arguments: dict[str, Any], pair: tuple[Path, Path]) -> None:
    original, folder = pair
    stock: Any = timm.create_model(f"local-dir:{original}", pretrained=True, **arguments).eval()
    model: Any = opened(folder, **arguments)
    images = pictures(2, (64, 64))[:, : arguments.get("in_chans", 3)]
    expected, found = stock(images), model(images)
    if arguments.get("features_only"):
        assert [one.shape for one in found] == [one.shape for one in expected]
        assert model.feature_info.channels() == stock.feature_info.channels()
        return
    assert found.shape == expected.shape
    # What timm loads is loaded, and only what it leaves at random differs.
    random = {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    loaded = model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in stock.state_dict().items() if name not in random)


def test_groups_treat_what_was_added_like_the_class_token(pair: tuple[Path, Path]) -> None:
    _, folder = pair
    model: Any = opened(folder)
    (added,) = [name for name, _ in model.named_parameters() if name in ("register_tokens", "attention_constants")]
    skip = model.no_weight_decay()
    for groups in (
        param_groups_layer_decay(model, no_weight_decay_list=skip),
        param_groups_weight_decay(model, no_weight_decay_list=skip),
    ):
        of = {id(one): index for index, group in enumerate(groups) for one in group["params"]}
        assert of[id(getattr(model, added))] == of[id(model.cls_token)]


@torch.no_grad()
def test_torchvision_extracts_features(pair: tuple[Path, Path]) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    _, folder = pair
    model: Any = opened(folder, dynamic_img_size=False)  # torch.fx cannot trace the stock one either
    images = pictures(2, (64, 64))
    extractor = create_feature_extractor(model, {"blocks.1.mlp.act": "hidden", "head": "logits"}).eval()
    assert torch.equal(extractor(images)["logits"], model(images))
