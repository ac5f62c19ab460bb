"""Models with no room for the surgery are refused with the reason and the place; none is patched wrongly in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from regsurgery.errors import UnsupportedModelError
from regsurgery.loading import load
from regsurgery.match import match
from regsurgery.recipe import Recipe
from regsurgery.surgery import perform
from regsurgery.trace import trace
from tests.picos import VIT, _timm, _transformers

SMALL = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}


def timm_model(entry: str, **args: object) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        import timm

        timm.models.save_for_hf(timm.create_model(entry, **args), folder, model_args=args, safe_serialization=True)

    return build


REFUSED = {
    "a convolutional network": (
        _transformers("ConvNextModel", "ConvNextConfig", **SMALL, image_size=64),
        r"no match: .*(no vision transformer|none of the \d+ residual stream|dimensions)",
    ),
    "a hierarchical transformer": (
        timm_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(1, 1), num_heads=(1, 1)),
        r"no match: .*\(node '",
    ),
    "rotary positions over the last tokens": (
        _transformers("DINOv3ViTModel", "DINOv3ViTConfig", **VIT, intermediate_size=128, num_register_tokens=0),
        r"no room for a register: .*by their position \(node '.*layer\.0",
    ),
    "rotary positions behind a prefix": (
        timm_model("eva02_tiny_patch14_224", img_size=56, embed_dim=64, depth=2, num_heads=4),
        r"no room for a register: .*\(node '.*blocks\.0",
    ),
    "a relative position bias": (
        _transformers(
            "BeitModel", "BeitConfig", **VIT, intermediate_size=128, use_relative_position_bias=True, num_labels=2
        ),
        r"no room for a register: shapes do not fit any more .*\(node '",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_a_reason(kind: str, tmp_path: Path) -> None:
    build, message = REFUSED[kind]
    build(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=message) as refused:
        loaded = load(str(tmp_path / "model"))
        traced = trace(loaded)
        perform(loaded, Recipe({0: (1,)}), traced, match(traced))
    print(refused.value)


def test_the_number_of_tokens_is_told_from_equal_sizes_by_data_flow(tmp_path: Path) -> None:
    """T = 64 is also the width and T = 16 the head width; the batch of the trace is a prime that no size has."""
    for size in ((56, 72), (24, 40)):
        folder = tmp_path / str(size)
        _timm("vit_tiny_patch16_224")(folder)
        loaded = load(str(folder))
        traced = trace(loaded, size)
        sites = match(traced)
        assert sites.num_tokens in (64, 16)
        surgery = perform(loaded, Recipe({1: (3,)}, num_registers=4, scale=(1.0,) * 4), traced, sites)
        last = next(node for node in surgery.graph_module.graph.nodes if node.name == sites.last)
        assert last.meta["val"].shape[1:] == (sites.num_tokens + 4, 64)
