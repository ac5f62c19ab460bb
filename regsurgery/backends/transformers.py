"""transformers: `config.json` + `model.safetensors`; a patched folder carries its own classes as remote code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from regsurgery.backends import modeling
from regsurgery.backends.modeling import FILE_NAME, modeling_source, refusal, write_folder
from regsurgery.checkpoints.reading import weight_files
from regsurgery.checkpoints.stored import stored_state
from regsurgery.errors import CheckpointError
from regsurgery.formats import WEIGHTS_NAMES, Snippets
from regsurgery.frontends.loaded import Loaded
from regsurgery.frontends.remote_code import code_file
from regsurgery.frontends.transformers import from_pretrained
from regsurgery.runtime import transformers as host_transformers
from regsurgery.runtime.surgery import ADDED
from regsurgery.runtime.transformers import FOREIGN, REFUSAL
from regsurgery.settings import quiet_transformers

if TYPE_CHECKING:
    from regsurgery.compiler.surgery import Surgery

WEIGHTS_NAME = WEIGHTS_NAMES["transformers"]
CONFIG_NAME = "config.json"
CALL = '{auto_class}.from_pretrained("{folder}", trust_remote_code=True)'
SNIPPET = f"""\
from transformers import {{auto_class}}

model = {CALL}
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

CODE = """
from .{file} import {name} as Stock{name}
"""
CLASS = '''

class {name}(PatchedModel, {stock}):
    """{name} with test-time registers; see the folder's README.md."""

    config_class = {config}
'''
CONFIG_CLASS = '''

class {name}(PatchedConfig, {stock}):
    """{name} with another model type on disk."""
'''


def emit(surgery: Surgery, folder: Path, target: Path) -> None:
    """Write config, weights and `modeling_regsurgery.py`."""
    loaded = surgery.loaded
    classes = _auto_classes(loaded)
    config_class = type(loaded.model.config)
    config_name = config_class.__name__
    tail = _code_of(config_class, type(loaded.model))
    tail += CONFIG_CLASS.format(name=config_name, stock=_stock_name(config_class))
    for name in dict.fromkeys(classes.values()):
        stock = _stock_name(type(loaded.model)) if name == loaded.architecture else f"transformers.{name}"
        tail += CLASS.format(name=name, config=config_name, stock=stock)
    classes["AutoConfig"] = config_name
    others = loaded.config.get("auto_map", {})  # of processors and tokenizers, which stay as they are
    kept = {auto: name for auto, name in others.items() if auto != "AutoConfig" and not auto.startswith("AutoModel")}
    words = refusal(call(loaded, "FOLDER"))
    entries: dict[str, Any] = {
        **_refusing(loaded.config, loaded.model.config, _configs_around(loaded.model, surgery.sites.tower_path), words),
        REFUSAL: words,
        "auto_map": {**kept, **{auto: f"{Path(FILE_NAME).stem}.{name}" for auto, name in classes.items()}},
        "model_type": FOREIGN + loaded.config["model_type"],
    }
    if not loaded.config.get("architectures"):
        entries["architectures"] = [loaded.architecture]
    write_folder(surgery, folder, CONFIG_NAME, modeling_source(host_transformers, tail), **entries)


def _configs_around(model: nn.Module, tower: str) -> frozenset[type]:
    """The config classes of `model`, of the module `tower` in it and of those between."""
    parts = tower.split(".") if tower else []
    around = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1))
    return frozenset(type(module.config) for module in around if hasattr(module, "config"))


def _refusing(on_disk: Mapping[str, Any], config: Any, kinds: frozenset[type], words: str) -> dict[str, Any]:
    """The entries of `on_disk`, a config as JSON, that hold configs of `kinds`; stock classes read `words` there.

    `CLIPVisionModel.from_pretrained` of a whole CLIP looks at its `vision_config` alone. A text tower has other kinds,
    and stays what it was.
    """
    from transformers import PreTrainedConfig

    found = {}
    for name, inner in vars(config).items():
        entry = on_disk.get(name)
        if isinstance(inner, PreTrainedConfig) and isinstance(entry, dict):
            more = _refusing(entry, inner, kinds, words) | ({REFUSAL: words} if type(inner) in kinds else {})
            found |= {name: {**entry, **more}} if more else {}
    return found


def _code_of(*classes: type) -> str:
    """Imports of those classes that come with the checkpoint; their files are in the folder, too."""
    files = {cls.__name__: file for cls in classes if (file := code_file(cls)) is not None}
    return "".join(CODE.format(file=file, name=name) for name, file in files.items())


def _stock_name(cls: type) -> str:
    """How the loader file names a class that it builds on."""
    return f"transformers.{cls.__name__}" if code_file(cls) is None else f"Stock{cls.__name__}"


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


def call(loaded: Loaded, folder: str) -> str:
    return CALL.format(auto_class=auto_class(loaded), folder=folder)


def auto_class(loaded: Loaded) -> str:
    """The auto class that loads the checkpoint's own architecture."""
    return next(auto for auto, name in _auto_classes(loaded).items() if name == loaded.architecture)


def loader_digest() -> str:
    """The digest of the loader file that this version writes, for any model."""
    names = CONFIG_CLASS.format(name="{config}", stock="transformers.{config}")
    names += CLASS.format(name="{name}", config="{config}", stock="transformers.{name}")
    return modeling.loader_digest(modeling_source(host_transformers, names))


def snippets(surgery: Surgery, folder: str) -> Snippets:
    name = auto_class(surgery.loaded)
    first = ("transformers, 4.57 or 5", SNIPPET.format(auto_class=name, folder=folder))
    if not _shows_registers(surgery):
        return first, ("In half precision", HALF.format(auto_class=name, folder=folder))
    height, width = surgery.traced.image_size
    kept = REGISTERS.format(folder=folder, height=height, width=width)
    start = surgery.sites.num_prefix if surgery.sites.placement == "prefix" else surgery.sites.num_tokens
    return first, (f"Tokens of the bare tower, including register tokens from index {start} on", kept)


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
        stored_weights = stored_state(weight_files(folder, WEIGHTS_NAME)) if stored else None
        model, info = from_pretrained(cls, folder, stored_weights)  # nosec B615 # a folder
    # Tensors that no part of the model uses are the source's: the stock class ignores them, too.
    wrong = sorted([*info["missing_keys"], *(name for name in info["unexpected_keys"] if name.endswith(ADDED))])
    if wrong:
        raise CheckpointError(f"{folder}: tensor '{wrong[0]}' is missing or unknown; patch the model again")
    return model.eval()


def foreign_code(folder: Path) -> str | None:
    """The folder's loader file, if neither this regsurgery nor a released one writes it."""
    return modeling.foreign_loader(folder, loader_digest())
