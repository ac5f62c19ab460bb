"""The embedded demo: a small ViT with planted register neurons, made on demand."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from regsurgery.checkpoints.whole import temporary_folder
from regsurgery.compiler.mlp import Mlp, Projection
from regsurgery.compiler.planting import Bed, plant_into
from regsurgery.images.image_set import image_set
from regsurgery.settings import quiet_transformers

PLANTED = {1: 2, 2: 1}  # block -> number of planted neurons; recipes/demo.yaml has their indices
IMAGE_SIZE, PATCH_SIZE, WIDTH, BLOCKS = 96, 8, 64, 4


def write_demo(folder: Path) -> dict[int, list[int]]:
    """Write the demo checkpoint, a `ViTForImageClassification` of transformers; returns its planted neurons."""
    planted, files = _made()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return planted


@functools.cache
def _made() -> tuple[dict[int, list[int]], dict[str, bytes]]:
    """The planted neurons, and the checkpoint's files by name; made once in a process, where it takes 2 s."""
    with quiet_transformers(), temporary_folder() as scratch:
        folder = scratch / "demo"
        planted = _make(folder)
        return planted, {path.name: path.read_bytes() for path in folder.iterdir()}


def _make(folder: Path) -> dict[int, list[int]]:
    from transformers import ViTConfig, ViTForImageClassification

    from regsurgery.frontends.load import load

    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        intermediate_size=4 * WIDTH,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    config.num_labels = 10
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), "utf-8")
    loaded = load(str(folder))
    planted = plant_into(_bed(loaded.model, next(image_set(None, 8).batches(8, loaded.preprocess))), PLANTED)
    loaded.model.save_pretrained(folder)  # type: ignore[operator]
    return planted


def _bed(model: nn.Module, images: Tensor) -> Bed:
    """The demo's model by its own layers: a trace of it, which finds those of any model, takes a second."""
    layers = list(model.named_modules())
    ups = [name for name, layer in layers if isinstance(layer, nn.Linear) and layer.out_features == 4 * WIDTH]
    downs = [name for name, layer in layers if isinstance(layer, nn.Linear) and layer.in_features == 4 * WIDTH]
    norms = [layer for _, layer in layers if isinstance(layer, nn.LayerNorm)]  # two a block, and the last
    mlps = {
        block: Mlp(up, Projection(up, f"{up}.weight", f"{up}.bias"), None, f"{down}.weight")
        for block, (up, down) in enumerate(zip(ups, downs, strict=True))
    }

    def look(block: int) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        read = [model.get_submodule(ups[block]), norms[2 * block + 2]]
        hooks = [layer.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for layer in read]
        model(images)
        for hook in hooks:
            hook.remove()
        return seen[0], seen[1]

    return Bed(model, mlps, 1, look)
