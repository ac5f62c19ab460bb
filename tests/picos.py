"""Small random-weight models of every supported family, and where a person would hook them.

The module paths here are written by hand, from the libraries' sources; they are what the matcher is held to.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

EAGER_FAST_PATH = 1e-5  # open_clip's eager attention takes another path than any export
WIDTH, HEADS, BLOCKS, SIZE, PATCH = 64, 4, 4, 64, 8
# 15 patches + CLS = 16 tokens, the head width; 63 + CLS = 64, the model width. Neither is square.
OTHER_SIZES = ((24, 40), (56, 72))


@dataclass(frozen=True)
class Pico:
    """`build(folder)` writes a checkpoint; `insert`, `last` and `down` are module paths, `{}` is the block."""

    id: str
    build: Callable[[Path], None]
    insert: str
    last: str
    down: str
    hidden: int = 4 * WIDTH
    any_size: bool = True
    tolerance: float = 0.0  # of the eager module against the graph


def _transformers(architecture: str, config_class: str, prefix: str = "", **config: Any) -> Callable[[Path], None]:
    """`prefix`: what published checkpoints put before names that transformers 5 no longer writes itself."""

    def build(folder: Path) -> None:
        import transformers

        torch.manual_seed(0)
        settings = getattr(transformers, config_class)(**config)
        getattr(transformers, architecture)(settings).eval().save_pretrained(folder)
        if prefix:
            state = load_file(folder / "model.safetensors")
            save_file({prefix + name: value for name, value in state.items()}, folder / "model.safetensors",
                      metadata={"format": "pt"})  # fmt: skip

    return build


VIT = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "image_size": SIZE,
       "patch_size": PATCH}  # fmt: skip
VIT_CLASSES = {**VIT, "intermediate_size": 4 * WIDTH, "num_labels": 10}
CLIP_VISION = {**VIT, "intermediate_size": 4 * WIDTH, "projection_dim": 32}
CLIP_TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, 
             "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 98, "projection_dim": 32}  # fmt: skip
CLIP = {"text_config": CLIP_TEXT, "vision_config": CLIP_VISION, "projection_dim": 32}


def _timm(entry: str, num_classes: int = 10, **args: Any) -> Callable[[Path], None]:
    args = {"embed_dim": WIDTH, "depth": BLOCKS, "num_heads": HEADS, "img_size": SIZE, "patch_size": PATCH,
            "dynamic_img_size": True, **args}  # fmt: skip

    def build(folder: Path) -> None:
        import timm

        torch.manual_seed(0)
        model = timm.create_model(entry, num_classes=num_classes, **args)
        timm.models.save_for_hf(model, folder, model_args=args, safe_serialization=True)
        config = json.loads((folder / "config.json").read_text())
        config["pretrained_cfg"]["input_size"] = [3, SIZE, SIZE]
        (folder / "config.json").write_text(json.dumps(config))

    return build


def _open_clip(quick_gelu: bool = False, **vision: Any) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        import open_clip

        torch.manual_seed(0)
        config = {
            "model_cfg": {
                "embed_dim": 32, "quick_gelu": quick_gelu,
                "vision_cfg": {"image_size": SIZE, "layers": BLOCKS, "width": WIDTH, "head_width": WIDTH // HEADS,
                               "patch_size": PATCH, **vision},
                "text_cfg": {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2},
            },
            "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(state, folder / "open_clip_model.safetensors")

    return build


PICOS = (
    Pico("hf-vit", _transformers("ViTModel", "ViTConfig", **VIT, intermediate_size=4 * WIDTH),
         "layers.0", "layers.3", "layers.{}.mlp.fc2"),
    Pico("hf-vit-classes", _transformers("ViTForImageClassification", "ViTConfig", **VIT_CLASSES),
         "vit.layers.0", "vit.layers.3", "vit.layers.{}.mlp.fc2"),
    Pico("hf-dinov2", _transformers("Dinov2Model", "Dinov2Config", **VIT),
         "encoder.layer.0", "encoder.layer.3", "encoder.layer.{}.mlp.fc2"),
    Pico("hf-dinov2-swiglu", _transformers("Dinov2Model", "Dinov2Config", **VIT, use_swiglu_ffn=True),
         "encoder.layer.0", "encoder.layer.3", "encoder.layer.{}.mlp.down_proj", hidden=176),
    Pico("hf-dinov2-classes", _transformers("Dinov2ForImageClassification", "Dinov2Config", **VIT, num_labels=10),
         "dinov2.encoder.layer.0", "dinov2.encoder.layer.3", "dinov2.encoder.layer.{}.mlp.fc2"),
    Pico("hf-clip-vision", _transformers("CLIPVisionModel", "CLIPVisionConfig", prefix="vision_model.", **CLIP_VISION),
         "pre_layrnorm", "encoder.layers.3", "encoder.layers.{}.mlp.fc2"),
    Pico("hf-clip-vision-projection", _transformers("CLIPVisionModelWithProjection", "CLIPVisionConfig", **CLIP_VISION),
         "vision_model.pre_layrnorm", "vision_model.encoder.layers.3", "vision_model.encoder.layers.{}.mlp.fc2"),
    Pico("hf-clip", _transformers("CLIPModel", "CLIPConfig", **CLIP),
         "vision_model.pre_layrnorm", "vision_model.encoder.layers.3", "vision_model.encoder.layers.{}.mlp.fc2"),
    Pico("timm-vit", _timm("vit_tiny_patch16_224"), "blocks.0", "blocks.3", "blocks.{}.mlp.fc2"),
    Pico("timm-vit-mean", _timm("vit_tiny_patch16_224", global_pool="avg", class_token=False),
         "blocks.0", "blocks.3", "blocks.{}.mlp.fc2"),
    Pico("timm-dinov2", _timm("vit_small_patch14_dinov2", num_classes=0, init_values=1.0),
         "blocks.0", "blocks.3", "blocks.{}.mlp.fc2"),
    Pico("timm-dinov2-swiglu", _timm("vit_giant_patch14_dinov2", num_classes=0, mlp_ratio=8.0, init_values=1.0),
         "blocks.0", "blocks.3", "blocks.{}.mlp.fc2"),
    Pico("timm-clip", _timm("vit_base_patch16_clip_224"), "norm_pre", "blocks.3", "blocks.{}.mlp.fc2"),
    Pico("open-clip", _open_clip(), "visual.ln_pre", "visual.transformer.resblocks.3",
         "visual.transformer.resblocks.{}.mlp.c_proj", any_size=False, tolerance=EAGER_FAST_PATH),
    Pico("open-clip-quickgelu", _open_clip(quick_gelu=True), "visual.ln_pre",
         "visual.transformer.resblocks.3", "visual.transformer.resblocks.{}.mlp.c_proj", any_size=False,
         tolerance=EAGER_FAST_PATH),
    Pico("open-clip-no-ln-pre", _open_clip(no_ln_pre=True), "visual.transformer.resblocks.0",
         "visual.transformer.resblocks.3", "visual.transformer.resblocks.{}.mlp.c_proj", any_size=False,
         tolerance=EAGER_FAST_PATH),
)  # fmt: skip
