"""Native mode for facebook's DINOv2 code: a `.pth` that `torch.hub.load("facebookresearch/dinov2", ...)` takes."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regsurgery.backends import dinov2_network
from regsurgery.backends.canonical import Canonical, canonical, config_block, stock_tower, without_register_positions
from regsurgery.backends.dinov2_network import NORM_EPS, PATCH_SIZE, Entry, Interpolation
from regsurgery.backends.native_timm import blank_registers, token_kinds
from regsurgery.checkpoints.pickled import plain_state, unpickled
from regsurgery.checkpoints.writing import write_json
from regsurgery.errors import CheckpointError, UnsupportedModelError, in_short
from regsurgery.formats import PROGRAM_CONFIG, Snippets
from regsurgery.frontends.device import place
from regsurgery.frontends.loaded import Entry as Traceable
from regsurgery.frontends.loaded import Loaded

if TYPE_CHECKING:
    from regsurgery.compiler.surgery import Surgery

WEIGHTS_NAME = "model.pth"
CONFIG_NAME = PROGRAM_CONFIG
IMAGE_SIZE = 518  # what the functions make positions for unless they are told
TRAINED = Interpolation(antialias=True, offset=0.0)  # of the weights that were trained with registers
GATED_NAMES = {".mlp.fc1.": ".mlp.w12.", ".mlp.fc2.": ".mlp.w3."}
SNIPPET = """\
import torch

model = torch.hub.load({call})
model.load_state_dict(torch.load("{folder}/model.pth", map_location="cpu", weights_only=True))
"""
FEATURES = """\
images = torch.zeros(1, 3, {height}, {width})  # preprocessed photos
with torch.no_grad():
    patches = model.eval().forward_features(images)["x_norm_patchtokens"]
"""


def emit(surgery: Surgery, folder: Path, target: Path) -> None:
    """Write `model.pth` and `regsurgery.json`, which says how to call the function of `hubconf.py`."""
    tower = canonical(surgery.loaded, surgery.state())
    entry, arguments, tensors = _contents(tower, surgery.register_tokens)
    archive = io.BytesIO()  # torch's own writer aborts the process if the disk is full
    torch.save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, archive)
    (folder / WEIGHTS_NAME).write_bytes(archive.getbuffer())
    write_json(
        folder / CONFIG_NAME,
        {
            "regsurgery": config_block(surgery, tower),
            "format": "dinov2",
            "entry": entry.name,
            "arguments": arguments,
        },
    )


def check(loaded: Loaded, num_registers: int) -> None:
    """Raise `UnsupportedModelError` if none of the code's networks is the model; asked before the trace."""
    tower = canonical(loaded, loaded.model.state_dict())
    _contents(tower, blank_registers(tower, num_registers))


def _contents(tower: Canonical, register_tokens_1RD: Tensor) -> tuple[Entry, dict[str, Any], dict[str, Tensor]]:
    """The function, its arguments, and the state dict in the network's order.

    Raises:
        UnsupportedModelError: no function's network is the tower.
    """
    stock: Any = stock_tower(tower.architecture, tower.model_args, tower.num_classes)
    entry = _entry(tower, stock)
    position_1TD, register_tokens_1RD = without_register_positions(tower, stock, register_tokens_1RD)
    interpolation = TRAINED if stock.num_reg_tokens else Interpolation()
    like = tower.tensors["norm.weight"]
    tensors = {"mask_token": like.new_zeros(1, len(like))}
    for name, value in tower.tensors.items():
        for ours, theirs in GATED_NAMES.items() if entry.gated else ():
            name = name.replace(ours, theirs)
        tensors[name] = value
    tensors.pop("reg_token", None)
    tensors["pos_embed"] = position_1TD
    if register_tokens_1RD.shape[1]:
        tensors["register_tokens"] = register_tokens_1RD
    expected = dinov2_network.build(entry, tensors, interpolation).state_dict()
    for name in sorted({*expected, *tensors}):
        shapes = [tuple(state[name].shape) if name in state else "none" for state in (tensors, expected)]
        if shapes[0] != shapes[1]:
            raise _refuse(f"{entry.name} cannot hold the tensor '{name}' (it is {shapes[0]}, expected {shapes[1]})")
    arguments = _arguments(position_1TD, register_tokens_1RD, interpolation)
    return entry, arguments, {name: tensors[name] for name in expected}


def _arguments(position_1TD: Tensor, register_tokens_1RD: Tensor, interpolation: Interpolation) -> dict[str, Any]:
    """What the function is told; all else is its default."""
    arguments: dict[str, Any] = {"num_register_tokens": register_tokens_1RD.shape[1]}
    side = PATCH_SIZE * math.isqrt(position_1TD.shape[1] - 1)
    if side != IMAGE_SIZE:
        arguments["img_size"] = side
    if interpolation != Interpolation():
        arguments |= {"interpolate_antialias": interpolation.antialias, "interpolate_offset": interpolation.offset}
    return arguments


def _entry(tower: Canonical, stock: Any) -> Entry:
    """The function whose network is the tower."""
    entries = dinov2_network.ENTRIES
    entry = next((each for each in entries if each.width == stock.embed_dim), None)
    differs = list(_differences(tower, stock))
    if entry is None:
        widths = ", ".join(str(each.width) for each in entries)
        differs.insert(0, f"its width is {stock.embed_dim}, not one of {widths}")
    else:
        differs += _size_differences(entry, stock)
    if differs or entry is None:
        raise _refuse(f"no network of it is this {tower.architecture}: {'; '.join(differs)}")
    return entry


