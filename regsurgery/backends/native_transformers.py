"""Native mode in transformers: `Dinov2WithRegisters`, with layer scale 1 if the source has none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regsurgery.backends.canonical import (
    BICUBIC,
    BILINEAR,
    DINOV2_BLOCK,
    SWIGLU_BLOCK,
    VIT_STEM,
    Canonical,
    canonical,
    config_block,
    stock_tower,
    without_register_positions,
)
from regsurgery.backends.native_timm import blank_registers, token_kinds
from regsurgery.checkpoints.reading import weight_files
from regsurgery.checkpoints.stored import stored_state
from regsurgery.checkpoints.writing import write_json, write_sharded
from regsurgery.errors import CheckpointError, UnsupportedModelError, library_fails
from regsurgery.formats import WEIGHTS_NAMES, Snippets
from regsurgery.frontends.transformers import UNLOADABLE, from_pretrained
from regsurgery.settings import quiet_transformers

if TYPE_CHECKING:
    from regsurgery.compiler.surgery import Surgery
    from regsurgery.frontends.loaded import Loaded

WEIGHTS_NAME = WEIGHTS_NAMES["transformers"]
CONFIG_NAME = "config.json"
PROCESSOR_NAME = "preprocessor_config.json"
MODEL, CLASSIFIER = "Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"
PREFIX = "dinov2_with_registers."  # of a classifier's tower
ACTIVATIONS = {
    "GELU": "gelu",
    "QuickGELU": "quick_gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "ReLU": "relu",
    "SiLU": "silu",
}
SNIPPET = """\
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{folder}")
"""
FEATURES = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor, backbone = AutoImageProcessor.from_pretrained("{folder}"), AutoModel.from_pretrained("{folder}")
photo = Image.new("RGB", (640, 480))  # or Image.open("photo.jpg")
with torch.no_grad():
    pixels = processor(photo, return_tensors="pt").pixel_values.to(backbone.dtype)
    tokens = backbone(pixels).last_hidden_state
patches = tokens[:, 1 + backbone.config.num_register_tokens :]  # after class token and registers
"""


def emit(surgery: Surgery, folder: Path, target: Path) -> None:
    """Write the config, the weights and, if there is none yet, the preprocessor's config."""
    tower = canonical(surgery.loaded, surgery.state())
    config, tensors = _contents(tower, surgery.register_tokens)
    sources = surgery.loaded.weights
    largest = max(path.stat().st_size for path in sources) if len(sources) > 1 else None
    write_sharded(folder, WEIGHTS_NAME, tensors, largest)
    write_json(folder / CONFIG_NAME, {**config, "regsurgery": config_block(surgery, tower)})
    if not (folder / PROCESSOR_NAME).is_file():
        write_json(folder / PROCESSOR_NAME, _processor(tower))


def check(loaded: Loaded, num_registers: int) -> None:
    """Raise `UnsupportedModelError` if transformers cannot hold the model; asked before any fitting."""
    tower = canonical(loaded, loaded.model.state_dict())
    _contents(tower, blank_registers(tower, num_registers))


