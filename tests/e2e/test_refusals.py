"""Models with no room for the surgery are refused with the reason and the place; none is patched wrongly in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from regsurgery.compiler.located import Located
from regsurgery.compiler.match import match
from regsurgery.compiler.surgery import perform
from regsurgery.compiler.trace import trace
from regsurgery.errors import UnsupportedModelError
from regsurgery.frontends.load import load
from regsurgery.recipe import Recipe
from tests.picos import VIT, _timm, _transformers

SMALL = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
TINY_TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
             "vocab_size": 100}  # fmt: skip
NO_MATCH = r"no match: .*\(node '"


def timm_model(entry: str, **args: object) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        import timm

        timm.models.save_for_hf(timm.create_model(entry, **args), folder, model_args=args, safe_serialization=True)

    return build


REFUSED = {
    "ConvNeXt, a convolutional network": (
        _transformers("ConvNextModel", "ConvNextConfig", **SMALL, image_size=64),
        r"no match: .*(no vision transformer|no residual stream|dimensions)",
    ),
    "ResNet, without a residual stream of tokens": (
        timm_model("resnet10t", num_classes=4),
        r"no match: .*(no vision transformer|no residual stream|dimensions)",
    ),
    "Swin, hierarchical": (
        _transformers("SwinModel", "SwinConfig", embed_dim=16, image_size=64, depths=[1, 1], num_heads=[1, 1],
                      window_size=4),
        r"no match: .*hierarchical models are not supported \(node '",
    ),
    "timm's Swin": (
        timm_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(1, 1), num_heads=(1, 1)),
        NO_MATCH,
    ),
    "Hiera, hierarchical": (
        _transformers("HieraModel", "HieraConfig", embed_dim=16, image_size=[64, 64], depths=[1, 1, 1, 1],
                      num_heads=[1, 1, 2, 2]),
        r"no match: .*hierarchical models are not supported \(node '.*stages\.1",
    ),
    "SAM, a stream of four dimensions": (
        _transformers("SamVisionModel", "SamVisionConfig", **VIT, mlp_dim=256, output_channels=16,
                      global_attn_indexes=[1], window_size=4),
        r"no match: the token stream has 4 dimensions, expected \[batch, tokens, width\] \(node '",
    ),
    "Pixtral, all images in one sequence": (
        _transformers("PixtralVisionModel", "PixtralVisionConfig", **VIT, intermediate_size=128),
        "a graph of PixtralVisionModel would take one batch size only: its forward turns that of 'pixel_values' into a",
    ),
    "Qwen2.5-VL vision, windows that depend on the data": (
        _transformers("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
                      vision_config={"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64,
                                     "out_hidden_size": 32},
                      text_config={**TINY_TEXT, "num_key_value_heads": 2}),
        r"Qwen2_5_VLForConditionalGeneration is not supported: it packs .* windows .*\(its input 'image_grid_thw'\)",
    ),
    "SigLIP 2 with any aspect": (
        _transformers("Siglip2VisionModel", "Siglip2VisionConfig", num_patches=64,
                      **{name: value for name, value in VIT.items() if name != "image_size"}, intermediate_size=128),
        r"Siglip2VisionModel is not supported: .* for each image \(its input 'spatial_shapes'\)",
    ),
    "a text model": (
        _transformers("BertModel", "BertConfig", **TINY_TEXT),
        r"neither BertModel nor a module of it takes images as pixels \(.*\); give a model that does",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_a_reason(kind: str, tmp_path: Path) -> None:
    build, message = REFUSED[kind]
    build(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=message) as refused:
        loaded = load(str(tmp_path / "model"))
        traced = trace(loaded)
        perform(Located(loaded, traced, match(traced)), Recipe({0: (1,)}))
    print(refused.value)


@pytest.mark.parametrize("how", ["config", "dtype"])
def test_quantised_weights_are_refused_with_advice(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    _transformers("ViTModel", "ViTConfig", **VIT, intermediate_size=128)(folder)
    if how == "config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}})
        )
    else:
        state = load_file(folder / "model.safetensors")
        name = next(name for name in state if name.endswith("output.dense.weight"))
        state[name] = state[name].to(torch.int8)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    reason = {"config": "bitsandbytes", "dtype": r"tensor 'encoder\..*output\.dense\.weight' is I8"}[how]
    with pytest.raises(
        UnsupportedModelError, match=rf"quantised \({reason}\); patch the checkpoint before quantisation"
    ):
        load(str(folder))


def test_the_number_of_tokens_is_told_from_equal_sizes_by_data_flow(tmp_path: Path) -> None:
    """T = 64 is also the width and T = 16 the head width; the batch of the trace is a prime that no size has."""
    for size in ((56, 72), (24, 40)):
        folder = tmp_path / str(size)
        _timm("vit_tiny_patch16_224")(folder)
        loaded = load(str(folder))
        traced = trace(loaded, size)
        sites = match(traced)
        assert sites.num_tokens in (64, 16)
        surgery = perform(Located(loaded, traced, sites), Recipe({1: (3,)}, num_registers=4, scale=(1.0,) * 4))
        last = next(node for node in surgery.graph_module.graph.nodes if node.name == sites.last)
        assert last.meta["val"].shape[1:] == (sites.num_tokens + 4, 64)
