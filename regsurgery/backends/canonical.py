"""A vision tower in timm's terms, through which native mode translates between the libraries.

Each source library has a function `(Loaded, state) -> Canonical`. `state` is the model's edited state dict, by names in
memory. A translation is not trusted: verification runs the written stock host against the edited graph of the source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regsurgery.errors import UnsupportedModelError
from regsurgery.frontends.loaded import Loaded

if TYPE_CHECKING:
    from regsurgery.compiler.surgery import Surgery

TIMM_ENTRY = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}  # by the eps of their norms
BICUBIC, BILINEAR = 3, 2  # PIL's numbers


@dataclass(frozen=True)
class Canonical:
    """The tower without register tokens.

    Attributes:
        architecture, model_args: timm entry point and its arguments other than `num_classes`.
        num_classes: size of the head, 0 without.
        image_size: (height, width) of the position embedding.
        eps: of the source's norms.
        exact: whether timm's norms have the same eps.
        tensors: by timm's names. `head.weight` may be `[C, 2 D]`, a head over CLS and mean patch, and there may be a
            `mask_token`; timm has neither.
        outputs: output of the source -> its kind in a host: `head`, `tokens` (all of them, normed), `cls` (normed),
            `unit_head` (the head's output at length 1).
        data: preprocessing in timm's terms.
        labels: class names in order.
        notes: parts of the source that no host has room for, one line each.
    """

    architecture: str
    model_args: dict[str, Any]
    num_classes: int
    image_size: tuple[int, int]
    eps: float
    tensors: dict[str, Tensor]
    outputs: dict[str, str]
    data: dict[str, Any]
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    exact: bool = True


def canonical(loaded: Loaded, state: Mapping[str, Tensor]) -> Canonical:
    """`loaded` with the weights `state` as a timm vision transformer.

    Raises:
        UnsupportedModelError: it cannot be expressed as one; the message says where it differs.
    """
    return {"timm": _from_timm, "transformers": _from_transformers, "open_clip": _from_open_clip}[loaded.library](
        loaded, state
    )


def default_host(loaded: Loaded) -> str:
    """The library whose stock model a native folder is written for by default."""
    published = PUBLISHED.get(loaded.architecture)
    if loaded.library == "transformers" and published is not None and published.stem is CLIP_STEM:
        return "timm"  # transformers' host has no norm before its blocks
    return loaded.library


def config_block(surgery: Surgery, tower: Canonical) -> dict[str, Any]:
    """The `regsurgery` entry of a native folder's config: what later verification needs in addition to the weights."""
    return {
        **surgery.config_block,
        "outputs": tower.outputs,
        "image_size": list(tower.image_size),
        "exact": tower.exact,
        "left_behind": list(tower.notes),
    }


def _no_host(loaded: Loaded, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"native mode: no stock model with registers computes the same as {loaded.architecture}: {reason}; use mode "
        "shift or bias"
    )


# --- timm -----------------------------------------------------------------------------------------------------------


def _from_timm(loaded: Loaded, state: Mapping[str, Tensor]) -> Canonical:
    from timm.data.config import resolve_model_data_config
    from timm.models.vision_transformer import VisionTransformer

    model: Any = loaded.model
    if type(model) is not VisionTransformer:
        raise _no_host(loaded, f"timm's {type(model).__name__} does not take reg_tokens")
    config = loaded.config
    (output,) = loaded.name_outputs(torch.empty(0))
    return Canonical(
        architecture=config["architecture"],
        model_args={**(config.get("model_args") or {}), **_own_registers(model)},
        num_classes=model.num_classes,
        image_size=tuple(model.patch_embed.img_size),  # type: ignore[arg-type]
        eps=model.blocks[0].norm1.eps,  # type: ignore[union-attr]
        tensors=dict(state),
        outputs={output: "head" if model.num_classes or model.global_pool != "token" else "cls"},
        data=resolve_model_data_config(model),
    )


def _own_registers(model: Any) -> dict[str, int]:
    """Registers that an entry point may have set although the config does not say so."""
    return {"reg_tokens": model.num_reg_tokens} if model.num_reg_tokens else {}


# --- transformers ---------------------------------------------------------------------------------------------------

# timm's names -> published names of transformers checkpoints, below the tower. Blocks are `encoder.layer.N.` or
# `encoder.layers.N.`; q, k and v are one tensor in timm.
DINOV2_BLOCK = {
    "norm1": "norm1", "norm2": "norm2", "attn.q": "attention.attention.query", "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value", "attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}  # fmt: skip
SWIGLU_BLOCK = {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
VIT_BLOCK = {**DINOV2_BLOCK, "norm1": "layernorm_before", "norm2": "layernorm_after",
             "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}  # fmt: skip
CLIP_BLOCK = {
    "norm1": "layer_norm1", "norm2": "layer_norm2", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj", "attn.proj": "self_attn.out_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
VIT_STEM = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
            "mask_token": "embeddings.mask_token", "reg_token": "embeddings.distillation_token",
            "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
            "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
            "norm.weight": "layernorm.weight", "norm.bias": "layernorm.bias"}  # fmt: skip
CLIP_STEM = {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding.weight",
             "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
             "norm_pre.weight": "pre_layrnorm.weight", "norm_pre.bias": "pre_layrnorm.bias",
             "norm.weight": "post_layernorm.weight", "norm.bias": "post_layernorm.bias"}  # fmt: skip
TRUNK = "visual.trunk."
HEADS = ("classifier", "visual_projection")
LEFT_BEHIND = {
    "pooler.": "the pooler (a dense layer and tanh on CLS)",
    "text_": "the text tower",
    "logit_scale": "the text tower",
    "embeddings.position_ids": "",
}


@dataclass(frozen=True)
class _PublishedNames:
    """A transformers architecture's tensor names, and the kinds of its outputs in a host."""

    stem: Mapping[str, str]
    block: Mapping[str, str]
    outputs: Mapping[str, str]


PUBLISHED = {
    "ViTModel": _PublishedNames(VIT_STEM, VIT_BLOCK, {"last_hidden_state": "tokens"}),
    "ViTForImageClassification": _PublishedNames(VIT_STEM, VIT_BLOCK, {"logits": "head"}),
    "DeiTModel": _PublishedNames(VIT_STEM, VIT_BLOCK, {"last_hidden_state": "tokens"}),
    "DeiTForImageClassification": _PublishedNames(VIT_STEM, VIT_BLOCK, {"logits": "head"}),
    "Dinov2Model": _PublishedNames(VIT_STEM, DINOV2_BLOCK, {"last_hidden_state": "tokens", "pooler_output": "cls"}),
    "Dinov2ForImageClassification": _PublishedNames(VIT_STEM, DINOV2_BLOCK, {"logits": "head"}),
    "CLIPVisionModel": _PublishedNames(CLIP_STEM, CLIP_BLOCK, {"pooler_output": "cls"}),
    "CLIPVisionModelWithProjection": _PublishedNames(CLIP_STEM, CLIP_BLOCK, {"image_embeds": "head"}),
    "CLIPModel": _PublishedNames(CLIP_STEM, CLIP_BLOCK, {"image_embeds": "unit_head"}),
}


def _from_transformers(loaded: Loaded, state: Mapping[str, Tensor]) -> Canonical:
    from transformers.core_model_loading import revert_weight_conversion

    published = PUBLISHED.get(loaded.architecture)
    if published is None:
        raise _no_host(loaded, f"it is not one of {', '.join(PUBLISHED)}")
    config: Any = loaded.model.config
    config = getattr(config, "vision_config", config)
    on_disk = revert_weight_conversion(loaded.model, dict(state))  # type: ignore[arg-type]
    tensors, notes = _timm_names(loaded, on_disk, published)
    width, eps = config.hidden_size, config.layer_norm_eps
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    size = config.image_size
    size = (size, size) if isinstance(size, int) else (size[0], size[1])
    swiglu = bool(getattr(config, "use_swiglu_ffn", False))
    hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    num_classes = tensors["head.weight"].shape[0] if "head.weight" in tensors else 0
    args: dict[str, Any] = {
        "img_size": size,
        "patch_size": patch,
        "embed_dim": width,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": (hidden + 0.5) / width,  # timm truncates the product to a whole number
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in tensors else None,
        "pre_norm": "norm_pre.weight" in tensors,
        "act_layer": _activation(loaded, "silu" if swiglu else config.hidden_act),
        "dynamic_img_size": True,
        "reg_tokens": 1 if "reg_token" in tensors else 0,  # a distillation token is a register with a position
    }
    entry = TIMM_ENTRY.get(eps, TIMM_ENTRY[1e-6])
    if swiglu:  # an entry point with a gated MLP; timm configs cannot name an MLP class
        entry = "vit_giant_patch14_dinov2"
    labels = getattr(loaded.model.config, "id2label", None) or {}
    return Canonical(
        architecture=entry,
        model_args=args,
        num_classes=num_classes,
        image_size=size,
        eps=eps,
        exact=eps in TIMM_ENTRY,
        tensors=tensors,
        outputs=dict(published.outputs),
        data=_data_of_processor(loaded),
        labels=tuple(str(labels[i]) for i in range(num_classes)) if len(labels) == num_classes else (),
        notes=notes,
    )


def _activation(loaded: Loaded, name: str) -> str:
    known = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
             "silu": "silu", "swish": "silu", "relu": "relu"}  # fmt: skip
    if name not in known:
        raise _no_host(loaded, f"its activation {name} has no name in timm")
    return known[name]


def _timm_names(
    loaded: Loaded, on_disk: Mapping[str, Tensor], published: _PublishedNames
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    stem = {theirs: ours for ours, theirs in published.stem.items()}
    block = {theirs: ours for ours, theirs in published.block.items()}
    block |= {theirs: ours for ours, theirs in SWIGLU_BLOCK.items()}
    tensors: dict[str, Tensor] = {}
    notes: dict[str, None] = {}
    for name, value in on_disk.items():
        short = re.sub(r"^(vit|deit|dinov2|vision_model)\.", "", name)
        in_block = re.fullmatch(r"encoder\.layers?\.(\d+)\.(.+)\.(weight|bias)", short)
        scale = re.fullmatch(r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", short)
        left = next((what for start, what in LEFT_BEHIND.items() if short.startswith(start)), None)
        head, _, kind = short.rpartition(".")
        if short in stem:
            tensors[stem[short]] = value
        elif scale:
            tensors[f"blocks.{scale[1]}.ls{scale[2]}.gamma"] = value
        elif in_block and in_block[2] in block:
            tensors[f"blocks.{in_block[1]}.{block[in_block[2]]}.{in_block[3]}"] = value
        elif head in HEADS:
            tensors[f"head.{kind}"] = value
        elif left is None:
            raise _no_host(loaded, f"the tensor '{name}' has no place in one")
        elif left:
            notes[
                f"{left} is left behind: {'stock hosts have none' if 'pooler' in left else 'this is the vision tower'}"
            ] = None
    return _fused(tensors), tuple(notes)


def _fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value as one tensor, and timm's shapes."""
    fused = dict(tensors)
    for name in tensors:
        found = re.fullmatch(r"(blocks\.\d+\.attn)\.q\.(weight|bias)", name)
        if found:
            parts = [fused.pop(f"{found[1]}.{part}.{found[2]}") for part in "qkv"]
            fused[f"{found[1]}.qkv.{found[2]}"] = torch.cat(parts)
    width = fused["norm.weight"].shape[0]
    fused["cls_token"] = fused["cls_token"].reshape(1, 1, width)
    fused["pos_embed"] = fused["pos_embed"].reshape(1, -1, width)
    if "head.weight" in fused and "head.bias" not in fused:
        fused["head.bias"] = fused["head.weight"].new_zeros(fused["head.weight"].shape[0])
    return fused


def _data_of_processor(loaded: Loaded) -> dict[str, Any]:
    import json

    height, width = loaded.image_size
    data: dict[str, Any] = {"input_size": (3, height, width), "mean": (0.5,) * 3, "std": (0.5,) * 3,
                            "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}  # fmt: skip
    path = loaded.folder / "preprocessor_config.json"
    if not path.is_file():
        return data
    given = json.loads(path.read_text("utf-8"))
    data["mean"] = tuple(given.get("image_mean") or data["mean"])
    data["std"] = tuple(given.get("image_std") or data["std"])
    data["interpolation"] = "bicubic" if given.get("resample", BILINEAR) == BICUBIC else "bilinear"
    size = given.get("size")
    shortest = size.get("shortest_edge") if isinstance(size, dict) else None
    if shortest:
        data["crop_mode"], data["crop_pct"] = "center", height / shortest
    return data


# --- open_clip ------------------------------------------------------------------------------------------------------


def _from_open_clip(loaded: Loaded, state: Mapping[str, Tensor]) -> Canonical:
    visual: Any = loaded.model.visual
    if loaded.entry:
        raise _no_host(loaded, "its tower also returns its tokens")
    if hasattr(visual, "trunk"):
        architecture, args, eps, tensors = _trunk(loaded, visual, state)
    else:
        architecture, args, eps, tensors = _tower(loaded, visual, state)
    preprocess = visual.preprocess_cfg
    height, width = visual.image_size
    return Canonical(
        architecture=architecture,
        model_args=args,
        num_classes=tensors["head.weight"].shape[0] if "head.weight" in tensors else 0,
        image_size=(height, width),
        eps=eps,
        exact=hasattr(visual, "trunk") or eps in TIMM_ENTRY,
        tensors=tensors,
        outputs={"image_features": "unit_head"},
        data={
            "input_size": (3, height, width),
            "mean": tuple(preprocess["mean"]),
            "std": tuple(preprocess["std"]),
            "interpolation": preprocess.get("interpolation", "bicubic"),
            "crop_pct": 1.0,
            "crop_mode": {"squash": "squash", "longest": "border"}.get(preprocess.get("resize_mode"), "center"),
        },
    )


def _trunk(
    loaded: Loaded, visual: Any, state: Mapping[str, Tensor]
) -> tuple[str, dict[str, Any], float, dict[str, Tensor]]:
    """A timm tower; a linear projection after it becomes its head."""
    from timm.models.vision_transformer import VisionTransformer

    trunk = visual.trunk
    if type(trunk) is not VisionTransformer:
        raise _no_host(loaded, f"its tower, timm's {type(trunk).__name__}, does not take reg_tokens")
    tensors = {name.removeprefix(TRUNK): value for name, value in state.items() if name.startswith(TRUNK)}
    for name, value in state.items():
        if name in ("visual.head.proj.weight", "visual.head.proj.bias"):
            tensors[name.replace("visual.head.proj", "head")] = value
        elif name.startswith("visual.head."):
            raise _no_host(loaded, f"the tensor '{name}' has no place in one")
    if "head.weight" in tensors and "head.bias" not in tensors:
        tensors["head.bias"] = tensors["head.weight"].new_zeros(len(tensors["head.weight"]))
    args = {
        "global_pool": trunk.global_pool,
        "img_size": tuple(trunk.patch_embed.img_size),  # type: ignore[arg-type]
        **_own_registers(trunk),
    }
    eps: Any = trunk.blocks[0].norm1.eps  # type: ignore[union-attr]
    return loaded.config["model_cfg"]["vision_cfg"]["timm_model_name"], args, eps, tensors


def _tower(
    loaded: Loaded, visual: Any, state: Mapping[str, Tensor]
) -> tuple[str, dict[str, Any], float, dict[str, Tensor]]:
    """open_clip's own vision transformer, converted by timm."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    if visual.attn_pool is not None or visual.pool_type != "tok":
        raise _no_host(loaded, f"it pools by {'attention' if visual.attn_pool is not None else visual.pool_type}")
    block = visual.transformer.resblocks[0]
    width, patch_size = visual.conv1.out_channels, visual.conv1.kernel_size
    activation = {"GELU": "gelu", "QuickGELU": "quick_gelu"}.get(type(block.mlp.gelu).__name__)
    if activation is None:
        raise _no_host(loaded, f"its activation {type(block.mlp.gelu).__name__} has no name in timm")
    pre_norm = not isinstance(visual.ln_pre, torch.nn.Identity)
    args = {
        "img_size": tuple(visual.image_size),
        "patch_size": patch_size[0],
        "embed_dim": width,
        "depth": len(visual.transformer.resblocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": (block.mlp.c_fc.out_features + 0.5) / width,
        "init_values": None if isinstance(block.ls_1, torch.nn.Identity) else 1.0,
        "pre_norm": pre_norm,
        "act_layer": activation,
        "global_pool": "token",
    }
    eps = visual.ln_post.eps
    entry = TIMM_ENTRY.get(eps, TIMM_ENTRY[1e-6])
    converted = checkpoint_filter_fn(dict(state), stock_tower(entry, args, visual.proj.shape[1]))  # type: ignore[arg-type]
    tensors = {re.sub(r"\.ls_([12])\.", r".ls\1.", name): value for name, value in converted.items()}
    if not pre_norm:
        tensors["patch_embed.proj.bias"] = tensors["patch_embed.proj.weight"].new_zeros(width)
    return entry, args, eps, tensors


def without_register_positions(tower: Canonical, stock: Any, register_tokens_1RD: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the class token and the patches alone, and all registers: those of the tower, then the given ones.

    Args:
        stock: the tower's `stock_tower`; it has a class token and a position embedding.
    """
    position_1TD, num_old = tower.tensors["pos_embed"], stock.num_reg_tokens
    if stock.no_embed_class:
        position_1TD = torch.cat((torch.zeros_like(position_1TD[:, :1]), position_1TD), dim=1)
    if not num_old:
        return position_1TD, register_tokens_1RD
    old_1RD = tower.tensors["reg_token"]
    if not stock.no_embed_class:  # hosts give registers no position, so it is added to them
        old_1RD = old_1RD + position_1TD[:, 1 : 1 + num_old]
        position_1TD = torch.cat((position_1TD[:, :1], position_1TD[:, 1 + num_old :]), dim=1)
    return position_1TD, torch.cat((old_1RD, register_tokens_1RD), dim=1)


def stock_tower(architecture: str, model_args: Mapping[str, Any], num_classes: int) -> torch.nn.Module:
    """The timm vision transformer of that name, without weights."""
    import timm

    with torch.device("meta"):
        return timm.create_model(architecture, **{**model_args, "num_classes": num_classes})
