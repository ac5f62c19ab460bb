"""transformers: `config.json` + `model.safetensors`; a patched folder carries its own classes as remote code."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from regsurgery.backends import WEIGHTS_NAMES, Snippets, host_transformers
from regsurgery.backends.modeling import FILE_NAME, import_modeling, is_source, modeling_source, write_folder
from regsurgery.checkpoint_io import weight_files
from regsurgery.errors import CheckpointError, UnsupportedModelError
from regsurgery.families import ENTRIES, NOISE_INPUTS, PACKED_INPUTS, TEXT_CONFIG_KEY
from regsurgery.limits import BROKEN, check_numbers, read_json
from regsurgery.loading import Checkpoint, Loaded, LoadOptions
from regsurgery.stored import StoredTensor, is_stored, stored_state

if TYPE_CHECKING:
    from regsurgery.surgery import Surgery

WEIGHTS_NAME = WEIGHTS_NAMES["transformers"]
CONFIG_NAME = "config.json"
UNLOADABLE = (*BROKEN, SafetensorError, StrictDataclassError)  # what transformers raises on broken configs and weights
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


def load(checkpoint: Checkpoint, options: LoadOptions) -> Loaded:
    """Load a transformers folder with the class that its config names."""
    folder, config = checkpoint.folder, checkpoint.config
    import transformers
    from transformers.utils import logging

    architecture = _architecture(folder / checkpoint.config_name, config)
    cls = getattr(transformers, architecture, None)
    if cls is None and "auto_map" in config and not options.trust_remote_code:
        raise CheckpointError(
            f"{folder}: {architecture} is code that the checkpoint brings along; pass "
            "--trust-remote-code if you trust its author"
        )
    if cls is None and "auto_map" in config:
        cls = transformers.AutoModel
    if cls is None:
        raise UnsupportedModelError(
            f"{folder / checkpoint.config_name}: this version of transformers has no {architecture}"
        )
    if not hasattr(cls, "from_pretrained") or not hasattr(cls, "from_config" if "Auto" in architecture else "forward"):
        raise CheckpointError(f"{folder / checkpoint.config_name}: {architecture!r} is no model class of transformers")
    if not options.trust_remote_code:
        _refuse_kernels(folder / checkpoint.config_name, config)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model, info = from_pretrained(
            cls,
            folder,
            checkpoint.weights if checkpoint.stored else None,
            trust_remote_code=options.trust_remote_code,
            device_map=options.device_map,
            ignore_mismatched_sizes=True,
        )
    except UNLOADABLE as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {' '.join(str(error).split())[:300]}") from error
    for kind, problem in (
        ("missing_keys", "is missing"),
        ("mismatched_keys", "has another shape than the config says"),
    ):
        if info.get(kind):
            found = info[kind][0] if isinstance(info[kind], list) else min(info[kind])
            name = found if isinstance(found, str) else found[0]
            name = _disk_names(model)(name) or name
            raise CheckpointError(
                f"{checkpoint.weights[0]}: tensor '{name}' {problem} ({len(info[kind])} in all); "
                "config and weights do not belong together"
            )
    entry, feature_layer = ENTRIES.get(architecture, ("", None))
    parameters = inspect.signature(model.get_submodule(entry).forward).parameters
    if "pixel_values" not in parameters:
        raise UnsupportedModelError(
            f"{folder}: {architecture} takes no pixel_values, it is no vision model; give one that takes images"
        )
    for name, reason in PACKED_INPUTS.items():
        if name in parameters:
            raise UnsupportedModelError(f"{folder}: {architecture} is not supported: {reason} (its input '{name}')")
    own_size = _own_size(config, model)
    preprocess_at, note, image_size = _preprocessing(folder, own_size, model.dtype, options)
    return Loaded(
        **vars(checkpoint),
        architecture=architecture,
        model=model.eval(),
        image_size=image_size,
        preprocess=preprocess_at(None),
        preprocess_at=preprocess_at,
        preprocess_note=note,
        inputs=_inputs(model, own_size, parameters, collects=bool(entry)),
        name_outputs=_features_named(model, feature_layer) if feature_layer else name_outputs,
        disk_name=_disk_names(model),
        entry=entry,
    )


def from_pretrained(
    cls: Any, folder: Path, stored: Sequence[Path] | None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The model and what was missing, mismatched or left over; `stored`: weight files that stay on disk."""
    options = {**options, "dtype": "auto", "output_loading_info": True}
    if stored is None:
        return cls.from_pretrained(folder, **options)
    from transformers import AutoConfig

    trusted = options.get("trust_remote_code", False)
    config = (cls.config_class or AutoConfig).from_pretrained(folder, trust_remote_code=trusted)
    return cls.from_pretrained(None, config=config, state_dict=stored_state(stored), **{**options, "device_map": None})


