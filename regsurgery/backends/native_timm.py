"""Native mode in timm: `VisionTransformer` with `reg_tokens` set in config.json, so stock timm loads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regsurgery.backends.canonical import Canonical, canonical, config_block, stock_tower
from regsurgery.checkpoints.reading import weight_files
from regsurgery.checkpoints.safetensors_file import weights_dtype
from regsurgery.checkpoints.writing import write_json, write_tensors
from regsurgery.errors import UnsupportedModelError, library_fails
from regsurgery.formats import WEIGHTS_NAMES, Snippets
from regsurgery.frontends.timm import stored_model

if TYPE_CHECKING:
    from regsurgery.compiler.surgery import Surgery
    from regsurgery.frontends.loaded import Loaded

WEIGHTS_NAME = WEIGHTS_NAMES["timm"]
CONFIG_NAME = "config.json"
SNIPPET = """\
import timm

model = timm.create_model("local-dir:{folder}", pretrained=True)
"""
FEATURES = """\
import timm
import torch

backbone = timm.create_model("local-dir:{folder}", pretrained=True, num_classes=0).eval()
images = torch.zeros(1, 3, {height}, {width})  # preprocessed photos
with torch.no_grad():
    features = backbone(images)
    patches = backbone.forward_features(images)[:, backbone.num_prefix_tokens :]  # after class token and registers
"""


def emit(surgery: Surgery, folder: Path, target: Path) -> None:
    """Write config and weights."""
    tower = canonical(surgery.loaded, surgery.state())
    write_config(surgery, tower, folder)
    write_tensors(folder / WEIGHTS_NAME, tower_tensors(tower, surgery.register_tokens))


def check(loaded: Loaded, num_registers: int) -> None:
    """Raise `UnsupportedModelError` if timm cannot hold the model; asked before any fitting."""
    tower = canonical(loaded, loaded.model.state_dict())
    tower_tensors(tower, blank_registers(tower, num_registers))


def blank_registers(tower: Canonical, num_registers: int) -> Tensor:
    """Zero register tokens, `[1, R, D]`."""
    norm_D = tower.tensors["blocks.0.norm1.weight"]
    return norm_D.new_zeros(1, num_registers, len(norm_D))


def write_config(surgery: Surgery, tower: Canonical, folder: Path) -> None:
    """Write the config from which stock timm builds the tower, and transformers its `TimmWrapperModel`."""
    args = _args(tower, surgery.plan.num_registers)
    if surgery.loaded.library == "timm":
        config = {**surgery.loaded.config, "model_args": args}
        if args.get("num_classes") == config.get("num_classes"):  # transformers fails where timm wrote it twice
            del args["num_classes"]
    else:
        data = {**tower.data, "num_classes": tower.num_classes, "first_conv": "patch_embed.proj", "classifier": "head"}
        config = {
            "architecture": tower.architecture,
            "num_classes": tower.num_classes,
            **({"label_names": list(tower.labels)} if tower.labels else {}),
            "model_args": args,
            "pretrained_cfg": data,
        }
    write_json(folder / CONFIG_NAME, {**config, "regsurgery": config_block(surgery, tower)})


def _args(tower: Canonical, num_registers: int) -> dict[str, Any]:
    args = {name: value for name, value in tower.model_args.items() if value is not None}
    return {**args, "reg_tokens": args.get("reg_tokens", 0) + num_registers}


def tower_tensors(tower: Canonical, register_tokens_1RD: Tensor) -> dict[str, Tensor]:
    """The state dict of timm's tower with the registers after any that it already has.

    Raises:
        UnsupportedModelError: timm's tower has no place for a tensor, or wants another shape.
    """
    num_registers = register_tokens_1RD.shape[1]
    stock: Any = stock_tower(tower.architecture, _args(tower, num_registers), tower.num_classes)
    tensors = {name: value for name, value in tower.tensors.items() if name != "mask_token"}
    if "reg_token" in tensors:
        register_tokens_1RD = torch.cat((tensors["reg_token"], register_tokens_1RD), dim=1)
    tensors["reg_token"] = register_tokens_1RD
    if "pos_embed" in tensors and not stock.no_embed_class:
        behind = stock.num_prefix_tokens - num_registers
        position_1TD = tensors["pos_embed"]
        zeros_1RD = position_1TD.new_zeros(1, num_registers, position_1TD.shape[-1])
        tensors["pos_embed"] = torch.cat((position_1TD[:, :behind], zeros_1RD, position_1TD[:, behind:]), dim=1)
    expected = stock.state_dict()
    for name in sorted({*expected, *tensors}):
        shapes = [tuple(state[name].shape) if name in state else "none" for state in (tensors, expected)]
        if shapes[0] != shapes[1]:
            raise UnsupportedModelError(
                f"native mode: timm's {tower.architecture} cannot hold the tensor '{name}' (it is {shapes[0]}, timm "
                f"expects {shapes[1]}); use another --format, or mode shift or bias"
            )
    return tensors


def snippets(surgery: Surgery, folder: str) -> Snippets:
    height, width = canonical(surgery.loaded, surgery.state()).image_size
    return (
        ("timm, unmodified", SNIPPET.format(folder=folder)),
        (
            "Pooled features, without the classifier, and those of patches",
            FEATURES.format(folder=folder, height=height, width=width),
        ),
    )


def reload(
    folder: Path,
    config: dict[str, Any],
    *,
    trusted: bool = False,
    stored: bool = False,
    image_size: tuple[int, int] | None = None,
) -> nn.Module:
    """The model of `folder` as stock timm loads it, in the dtype of its weights; `stored`: they stay on disk."""
    options: dict[str, Any] = {} if image_size is None else {"dynamic_img_size": True}
    import timm

    weights = weight_files(folder, WEIGHTS_NAME)
    dtype = weights_dtype(weights)
    try:
        if stored:
            return stored_model(folder, weights, dtype, **options).eval()
        return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).to(dtype).eval()
    except RuntimeError as error:
        raise library_fails("timm", folder, error) from error


def outputs(model: Any, images: Tensor, num_registers: int) -> dict[str, Tensor]:
    """What the kinds of `Canonical.outputs` are here."""
    tokens_BTD = model.forward_features(images)
    found = {"head": model.forward_head(tokens_BTD)}
    return {**found, **token_kinds(tokens_BTD, model.num_prefix_tokens - num_registers, num_registers)}


def token_kinds(tokens_BTD: Tensor, num_before: int, num_registers: int) -> dict[str, Tensor]:
    """Tokens without the registers, which come after `num_before` prefix tokens, and the first token."""
    kept = torch.cat((tokens_BTD[:, :num_before], tokens_BTD[:, num_before + num_registers :]), dim=1)
    return {"tokens": kept, "cls": kept[:, 0]}


def foreign_code(folder: Path) -> str | None:
    """A stock checkpoint has no code."""
    return None