def _differences(tower: Canonical, stock: Any) -> Iterator[str]:
    """What no network of the code has, in words."""
    patch, image = stock.patch_embed.patch_size, stock.patch_embed.img_size
    if tuple(patch) != (PATCH_SIZE, PATCH_SIZE):
        yield f"its patch size is {patch[0]}, not {PATCH_SIZE}"
    if image[0] != image[1]:
        yield f"its position embedding is for images of {image[0]}x{image[1]}, not square"
    if not stock.has_class_token:
        yield "it has no class token"
    if "pos_embed" not in tower.tensors:
        yield "it has no position embedding"
    if not isinstance(stock.norm_pre, nn.Identity):
        yield "it has a norm before its blocks"
    if "blocks.0.ls1.gamma" not in tower.tensors:
        yield "it has no layer scale"
    if tower.eps != NORM_EPS:
        yield f"its norms have eps {tower.eps:g}, not {NORM_EPS:g}"
    if not {"cls", "tokens"} & {*tower.outputs.values()}:
        yield "it returns a head's output or a mean, for which there is no place (patch its backbone)"


def _size_differences(entry: Entry, stock: Any) -> Iterator[str]:
    """How a tower of the entry's width differs from it, in words."""
    block = stock.blocks[0]
    gated = type(block.mlp).__name__ == "GluMlp"
    activation = type(block.mlp.act).__name__
    if len(stock.blocks) != entry.depth:
        yield f"it has {len(stock.blocks)} blocks, {entry.name} has {entry.depth}"
    if block.attn.num_heads != entry.num_heads:
        yield f"it has {block.attn.num_heads} heads, {entry.name} has {entry.num_heads}"
    if gated != entry.gated:
        yield f"its MLPs are {'' if gated else 'not '}gated, those of {entry.name} are{' not' if gated else ''}"
    elif block.mlp.fc2.in_features != entry.hidden:
        yield f"its MLPs have {block.mlp.fc2.in_features} hidden units, those of {entry.name} {entry.hidden}"
    if activation != ("SiLU" if entry.gated else "GELU"):
        yield f"its activation is {activation}"


def _refuse(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"native mode: facebook's DINOv2 code cannot hold the model: {reason}; use another --format, or mode shift or "
        "bias"
    )


def snippets(surgery: Surgery, folder: str) -> Snippets:
    entry, arguments, _ = _contents(canonical(surgery.loaded, surgery.state()), surgery.register_tokens)
    given = {"pretrained": False, **arguments}
    call = ", ".join(
        ['"facebookresearch/dinov2"', f'"{entry.name}"', *(f"{name}={value!r}" for name, value in given.items())]
    )
    height, width = surgery.traced.image_size
    load = SNIPPET.format(call=call, folder=folder)
    return (
        ("torch.hub, facebook's code unmodified", load),
        ("Dense features", load + FEATURES.format(height=height, width=width)),
    )


def reload(folder: Path, config: dict[str, Any], *, trusted: bool = False) -> nn.Module:
    """The network of `folder`, which facebook's code would build, without that code; it takes images of every size.

    Raises:
        CheckpointError: the config names no function of that code, or the weights are missing, broken or not its.
    """
    entry = next((each for each in dinov2_network.ENTRIES if each.name == config.get("entry")), None)
    if entry is None:
        raise CheckpointError(f"{folder / CONFIG_NAME}: names no network of DINOv2; patch the model again")
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; patch the model again")
    tensors, arguments, usual = plain_state(unpickled(path), path), config["arguments"], Interpolation()
    interpolation = Interpolation(
        bool(arguments.get("interpolate_antialias", usual.antialias)),
        float(arguments.get("interpolate_offset", usual.offset)),
    )
    try:
        network = dinov2_network.build(entry, tensors, interpolation)
        network.load_state_dict(tensors, strict=True, assign=True)
    except (RuntimeError, LookupError) as error:
        reason = in_short(error)
        raise CheckpointError(f"{path}: not the weights of {entry.name}: {reason}; patch the model again") from error
    return network.eval()


def stand_in(original: Loaded, folder: Path, config: dict[str, Any], device_map: str | None) -> Loaded:
    """The network of `folder` in place of the model of `original`, at the size that one was made for."""
    own = original.own or original
    network = place(reload(folder, config), device_map)
    whole = Traceable(
        path="",
        image_size=own.image_size,
        inputs=lambda images: ((images,), {}),
        name_outputs=lambda value: {"x_norm_clstoken": value},
    )
    return replace(own, architecture=config["entry"], model=network, stored=False, tower=None).entered(whole)


def outputs(network: Any, images: Tensor, num_registers: int) -> dict[str, Tensor]:
    """What the kinds of `Canonical.outputs` are here."""
    found = network.forward_features(images)
    tokens_BTD = torch.cat(
        (found["x_norm_clstoken"][:, None], found["x_norm_regtokens"], found["x_norm_patchtokens"]), dim=1
    )
    return token_kinds(tokens_BTD, 1 + network.num_registers - num_registers, num_registers)


def foreign_code(folder: Path) -> str | None:
    """Weights have no code; the pickle is read as such."""
    return None