def at_size(loaded: Loaded, size: tuple[int, int]) -> Loaded:
    """`loaded` for images of another size; transformers models interpolate their position embedding by themselves."""
    return loaded.resized(loaded.model, size)


def _architecture(config_path: Path, config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures") or ["AutoModel"]
    if not isinstance(architectures, list) or not isinstance(architectures[0], str):
        raise CheckpointError(
            f"{config_path}: 'architectures' must be a list of class names, found {architectures!r:.200}"
        )
    if not architectures[0].isidentifier():
        raise CheckpointError(f"{config_path}: {architectures[0]!r:.200} under 'architectures' is no class name")
    return architectures[0]


def _refuse_kernels(config_path: Path, config: Mapping[str, Any]) -> None:
    """An attention implementation of the form `owner/repository` is code that transformers would fetch and run."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
            if "/" in str(part.get(key)):
                raise CheckpointError(
                    f"{config_path}: {key!r} names code of another repository; remove it, or pass --trust-remote-code "
                    "if you trust its author"
                )


def _own_size(config: Mapping[str, Any], model: nn.Module) -> tuple[int, int]:
    """(height, width) of the position embedding."""
    vision = getattr(model.config, "vision_config", model.config)
    size = getattr(vision, "image_size", None)
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
        return size[0], size[1]
    if type(size) is int and size > 0:
        return size, size
    raise UnsupportedModelError(f"{config.get('model_type')}: its config has no image_size")


def _preprocessing(
    folder: Path, own_size: tuple[int, int], dtype: torch.dtype, options: LoadOptions
) -> tuple[Callable[[tuple[int, int] | None], Callable[[list[Any]], Tensor]], str, tuple[int, int]]:
    """The model's own preprocessing by the size that it shall make, which is its own one for None; a line that names
    it; and its own size (height, width).
    """
    settings = [folder / name for name in ("preprocessor_config.json", "processor_config.json")]
    settings = [path for path in settings if path.is_file()]
    if settings:
        from transformers import AutoImageProcessor

        for path in settings:
            check_numbers(path, read_json(path))
        try:
            processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
            size = _processor_size(processor)
        except UNLOADABLE as error:
            raise CheckpointError(
                f"{settings[0]}: transformers cannot load it: {' '.join(str(error).split())[:300]}"
            ) from error

        def processed_at(size: tuple[int, int] | None) -> Callable[[list[Any]], Tensor]:
            other = {} if size is None else _sizes_at(processor, size)

            def processed(images: list[Any]) -> Tensor:
                return processor(images=images, return_tensors="pt", **other)["pixel_values"].to(dtype)

            return processed

        return processed_at, f"the model's own {type(processor).__name__}", size or own_size
    from torchvision.transforms import v2

    def resized_at(size: tuple[int, int] | None) -> Callable[[list[Any]], Tensor]:
        plain = v2.Compose(
            [
                v2.PILToTensor(),
                v2.Resize(size or own_size, antialias=True),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )
        return lambda images: torch.stack([plain(image) for image in images]).to(dtype)

    return resized_at, "no preprocessor_config.json in the folder: resized, mean and std 0.5", own_size


def _sizes_at(processor: Any, size: tuple[int, int]) -> dict[str, dict[str, int]]:
    """Arguments with which `processor` makes images of `size`: what it resizes to grows as what it crops to."""
    height, width = size
    target = {"height": height, "width": width}
    if not getattr(processor, "do_center_crop", False):
        return {"size": target}
    own = _processor_size(processor)
    given = dict(processor.size)
    edges = {name: value for name, value in given.items() if value is not None}
    factors = {"height": height / own[0], "width": width / own[1]} if own else {}
    shorter = min(factors.values(), default=1.0)
    resized = {name: max(min(size), round(value * factors.get(name, shorter))) for name, value in edges.items()}
    return {"size": resized, "crop_size": target}


def _processor_size(processor: Any) -> tuple[int, int] | None:
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    height, width = (
        size.get(key) if isinstance(size, dict) else getattr(size, key, None) for key in ("height", "width")
    )
    return (height, width) if height and width else None


def _inputs(model: Any, own_size: tuple[int, int], parameters: Collection[str], *, collects: bool) -> Any:
    """Images -> the arguments of a forward with these parameters; `collects`: all hidden states are wanted."""
    interpolates = "interpolate_pos_encoding" in parameters
    noise = NOISE_INPUTS.get(model.config.model_type)
    text = getattr(model.config, TEXT_CONFIG_KEY, None) if "input_ids" in parameters else None

    def inputs(images: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs: dict[str, Any] = {"pixel_values": images}
        if interpolates and tuple(images.shape[-2:]) != own_size:
            kwargs["interpolate_pos_encoding"] = True
        if text is not None:
            ids = torch.arange(1, 9, device=images.device).clamp(max=text.vocab_size - 1)
            if isinstance(getattr(text, "eos_token_id", None), int):
                ids[-1] = min(text.eos_token_id, text.vocab_size - 1)  # where CLIP pools
            kwargs["input_ids"] = ids.expand(images.shape[0], -1)
        if noise is not None:
            num_patches = math.prod(side // model.config.patch_size for side in images.shape[-2:])
            kwargs[noise] = torch.linspace(0, 1, num_patches, device=images.device).expand(images.shape[0], -1)
        if collects:
            kwargs["output_hidden_states"] = True
        return (), kwargs

    return inputs


def _features_named(model: Any, feature_layer: str) -> Callable[[Any], dict[str, Tensor]]:
    """`name_outputs`, but the hidden state that a language model reads is `image_features`, the last of several."""
    layers = getattr(model.config, feature_layer)
    layer = layers if isinstance(layers, int) else layers[-1]

    def named(output: Any) -> dict[str, Tensor]:
        found = name_outputs(output)
        read = f"hidden_states.{layer % len(output.hidden_states)}"
        return {"image_features" if name == read else name: value for name, value in found.items()}

    return named


def name_outputs(output: Any) -> dict[str, Tensor]:
    """The tensors of a transformers ModelOutput by field name; nested ones are joined with a dot."""
    leaves, _ = pytree.tree_flatten_with_path(output)
    return {
        ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path): leaf
        for path, leaf in leaves
        if isinstance(leaf, Tensor)
    }


def _disk_names(model: Any) -> Callable[[str], str | None]:
    """Transformers 5 renames keys on load; names on disk are those that its own saving would give."""
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    if is_stored(model):
        return {name: tensor.entry.name for name, tensor in state.items() if isinstance(tensor, StoredTensor)}.get
    on_disk = {tensor.data_ptr(): name for name, tensor in revert_weight_conversion(model, dict(state)).items()}
    names = {name: on_disk.get(tensor.data_ptr()) for name, tensor in state.items()}
    return names.get


# --- writing --------------------------------------------------------------------------------------------------------

CLASS = '''

class {name}(PatchedModel, transformers.{name}):
    """{name} with test-time registers; see the folder's README.md."""

    config_class = {config}
'''
CONFIG_CLASS = '''

class {name}(PatchedConfig, transformers.{name}):
    """{name} as it is, but for its model type on disk."""
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
    model_type = host_transformers.FOREIGN + loaded.config["model_type"]
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


def is_own_source(text: str) -> bool:
    """Whether `text` is the `modeling_regsurgery.py` that this version writes, for one model or another."""
    return is_source(text, host_transformers, CLASS, CONFIG_CLASS)


def snippets(surgery: Surgery, folder: str) -> Snippets:
    name = auto_class(surgery.loaded)
    first = ("transformers, 4.57 or 5", SNIPPET.format(auto_class=name, folder=folder))
    if not _shows_registers(surgery):
        return first, ("In half precision", HALF.format(auto_class=name, folder=folder))
    height, width = surgery.traced.image_size
    kept = REGISTERS.format(folder=folder, height=height, width=width)
    start = surgery.sites.num_prefix if surgery.sites.placement == "prefix" else surgery.sites.num_tokens
    return first, (f"Tokens of the bare tower, with the register token(s) kept, from index {start} on", kept)


def _shows_registers(surgery: Surgery) -> bool:
    """Whether the checkpoint's `AutoModel` is the bare tower, which can keep its registers."""
    loaded = surgery.loaded
    base = _auto_classes(loaded).get("AutoModel")
    tower = getattr(loaded.model, "base_model_prefix", "") if base != loaded.architecture else ""
    return surgery.plan.num_registers > 0 and base is not None and surgery.sites.tower_path == tower


def reload(
    folder: Path, config: dict[str, Any], *, stored: bool = False, image_size: tuple[int, int] | None = None
) -> nn.Module:
    """The patched model of `folder`, built by the folder's own file; `stored`: its weights stay on disk."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    cls = getattr(import_modeling(folder), config["architectures"][0])
    model, info = from_pretrained(cls, folder, weight_files(folder, WEIGHTS_NAME) if stored else None)
    if info["missing_keys"] or info["unexpected_keys"]:
        names = sorted([*info["missing_keys"], *info["unexpected_keys"]])
        raise CheckpointError(f"{folder}: tensor '{names[0]}' is missing or unknown; patch the model again")
    return model.eval()
