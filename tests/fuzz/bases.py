"""The good inputs that are damaged: the smallest checkpoints of the three libraries, and what was patched of them."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.picos import _open_clip, _timm, _transformers

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
        "intermediate_size": 32}  # fmt: skip
TINY_TIMM = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 8}
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16},
             "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
CLIP_PROCESSOR = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "do_center_crop": True,
                  "crop_size": {"height": 16, "width": 16},
                  "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
PICTURES = (("RGB", "png"), ("RGB", "jpg"), ("I;16", "png"), ("F", "tiff"), ("P", "gif"), ("RGB", "webp"),
            ("1", "bmp"), ("RGB", "ppm"))  # fmt: skip # mode, suffix
RECIPE = """\
schema: 1
model: tiny
register_neurons: {0: [3, 5], 1: [7]}
num_registers: 2
mode: shift
fill: zero
prefix: keep
compat: none
scale: [1.0, 0.5]
provenance:
  found_by: fuzz 0
  sweep: [{top_k: 1, outliers: 2.5}, {top_k: 2, outliers: 0.0}]
"""


@dataclass(frozen=True)
class Bases:
    """Folders by name; `traced` and `sites` are those of `vit`."""

    folders: dict[str, Path]
    traced: Any
    sites: Any


def build(root: Path) -> Bases:
    from regsurgery.compiler.surgery import perform
    from regsurgery.emit.folder import complete, emit
    from regsurgery.emit.run_record import run_of
    from regsurgery.frontends.load import load
    from regsurgery.models import locate
    from regsurgery.options import PatchOptions
    from regsurgery.progress import Progress
    from regsurgery.recipe import parse_recipe

    quiet()
    _transformers("ViTForImageClassification", "ViTConfig", **TINY, num_labels=3)(root / "vit")
    (root / "vit" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    _transformers("Dinov2Model", "Dinov2Config", **{k: v for k, v in TINY.items() if k != "intermediate_size"})(
        root / "dinov2"
    )
    _transformers("CLIPVisionModelWithProjection", "CLIPVisionConfig", **TINY, projection_dim=8)(root / "clip")
    (root / "clip" / "preprocessor_config.json").write_text(json.dumps(CLIP_PROCESSOR))
    _timm("vit_tiny_patch16_224", **TINY_TIMM)(root / "timm")
    _timm("beit_base_patch16_224", **TINY_TIMM, dynamic_img_size=None, init_values=1.0)(root / "timm-beit")
    for name in ("timm", "timm-beit"):
        path = root / name / "config.json"
        config = json.loads(path.read_text())
        config["pretrained_cfg"]["input_size"] = [3, 16, 16]
        path.write_text(json.dumps(config))
    _open_clip(image_size=16, layers=2, width=16, head_width=8, patch_size=8)(root / "open_clip")
    _shard(root / "vit", root / "sharded")
    for name, zipped in (("bin", True), ("bin-legacy", False)):
        _pickle(root / "vit", root / name, zipped)
    _files(root)
    _adapter(root)
    _images(root / "images")
    recipe = parse_recipe(RECIPE, "recipe.yaml")
    found: Any = None
    for name in ("timm", "vit"):
        loaded = load(str(root / name))
        found = locate(loaded, Progress())
        surgery = perform(found, recipe)
        with emit(surgery, root / f"patched-{name}", loaded.library) as folder:
            options = PatchOptions(verification=False)
            run = run_of(surgery, loaded.library, options.image_set(), None, False, options, False)
            complete(surgery, folder, loaded.library, None, run)
    return Bases({path.name: path for path in root.iterdir()}, found.traced, found.sites)


def _files(root: Path) -> None:
    """Weights files as training leaves them, each `weights.NAME` in a folder of its own."""
    import timm
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file

    from tests.e2e.test_files import Archived, openai_clip

    vit = load_file(root / "vit" / "model.safetensors")
    args = argparse.Namespace(model="vit_tiny_patch16_224", num_classes=3, gp="token", in_chans=3, mean=(0.5,) * 3,
                              model_kwargs=TINY_TIMM, input_size=(3, 16, 16), crop_pct=0.9)  # fmt: skip
    state = timm.create_model(args.model, num_classes=3, **TINY_TIMM).state_dict()
    run = {"epoch": 1, "arch": args.model, "state_dict": state, "state_dict_ema": state, "args": args, "optimizer": {}}
    for name in ("file-timm", "file-archive", "file-bare", "adapter", "images"):
        (root / name).mkdir()
    torch.save(run, root / "file-timm" / "weights.pth.tar")
    torch.jit.trace(Archived(openai_clip()), torch.ones(1, 64)).save(str(root / "file-archive" / "weights.pt"))
    for name in ("file-ckpt", "file-shards"):
        shutil.copytree(root / "vit", root / name)
        (root / name / "model.safetensors").unlink()
    wrapped = {f"net.{name}": value for name, value in vit.items()}
    torch.save({"state_dict": {**wrapped, "criterion.weight": torch.ones(3)}, "hyper_parameters": {"lr": 0.1}},
               root / "file-ckpt" / "weights.ckpt")  # fmt: skip
    shutil.copyfile(root / "vit" / "model.safetensors", root / "file-bare" / "weights.safetensors")
    shutil.copyfile(root / "vit" / "config.json", root / "file-bare" / "config.json")
    (root / "file-bare" / "arch").write_text(f"transformers:{root / 'vit'}")
    save_torch_state_dict(vit, root / "file-shards", safe_serialization=False, max_shard_size="8KB")
    (root / "file-shards" / "pytorch_model.bin.index.json").rename(root / "file-shards" / "weights.index.json")


def _adapter(root: Path) -> None:
    """An adapter of the folder `vit`, as peft saves it."""
    from safetensors.torch import save_file

    settings = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": str(root / "vit"), "r": 2,
                "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["q_proj"], "modules_to_save": ["classifier"],
                "bias": "none", "auto_mapping": {"base_model_class": "ViTForImageClassification",
                                                 "parent_library": "transformers.models.vit.modeling_vit"}}  # fmt: skip
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {
        "base_model.model.classifier.weight": torch.ones(3, 16),
        "base_model.model.classifier.bias": torch.ones(3),
    }
    for block in range(2):
        name = f"base_model.model.vit.layers.{block}.attention.q_proj"
        tensors |= {f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(16, 2)}
    save_file(tensors, root / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})


def _images(folder: Path) -> None:
    """A picture of each kind of file."""
    from PIL import Image

    (folder / "labels").mkdir()
    picture = Image.linear_gradient("L").resize((24, 20))
    for number, (mode, suffix) in enumerate(PICTURES):
        picture.convert("L").convert(mode).save(folder / "labels" / f"{number}.{suffix}")


def quiet() -> None:
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)


def _shard(source: Path, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number in range(3):
        shard = f"model-0000{number + 1}-of-00003.safetensors"
        own = names[number::3]
        save_file({name: tensors[name] for name in own}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, shard)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _pickle(source: Path, folder: Path, zipped: bool) -> None:
    from safetensors.torch import load_file

    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
