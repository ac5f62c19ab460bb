"""How transformers checkpoints are read."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from regsurgery.checkpoints.limits import BROKEN, read_json
from regsurgery.checkpoints.reading import index_of
from regsurgery.checkpoints.stored import StoredTensor, is_stored, stored_state
from regsurgery.errors import LISTED, CheckpointError, UnsupportedModelError, library_fails
from regsurgery.families import FEATURE_LAYERS, NOISE_INPUTS, PACKED_INPUTS, TEXT_CONFIG_KEY
from regsurgery.frontends.loaded import Checkpoint, Entry, Loaded, inside
from regsurgery.frontends.processors import Preprocessing, preprocessing
from regsurgery.frontends.remote_code import custom_class
from regsurgery.frontends.towers import PIXELS, Tower, pixel_input, towers
from regsurgery.options import LoadOptions
from regsurgery.settings import quiet_transformers

UNLOADABLE = (*BROKEN, SafetensorError, StrictDataclassError)  # what transformers raises on broken configs and weights


def load(checkpoint: Checkpoint, options: LoadOptions) -> Loaded:
    """Load a transformers folder with the class that its config names."""
    folder = checkpoint.folder
    cls = class_of(folder, checkpoint.config_name, checkpoint.config, options)
    try:
        with quiet_transformers():
            model, info = from_pretrained(
                cls,
                folder,
                _own_state(checkpoint),
                trust_remote_code=options.trust_remote_code,
                device_map=options.device_map,
                ignore_mismatched_sizes=True,
            )
    except UNLOADABLE as error:
        raise library_fails("transformers", folder, error) from error
    if not checkpoint.stored:
        _into_memory(model)
    _check_complete(checkpoint, model, info)
    found = _towers(checkpoint, model, options.tower)
    sized = next((tower for tower in found if tower.image_size), found[0])
    made_of = preprocessing(folder, sized, model.dtype, options)
    entries = tuple(_entry(model, tower, made_of) for tower in found)
    return Loaded(
        **vars(checkpoint),
        architecture=type(model).__name__,
        model=model.eval(),
        image_size=entries[0].image_size,
        preprocess=made_of.at(None if entries[0].image_size == made_of.image_size else entries[0].image_size),
        preprocess_at=made_of.at,
        preprocess_note=made_of.note,
        inputs=entries[0].inputs,
        name_outputs=entries[0].name_outputs,
        disk_name=_disk_names(model),
        added_name=partial(_added_name, model),
        entry=entries[0].path,
        channels=found[0].channels,
        entries=entries,
    )


def _towers(checkpoint: Checkpoint, model: nn.Module, named: str | None) -> tuple[Tower, ...]:
    """What of `model` can be traced, in the order in which to try; what the user `named` is inside each, or around it.

    Raises:
        UnsupportedModelError: it takes no images, or takes them packed.
    """
    folder, name = checkpoint.folder, type(model).__name__
    for parameter, reason in PACKED_INPUTS.items():
        if parameter in inspect.signature(model.forward).parameters:
            raise UnsupportedModelError(
                f"{folder}: {name} is not supported: {reason} (its input '{parameter}'); {LISTED}"
            )
    found = towers(model)
    if not found and pixel_input(model) is not None:
        raise UnsupportedModelError(
            f"{folder}: {name} decodes step by step, so only its vision tower could be patched, and no module of it "
            f"takes images alone, cuts them into patches and holds transformer blocks; {LISTED}"
        )
    if not found:
        raise UnsupportedModelError(
            f"{folder}: neither {name} nor a module of it takes images as pixels ({' or '.join(PIXELS)}); give a model "
            "that does"
        )
    if named is None:
        return found
    return tuple(tower for tower in found if inside(named, tower.path) or inside(tower.path, named)) or found


def _entry(model: Any, tower: Tower, made_of: Preprocessing) -> Entry:
    layer = next((key for key in FEATURE_LAYERS if tower.path and getattr(model.config, key, None) is not None), None)
    image_size = made_of.image_size if made_of.fixed else tower.image_size or made_of.image_size
    return Entry(
        tower.path,
        image_size,
        _inputs(model, tower, tower.image_size or image_size, collects=layer is not None),
        name_outputs if layer is None else _features_named(model, layer),
    )


def class_of(folder: Path, config_name: str, config: Mapping[str, Any], options: LoadOptions) -> Any:
    """The class that the config of `folder` names.

    Raises:
        CheckpointError: it is code that comes with the checkpoint, or not a model class.
        UnsupportedModelError: the installed transformers does not know it.
    """
    import transformers

    path = folder / config_name
    architecture = _architecture(path, config)
    cls = getattr(transformers, architecture or ("" if "auto_map" in config else "AutoModel"), None)
    if cls is None and "auto_map" in config and not options.trust_remote_code:
        raise CheckpointError(
            f"{folder}: {architecture or 'its model class'} is code that comes with the checkpoint; pass "
            "--trust-remote-code if you trust its author"
        )
    if cls is None and "auto_map" in config:
        return custom_class(folder, path, config["auto_map"], architecture)
    if cls is None:
        raise UnsupportedModelError(f"{path}: the installed transformers has no {architecture}; try another version")
    automatic = architecture is None or "Auto" in architecture
    if not hasattr(cls, "from_pretrained") or not hasattr(cls, "from_config" if automatic else "forward"):
        raise CheckpointError(f"{path}: {architecture!r} is not a transformers model class; correct 'architectures'")
    if not options.trust_remote_code:
        _refuse_kernels(path, config)
    return cls


def _check_complete(checkpoint: Checkpoint, model: Any, info: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for tensors that the weights lack, or have in another shape."""
    for kind, problem in (
        ("missing_keys", "is missing"),
        ("mismatched_keys", "has a different shape than the config says"),
    ):
        if info.get(kind):
            found = info[kind][0] if isinstance(info[kind], list) else min(info[kind])
            name = found if isinstance(found, str) else found[0]
            name = _disk_names(model)(name) or name
            wrapped = next((key for key in sorted(info["unexpected_keys"]) if key.endswith(f".{name}")), None)
            remedy = "give a config and weights that belong together"
            if kind == "missing_keys" and wrapped is not None:
                remedy = f"it has {wrapped!r}: give that file itself as MODEL, where prefixes are found and left out"
            raise CheckpointError(
                f"{checkpoint.weights[0]}: tensor '{name}' {problem} ({len(info[kind])} in all); {remedy}"
            )


