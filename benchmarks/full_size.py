"""Checkpoints of the shapes of published models, with random weights and planted register neurons.

    python -m benchmarks.full_size dinov2-l FOLDER     # writes the checkpoint, prints which neurons are planted (JSON)

Architecture, sizes, dtype, shards and preprocessing are those of the published checkpoints. Tensors are made one at a
time while the file is written: windows, at random places, of one pool of random numbers. Then the network runs up to
the blocks that get register neurons, reading its weights operator by operator, and the rows and columns of these
neurons are overwritten where they lie in the file. Layer scales are 1: with a published initial value (0.1 and less) no
neuron writes enough to make an outlier.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SEED = 0
STD = 0.02  # of weights with more than one dimension, and of class tokens
POOL = 50_000_017  # random numbers; a prime, so that no width divides it
NUM_IMAGES = 8  # generated pictures that decide where the planted neurons fire
FIRING, OUTLIERS = 2.0, 8.0  # patches per image: of one neuron, and of all together at most
COPIES = 2.1  # of the checkpoint: itself, the patched one, and room
SHARD_BYTES = 5_000_000_000  # where a checkpoint is published in shards
UNREAD = "0" * 64  # in place of the sha256 of weights that nobody has read yet
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
OPENAI = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@dataclass(frozen=True)
class FullSize:
    """A published shape.

    Attributes:
        architecture: class of transformers; `config`: the keywords of its config.
        processor: `preprocessor_config.json`.
        planted: block -> number of register neurons.
        shard_bytes: size of the shards; None for a single file.
    """

    name: str
    architecture: str
    config: Mapping[str, Any]
    processor: Mapping[str, Any]
    planted: Mapping[int, int]
    dtype: str = "float32"
    shard_bytes: int | None = None


def _cropped(kind: str, side: int, pixels: Mapping[str, Any], resized: int | None = None) -> dict[str, Any]:
    """Settings of a processor that resizes the short side and cuts out the centre."""
    return {
        "image_processor_type": kind, "do_resize": True, "size": {"shortest_edge": resized or side}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": side, "width": side}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True, **pixels,
    }  # fmt: skip


def _vit(width: int, layers: int, heads: int, hidden: int) -> dict[str, Any]:
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": hidden,
    }  # fmt: skip


CLIP_L = _vit(1024, 24, 16, 4096) | {"patch_size": 14, "projection_dim": 768}
SO400M = _vit(1152, 27, 16, 4304)
LLAMA_7B = _vit(4096, 32, 32, 11008) | {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096}
INTERNVIT = {"patch_size": [14, 14], "use_qk_norm": True, "norm_type": "rms_norm", "layer_scale_init_value": 1.0}

SHAPES = {
    "dinov2-l": FullSize(
        "DINOv2-L/14", "Dinov2Model",
        _vit(1024, 24, 16, 4096) | {"image_size": 518, "patch_size": 14, "layerscale_value": 1.0},
        _cropped("BitImageProcessor", 224, IMAGENET, resized=256), {12: 3, 13: 2},
    ),
    "clip-l": FullSize(
        "CLIP-L/14", "CLIPModel",
        {"vision_config": {**CLIP_L, "image_size": 224}, "projection_dim": 768,
         "text_config": _vit(768, 12, 12, 3072) | {"projection_dim": 768, "vocab_size": 49408}},
        _cropped("CLIPImageProcessor", 224, OPENAI), {11: 3, 12: 2},
    ),
    "siglip-so400m": FullSize(
        "SigLIP So400m/14, 384 px", "SiglipModel",
        {"vision_config": {**SO400M, "image_size": 384, "patch_size": 14},
         "text_config": {**SO400M, "vocab_size": 32000, "projection_size": 1152}},
        {"image_processor_type": "SiglipImageProcessor", "do_resize": True, "size": {"height": 384, "width": 384},
         "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, **HALF},
        {13: 3, 14: 2},
    ),
    "llava-7b": FullSize(
        "LLaVA 1.5 7B", "LlavaForConditionalGeneration",
        {"vision_config": {**CLIP_L, "image_size": 336, "model_type": "clip_vision_model"}, "text_config": LLAMA_7B,
         "image_token_index": 32000, "vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
        _cropped("CLIPImageProcessor", 336, OPENAI), {11: 3, 12: 2}, "float16", SHARD_BYTES,
    ),
    "internvit-6b": FullSize(
        "InternViT-6B, 448 px", "InternVLVisionModel",
        _vit(3200, 45, 25, 12800) | INTERNVIT | {"image_size": [448, 448]},
        _cropped("CLIPImageProcessor", 448, IMAGENET), {29: 3}, "bfloat16", SHARD_BYTES,
    ),
    "smoke": FullSize(
        "smoke", "InternVLVisionModel",
        _vit(64, 4, 2, 256) | INTERNVIT | {"image_size": [112, 112]},
        _cropped("CLIPImageProcessor", 112, IMAGENET), {1: 2}, "bfloat16", 100_000,
    ),
}  # fmt: skip
SMOKE = "smoke"  # that it runs; no model's shape
PUBLISHED = tuple(name for name in SHAPES if name != SMOKE)  # in the order of what they take


def main() -> None:
    name, folder = sys.argv[1:]
    print(json.dumps(write(SHAPES[name], Path(folder))))


def write(shape: FullSize, folder: Path) -> dict[int, list[int]]:
    """Write the checkpoint; at no time more than its largest tensor and the pool are in memory.

    Returns:
        block -> its planted neurons.

    Raises:
        OutputError: the disk has no room for it and for its patched copy.
    """
    import torch

    from regsurgery.checkpoints.stored import ArrangedTensor
    from regsurgery.checkpoints.writing import write_json, write_sharded

    config, empty = described(shape)
    dtype = getattr(torch, shape.dtype)
    _check_room(folder.parent, COPIES * dtype.itemsize * sum(tensor.numel() for tensor in empty.values()))
    generator = torch.Generator().manual_seed(SEED)
    size = min(POOL, 2 * max(tensor.numel() for tensor in empty.values()) + 1)
    pool = torch.randn(size, generator=generator).mul_(STD).to(dtype)
    state = {}
    for name, tensor in empty.items():
        start = int(torch.randint(len(pool), (), generator=generator))
        make = partial(_values, name, tensor.shape, pool, start)
        state[name] = ArrangedTensor(tensor.to(dtype), make, dtype)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", dict(shape.processor))
    write_sharded(folder, "model.safetensors", state, shape.shard_bytes)
    return plant_on_disk(shape, folder)


def described(shape: FullSize) -> tuple[Any, dict[str, Tensor]]:
    """The config, and every tensor by its name on disk, without data."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    architecture = getattr(transformers, shape.architecture)
    config = architecture.config_class(**shape.config)
    config.architectures, config.dtype = [shape.architecture], shape.dtype
    with torch.device("meta"):
        model = architecture(config)
    return config, revert_weight_conversion(model, model.state_dict())