def _contents(tower: Canonical, register_tokens_1RD: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    stock = stock_tower(tower.architecture, tower.model_args, 0 if _is_double(tower) else tower.num_classes)
    return _config(tower, stock, register_tokens_1RD), _tensors(tower, stock, register_tokens_1RD)


def _is_double(tower: Canonical) -> bool:
    """Whether the head reads CLS and mean patch side by side, like the host's."""
    return (
        bool(tower.num_classes)
        and tower.tensors["head.weight"].shape[1] == 2 * tower.tensors["blocks.0.norm1.weight"].shape[0]
    )


def _refuse(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"native mode: transformers' Dinov2WithRegisters {reason}; use --format timm, or mode shift or bias"
    )


def _config(tower: Canonical, stock: Any, register_tokens_1RD: Tensor) -> dict[str, Any]:
    block = stock.blocks[0]
    rows = tower.tensors["blocks.0.mlp.fc1.weight"].shape[0]
    width = stock.embed_dim
    gated = type(block.mlp).__name__ == "GluMlp"
    activation = ACTIVATIONS.get(type(block.mlp.act).__name__)
    sides = {*stock.patch_embed.img_size}
    for holds, reason in (
        (stock.has_class_token, "needs a class token"),
        (isinstance(stock.norm_pre, nn.Identity), "has no norm before its blocks"),
        (stock.attn_pool is None, "has no attention pooling"),
        (isinstance(stock.fc_norm, nn.Identity), "has no norm after its pooling"),
        (tower.num_classes == 0 or stock.global_pool in ("token", "avg"), f"does not pool by {stock.global_pool}"),
        (isinstance(block.attn.q_norm, nn.Identity), "does not norm queries and keys"),
        (activation is not None and (not gated or activation == "silu"), "has another activation"),
        (len(sides) == 1, "takes only square position embeddings"),
        (len({*stock.patch_embed.patch_size}) == 1, "takes only square patches"),
    ):
        if not holds:
            raise _refuse(reason)
    ratios = [n for n in range(1, 17) if rows == (2 * ((int(n * width * 2 / 3) + 7) // 8 * 8) if gated else n * width)]
    if not ratios:
        raise _refuse(f"cannot have an MLP of {rows // 2 if gated else rows} hidden units at width {width}")
    config: dict[str, Any] = {
        "architectures": [CLASSIFIER if tower.num_classes else MODEL],
        "model_type": "dinov2_with_registers",
        "hidden_size": width,
        "num_hidden_layers": len(stock.blocks),
        "num_attention_heads": block.attn.num_heads,
        "mlp_ratio": ratios[0],
        "hidden_act": activation,
        "use_swiglu_ffn": gated,
        "layer_norm_eps": tower.eps,
        "image_size": sides.pop(),
        "patch_size": stock.patch_embed.patch_size[0],
        "num_channels": 3,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tower.tensors,
        "num_register_tokens": register_tokens_1RD.shape[1] + stock.num_reg_tokens,
        "dtype": str(register_tokens_1RD.dtype).removeprefix("torch."),
    }
    if tower.num_classes:
        names = tower.labels or tuple(f"LABEL_{i}" for i in range(tower.num_classes))
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    return config


def _tensors(tower: Canonical, stock: Any, register_tokens_1RD: Tensor) -> dict[str, Tensor]:
    """The published names of `facebook/dinov2-with-registers-*`."""
    width = stock.embed_dim
    given = tower.tensors
    like = given["blocks.0.norm1.weight"]
    if "pos_embed" not in given or "cls_token" not in given:
        raise _refuse("needs a class token and a position embedding")
    position_1TD, register_tokens_1RD = without_register_positions(tower, stock, register_tokens_1RD)
    tensors = {
        "embeddings.cls_token": given["cls_token"],
        "embeddings.mask_token": given.get("mask_token", like.new_zeros(1, width)),
        "embeddings.register_tokens": register_tokens_1RD,
        "embeddings.position_embeddings": position_1TD,
        VIT_STEM["patch_embed.proj.bias"]: like.new_zeros(width),
    }
    gated = type(stock.blocks[0].mlp).__name__ == "GluMlp"
    names = {**DINOV2_BLOCK, **SWIGLU_BLOCK} if gated else DINOV2_BLOCK
    for index in range(len(stock.blocks)):
        for scale in (1, 2):
            tensors[f"encoder.layer.{index}.layer_scale{scale}.lambda1"] = torch.ones_like(like)
    for name, value in given.items():
        in_block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias|gamma)", name)
        if in_block is None:
            if name.startswith(("patch_embed.", "norm.")) and name in VIT_STEM:
                tensors[VIT_STEM[name]] = value
            elif not name.startswith(("head.", "cls_token", "pos_embed", "mask_token", "reg_token")):
                raise _refuse(f"has no place for the tensor '{name}'")
            continue
        index, part, kind = in_block.groups()
        if kind == "gamma":
            tensors[f"encoder.layer.{index}.layer_scale{part[-1]}.lambda1"] = value
        elif part == "attn.qkv":
            for letter, chunk in zip("qkv", value.chunk(3), strict=True):
                tensors[f"encoder.layer.{index}.{DINOV2_BLOCK[f'attn.{letter}']}.{kind}"] = chunk
        elif part in names:
            tensors[f"encoder.layer.{index}.{names[part]}.{kind}"] = value
        else:
            raise _refuse(f"has no place for the tensor '{name}'")
    if not tower.num_classes:
        return tensors
    head_CD = given["head.weight"]
    if not _is_double(tower):
        halves = (head_CD, torch.zeros_like(head_CD))
        head_CD = torch.cat(halves if stock.global_pool == "token" else halves[::-1], dim=1)
    tensors = {PREFIX + name: value for name, value in tensors.items()}
    return {**tensors, "classifier.weight": head_CD, "classifier.bias": given["head.bias"]}


def _processor(tower: Canonical) -> dict[str, Any]:
    _, height, width = tower.data["input_size"]
    squash = tower.data["crop_mode"] == "squash"
    size = {"height": height, "width": width} if squash else {"shortest_edge": int(height / tower.data["crop_pct"])}
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": size,
        "resample": BICUBIC if tower.data["interpolation"] == "bicubic" else BILINEAR,
        "do_center_crop": not squash,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(tower.data["mean"]),
        "image_std": list(tower.data["std"]),
        "do_convert_rgb": True,
    }


def snippets(surgery: Surgery, folder: str) -> Snippets:
    tower = canonical(surgery.loaded, surgery.state())
    auto_class = "AutoModelForImageClassification" if tower.num_classes else "AutoModel"
    return (
        ("transformers, unmodified", SNIPPET.format(auto_class=auto_class, folder=folder)),
        ("Tokens of a photo as features", FEATURES.format(folder=folder)),
    )


def reload(
    folder: Path,
    config: dict[str, Any],
    *,
    trusted: bool = False,
    stored: bool = False,
    image_size: tuple[int, int] | None = None,
) -> nn.Module:
    """The model of `folder` as stock transformers loads it; `stored`: its weights stay on disk."""
    import transformers

    cls = getattr(transformers, config["architectures"][0])
    try:
        with quiet_transformers():
            stored_weights = stored_state(weight_files(folder, WEIGHTS_NAME)) if stored else None
            model, info = from_pretrained(cls, folder, stored_weights)  # nosec B615 # a folder
    except UNLOADABLE as error:
        raise library_fails("transformers", folder, error) from error
    problems = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if problems:
        raise CheckpointError(
            f"{folder}: tensor '{min(map(str, problems))}' is missing or unknown; patch the model again"
        )
    return model.eval()


def outputs(model: Any, images: Tensor, num_registers: int) -> dict[str, Tensor]:
    """What the kinds of `Canonical.outputs` are here."""
    given = model(pixel_values=images)
    if "logits" in given:
        return {"head": given.logits}
    return token_kinds(given.last_hidden_state, 1 + model.config.num_register_tokens - num_registers, num_registers)


def foreign_code(folder: Path) -> str | None:
    """A stock checkpoint has no code."""
    return None
