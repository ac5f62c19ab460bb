"""transformers: `config.json` + `model.safetensors`; a patched folder carries its own classes as remote code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from regsurgery.backends import modeling
from regsurgery.backends.modeling import FILE_NAME, modeling_source, write_folder
from regsurgery.checkpoints.reading import weight_files
from regsurgery.errors import CheckpointError
from regsurgery.formats import WEIGHTS_NAMES, Snippets
from regsurgery.frontends.loaded import Loaded
from regsurgery.frontends.transformers import from_pretrained
from regsurgery.runtime import transformers as host_transformers
from regsurgery.runtime.transformers import FOREIGN
from regsurgery.settings import quiet_transformers

if TYPE_CHECKING:
    from regsurgery.compiler.surgery import Surgery

WEIGHTS_NAME = WEIGHTS_NAMES["transformers"]
CONFIG_NAME = "config.json"
SNIPPET = """\
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{folder}", trust_remote_code=True)
"""
HALF = """\
import torch
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{folder}", trust_remote_code=True, dtype=torch.bfloat16)
"""
REGISTERS = """\
import torch
from transformers import AutoModel

tower = AutoModel.from_pretrained("{folder}", trust_remote_code=True, keep_registers=True).eval()
images = torch.zeros(1, 3, {height}, {width}, dtype=tower.dtype)  # preprocessed photos
with torch.no_grad():
    tokens = tower(images).last_hidden_state
"""

CLASS = '''

class {name}(PatchedModel, transformers.{name}):
    """{name} with test-time registers; see the folder's README.md."""

    config_class = {config}
'''
CONFIG_CLASS = '''

class {name}(PatchedConfig, transformers.{name}):
    """{name} with another model type on disk."""
'''


def emit(surgery: Surgery, folder: Path, target: Path) -> None:
    """Write config, weights and `modeling_regsurgery.py`."""
    loaded = surgery.loaded
    classes = _auto_classes(loaded)
    config_name = type(loaded.model.config).__name__
    tail = CONFIG_CLASS.format(name=config_name)
    tail += "".join(CLASS.format(name=name, config=config_name) for name in dict.fromkeys(classes.values()))
    classes["AutoConfig"] = config_name
    auto_map = {auto: f"{Path(FILE_NAME).stem}.{name}" for auto, name in classes.items()}
    model_type = FOREIGN + loaded.config["model_type"]
    source = modeling_source(host_transformers, tail)
    write_folder(surgery, folder, CONFIG_NAME, source, model_type=model_type, auto_map=auto_map)


def _auto_classes(loaded: Loaded) -> dict[str, str]:
    """Auto class -> model class for the checkpoint's own architecture and for its base model."""
    from transformers.models.auto import modeling_auto

    config_class = type(loaded.model.config)
    found = {}
    for name in sorted(vars(modeling_auto)):
        auto = getattr(modeling_auto, name)
        mapping = getattr(auto, "_model_mapping", None)
        if not name.startswith("AutoModel") or mapping is None or config_class not in mapping:
            continue
        classes = mapping[config_class]
        for cls in classes if isinstance(classes, tuple) else (classes,):
            if cls.__name__ == loaded.architecture or (name == "AutoModel" and name not in found):
                found[name] = cls.__name__
    if loaded.architecture not in found.values():
        found["AutoModel"] = loaded.architecture
    return found


def auto_class(loaded: Loaded) -> str:
    """The auto class that loads the checkpoint's own architecture."""
    return next(auto for auto, name in _auto_classes(loaded).items() if name == loaded.architecture)


def loader_digest() -> str:
    """The digest of the loader file that this version writes, for any model."""
    names = CONFIG_CLASS.format(name="{config}") + CLASS.format(name="{name}", config="{config}")
    return modeling.loader_digest(modeling_source(host_transformers, names))


def snippets(surgery: Surgery, folder: str) -> Snippets:
    name = auto_class(surgery.loaded)
    first = ("transformers, 4.57 or 5", SNIPPET.format(auto_class=name, folder=folder))
    if not _shows_registers(surgery):
        return first, ("In half precision", HALF.format(auto_class=name, folder=folder))
    height, width = surgery.traced.image_size
    kept = REGISTERS.format(folder=folder, height=height, width=width)
    start = surgery.sites.num_prefix if surgery.sites.placement == "prefix" else surgery.sites.num_tokens
    return first, (f"Tokens of the bare tower, including the register token(s) from index {start} on", kept)


def _shows_registers(surgery: Surgery) -> bool:
    """Whether the checkpoint's `AutoModel` is the bare tower, which can keep its registers."""
    loaded = surgery.loaded
    base = _auto_classes(loaded).get("AutoModel")
    tower = getattr(loaded.model, "base_model_prefix", "") if base != loaded.architecture else ""
    return surgery.plan.num_registers > 0 and base is not None and surgery.sites.tower_path == tower


def reload(
    folder: Path,
    config: dict[str, Any],
    *,
    trusted: bool = False,
    stored: bool = False,
    image_size: tuple[int, int] | None = None,
) -> nn.Module:
    """The patched model of `folder`, built by the folder's own file; `stored`: its weights stay on disk."""
    loader = modeling.import_modeling(folder, loader_digest(), trusted=trusted)
    cls = getattr(loader, config["architectures"][0])
    with quiet_transformers():
        model, info = from_pretrained(cls, folder, weight_files(folder, WEIGHTS_NAME) if stored else None)  # nosec B615 # a folder
    if info["missing_keys"] or info["unexpected_keys"]:
        names = sorted([*info["missing_keys"], *info["unexpected_keys"]])
        raise CheckpointError(f"{folder}: tensor '{names[0]}' is missing or unknown; patch the model again")
    return model.eval()


def foreign_code(folder: Path) -> str | None:
    """The folder's loader file, if neither this regsurgery nor a released one writes it."""
    return modeling.foreign_loader(folder, loader_digest())