def _check_room(folder: Path, needed: float) -> None:
    from regsurgery.errors import OutputError

    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(f"{folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")


def _values(name: str, shape: tuple[int, ...], pool: Tensor, start: int) -> Tensor:
    """Zero for biases, 1 for what scales (norms, layer scales, temperatures), random numbers for all others."""
    import torch

    if len(shape) < 2 and not name.endswith("class_embedding"):
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=pool.dtype)
    missing, pieces = torch.Size(shape).numel(), []
    while missing:
        pieces.append(pool[start : start + missing])
        missing, start = missing - len(pieces[-1]), 0
    return torch.cat(pieces).reshape(shape)


def plant_on_disk(shape: FullSize, folder: Path) -> dict[int, list[int]]:
    """Plant the register neurons of `shape` into its checkpoint; weights are read operator by operator."""
    from torch import nn

    from regsurgery.checkpoints.stored import StoredTensor
    from regsurgery.compiler.graph import set_parameter
    from regsurgery.compiler.mlp import mlp_of
    from regsurgery.compiler.planting import plant
    from regsurgery.compiler.trace import tensor_inputs
    from regsurgery.images.image_set import image_set
    from regsurgery.models import open_model
    from regsurgery.options import LoadOptions

    known = {path.name: UNREAD for path in folder.glob("*.safetensors")}
    located = open_model(folder, LoadOptions(max_memory=0), known=known)
    loaded, traced, sites = located.loaded, located.traced, located.sites
    edited: dict[str, StoredTensor] = {}
    for block in shape.planted:
        mlp = mlp_of(traced, sites.blocks[block])
        assert mlp.value is None and mlp.gate.bias is not None, "published shapes with plain MLPs"
        for name in (mlp.gate.weight, mlp.gate.bias, mlp.down):
            stored = traced.graph_module.get_parameter(name)
            assert isinstance(stored, StoredTensor)
            edited[name] = stored
            set_parameter(traced.graph_module, name, nn.Parameter(stored.read(), requires_grad=False))
    pictures = image_set(None, NUM_IMAGES)
    inputs = tensor_inputs(loaded, next(pictures.batches(NUM_IMAGES, loaded.preprocess)))
    firing = min(FIRING, OUTLIERS / sum(shape.planted.values()))
    planted = plant(traced, sites, inputs, shape.planted, firing=firing)
    for name, stored in edited.items():
        _overwrite(stored, traced.graph_module.get_parameter(name).detach())
    return planted


def _overwrite(stored: Any, value: Tensor) -> None:
    """Write `value` where the tensor `stored` lies in its file."""
    import torch

    assert value.dtype == stored.dtype and value.shape == stored.shape
    with stored.path.open("r+b") as file:
        file.seek(stored.data_start + stored.entry.start)
        file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy())


if __name__ == "__main__":
    main()
