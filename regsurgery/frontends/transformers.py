"""How transformers checkpoints are read."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from regsurgery.checkpoints.limits import BROKEN, read_json
from regsurgery.checkpoints.stored import StoredTensor, is_stored, stored_state
from regsurgery.errors import CheckpointError, UnsupportedModelError
from regsurgery.families import ENTRIES, NOISE_INPUTS, PACKED_INPUTS, TEXT_CONFIG_KEY
from regsurgery.frontends.bounds import check_numbers
from regsurgery.frontends.loaded import Checkpoint, Loaded
from regsurgery.options import LoadOptions
from regsurgery.settings import quiet_transformers

UNLOADABLE = (*BROKEN, SafetensorError, StrictDataclassError)  # what transformers raises on broken configs and weights


def load(checkpoint: Checkpoint, options: LoadOptions) -> Loaded:
    """Load a transformers folder with the class that its config names."""
    folder, config = checkpoint.folder, checkpoint.config
    architecture, cls = class_of(folder, checkpoint.config_name, config, options)
    try:
        with quiet_transformers():
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
    _check_complete(checkpoint, model, info)
    entry, feature_layer = ENTRIES.get(architecture, ("", None))
    parameters = inspect.signature(model.get_submodule(entry).forward).parameters
    _check_inputs(folder, architecture, parameters)
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


def class_of(folder: Path, config_name: str, config: Mapping[str, Any], options: LoadOptions) -> tuple[str, Any]:
    """The architecture that the config of `folder` names, and its class.

    Raises:
        CheckpointError: it is code that comes with the checkpoint, or not a model class.
        UnsupportedModelError: the installed transformers does not know it.
    """
    import transformers

    path = folder / config_name
    architecture = _architecture(path, config)
    cls = getattr(transformers, architecture, None)
    if cls is None and "auto_map" in config and not options.trust_remote_code:
        raise CheckpointError(
            f"{folder}: {architecture} is code that comes with the checkpoint; pass "
            "--trust-remote-code if you trust its author"
        )
    if cls is None and "auto_map" in config:
        cls = transformers.AutoModel
    if cls is None:
        raise UnsupportedModelError(f"{path}: the installed transformers has no {architecture}; try another version")
    if not hasattr(cls, "from_pretrained") or not hasattr(cls, "from_config" if "Auto" in architecture else "forward"):
        raise CheckpointError(f"{path}: {architecture!r} is not a transformers model class; correct 'architectures'")
    if not options.trust_remote_code:
        _refuse_kernels(path, config)
    return architecture, cls


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
            raise CheckpointError(
                f"{checkpoint.weights[0]}: tensor '{name}' {problem} ({len(info[kind])} in all); "
                "give a config and weights that belong together"
            )


def _check_inputs(folder: Path, architecture: str, parameters: Mapping[str, Any]) -> None:
    """Raise `UnsupportedModelError` for a model that does not take images, or takes them packed."""
    if "pixel_values" not in parameters:
        raise UnsupportedModelError(
            f"{folder}: {architecture} takes no pixel_values, so it is not a vision model; give one that takes images"
        )
    for name, reason in PACKED_INPUTS.items():
        if name in parameters:
            raise UnsupportedModelError(f"{folder}: {architecture} is not supported: {reason} (its input '{name}')")


def from_pretrained(
    cls: Any, folder: Path, stored: Sequence[Path] | None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The model, and which keys were missing, mismatched or left over; `stored`: weight files that stay on disk."""
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


def _own_size(config: Mapping[str, Any], model: nn.Module) -> tuple[int, int]:
    """(height, width) of the position embedding."""
    vision = getattr(model.config, "vision_config", model.config)
    size = getattr(vision, "image_size", None)
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
        return size[0], size[1]
    if type(size) is int and size > 0:
        return size, size
    raise UnsupportedModelError(f"{config.get('model_type')}: its config has no image_size; add it")


def _preprocessing(
    folder: Path, own_size: tuple[int, int], dtype: torch.dtype, options: LoadOptions
) -> tuple[Callable[[tuple[int, int] | None], Callable[[list[Any]], Tensor]], str, tuple[int, int]]:
    """A function from an image size (None: the model's own) to the model's preprocessing at that size; a line that
    names the preprocessing; and its own size (height, width).
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
    """Arguments with which `processor` makes images of `size`: its resize size scales with its crop size."""
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
    """Images -> the arguments of a forward with these parameters; `collects`: ask for all hidden states."""
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
    """The tensors of a transformers ModelOutput by field name; nested ones are joined with a dot."""
    leaves, _ = pytree.tree_flatten_with_path(output)
    return {
        ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path): leaf
        for path, leaf in leaves
        if isinstance(leaf, Tensor)
    }


def _disk_names(model: Any) -> Callable[[str], str | None]:
    """Transformers 5 renames keys on load; names on disk are the ones that its own saving would use."""
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    if is_stored(model):
        return {name: tensor.entry.name for name, tensor in state.items() if isinstance(tensor, StoredTensor)}.get
    on_disk = {tensor.data_ptr(): name for name, tensor in revert_weight_conversion(model, dict(state)).items()}
    names = {name: on_disk.get(tensor.data_ptr()) for name, tensor in state.items()}
    return names.get