def _into_memory(model: nn.Module) -> None:
    """Copy tensors on the CPU, which are the mapped file itself: who writes to it would write into the model, and who
    makes it shorter would kill the process (SIGBUS).
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def from_pretrained(
    cls: Any, folder: Path, state: Mapping[str, Tensor] | None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The model, and which keys were missing, mismatched or left over; `state` takes the place of the folder's weights.

    A model whose weights lack the optional pooler, as DINO's do, is made without it.
    """
    model, info = _from_pretrained(cls, folder, state, **options)
    missing = info.get("missing_keys") or ()
    optional = any("add_pooling_layer" in inspect.signature(each.__init__).parameters for each in type(model).__mro__)
    if missing and optional and all("pooler" in name.split(".") for name in missing):
        return _from_pretrained(cls, folder, state, **options, add_pooling_layer=False)
    return model, info


def _from_pretrained(
    cls: Any, folder: Path, state: Mapping[str, Tensor] | None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    options = {**options, "dtype": "auto", "output_loading_info": True}
    if state is None:
        return cls.from_pretrained(folder, **options)
    from transformers import AutoConfig

    trusted = options.get("trust_remote_code", False)
    config = (cls.config_class or AutoConfig).from_pretrained(folder, trust_remote_code=trusted)
    return cls.from_pretrained(None, config=config, state_dict=dict(state), **{**options, "device_map": None})


def _own_state(checkpoint: Checkpoint) -> dict[str, Tensor] | None:
    """The weights, where transformers is not to read the folder's: if they stay on disk, or their index lacks
    `metadata`, which only some versions of transformers do without.
    """
    if checkpoint.stored:
        return stored_state(checkpoint.weights)
    index = index_of(checkpoint.weights)
    if index is None or "metadata" in read_json(index):
        return None
    return {name: tensor for path in checkpoint.weights for name, tensor in load_file(path).items()}


def at_size(loaded: Loaded, size: tuple[int, int]) -> Loaded:
    """`loaded` for images of another size; transformers models interpolate their position embedding by themselves."""
    return loaded.resized(loaded.model, size)


def _architecture(config_path: Path, config: Mapping[str, Any]) -> str | None:
    architectures = config.get("architectures") or [None]
    if not isinstance(architectures, list) or not isinstance(architectures[0], str | None):
        raise CheckpointError(
            f"{config_path}: 'architectures' must be a list of class names, found {architectures!r:.200}"
        )
    if architectures[0] is not None and not architectures[0].isidentifier():
        raise CheckpointError(f"{config_path}: {architectures[0]!r:.200} under 'architectures' is not a class name")
    return architectures[0]


def _refuse_kernels(config_path: Path, config: Mapping[str, Any]) -> None:
    """An attention implementation named `owner/repository` is code that transformers would fetch and run."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
            if "/" in str(part.get(key)):
                raise CheckpointError(
                    f"{config_path}: {key!r} names code from another repository; remove it, or pass "
                    "--trust-remote-code if you trust its author"
                )


def _inputs(model: Any, tower: Tower, own_size: tuple[int, int], *, collects: bool) -> Any:
    """Images -> the arguments of a tower's forward; `collects`: ask for all hidden states."""
    parameters = tower.parameters
    interpolates = "interpolate_pos_encoding" in parameters
    noise = NOISE_INPUTS.get(model.config.model_type)
    text = getattr(model.config, TEXT_CONFIG_KEY, model.config) if "input_ids" in parameters else None
    vocabulary = getattr(text, "vocab_size", 2)

    def inputs(images: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        videos = images[:, None].expand(-1, tower.frames, -1, -1, -1) if tower.frames else images
        kwargs: dict[str, Any] = {tower.pixels: videos}
        if interpolates and tuple(images.shape[-2:]) != own_size:
            kwargs["interpolate_pos_encoding"] = True
        if text is not None:
            ids = torch.arange(1, 9, device=images.device).clamp(max=vocabulary - 1)
            if isinstance(getattr(text, "eos_token_id", None), int):
                ids[-1] = min(text.eos_token_id, vocabulary - 1)  # where CLIP pools
            kwargs["input_ids"] = ids.expand(images.shape[0], -1)
        if noise is not None:
            num_patches = math.prod(side // model.config.patch_size for side in images.shape[-2:])
            kwargs[noise] = torch.linspace(0, 1, num_patches, device=images.device).expand(images.shape[0], -1)
        if collects:
            kwargs["output_hidden_states"] = True
        return (), kwargs

    return inputs


def _features_named(model: Any, feature_layer: str) -> Callable[[Any], dict[str, Tensor]]:
    """`name_outputs`, except that the hidden state that a language model reads (the last of several) is
    `image_features`.
    """
    layers = getattr(model.config, feature_layer)
    layer = layers if isinstance(layers, int) else layers[-1]

    def named(output: Any) -> dict[str, Tensor]:
        found = name_outputs(output)
        read = f"hidden_states.{layer % len(output.hidden_states)}"
        return {"image_features" if name == read else name: value for name, value in found.items()}

    return named


def name_outputs(output: Any) -> dict[str, Tensor]:
    """The tensors of a transformers ModelOutput by field name (a lone one: `output`), nested ones joined with a dot."""
    return {".".join(path) or "output": tensor for path, tensor in _tensors_in(output, ())}


def _tensors_in(output: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Every tensor with its path. Not by pytree: transformers 5.0 registers its outputs without keys."""
    if isinstance(output, Tensor):
        yield path, output
    elif isinstance(output, (Mapping, list, tuple)):
        for key, value in output.items() if isinstance(output, Mapping) else enumerate(output):
            yield from _tensors_in(value, (*path, str(key)))


def _added_name(model: Any, in_memory: str, on_disk: str) -> str:
    """`on_disk` if transformers turns that into `in_memory` when it loads `model`, else the latter, which it finds too.

    Its patterns for published names may not cover what is new.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = copy.deepcopy(getattr(model, "_weight_conversions", None) or [])
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    names = {**dict.fromkeys(model.state_dict(), True), in_memory: True}
    found, _ = rename_source_key(on_disk, renamings, converters, model.base_model_prefix, names)
    return on_disk if found == in_memory else in_memory


def _disk_names(model: Any) -> Callable[[str], str | None]:
    """Transformers 5 renames keys on load; names on disk are the ones that its own saving would use."""
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    if is_stored(model):
        return {name: tensor.entry.name for name, tensor in state.items() if isinstance(tensor, StoredTensor)}.get
    on_disk = {tensor.data_ptr(): name for name, tensor in revert_weight_conversion(model, dict(state)).items()}
    names = {name: on_disk.get(tensor.data_ptr()) for name, tensor in state.items()}
    return names.get
