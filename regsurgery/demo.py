"""The embedded demo: a small ViT with planted register neurons, made on demand."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

from regsurgery.checkpoints.whole import temporary_folder
from regsurgery.compiler.planting import plant
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

    from regsurgery.compiler.match import match
    from regsurgery.compiler.trace import tensor_inputs, trace
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
    traced = trace(loaded)
    inputs = tensor_inputs(loaded, next(image_set(None, 8).batches(8, loaded.preprocess)))
    planted = plant(traced, match(traced), inputs, PLANTED)
    loaded.model.save_pretrained(folder)  # type: ignore[operator]
    return planted
