"""A PEFT adapter (LoRA and the like) -> the checkpoint that it was trained on, with the adapter merged into it."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regsurgery.checkpoints.containers import read_weights_file, refuse_pickle
from regsurgery.checkpoints.limits import BROKEN, read_json, refuse_links_out
from regsurgery.checkpoints.whole import scratch_folder
from regsurgery.checkpoints.writing import write_json, write_tensors
from regsurgery.errors import CheckpointError, UserError, in_short
from regsurgery.formats import WEIGHTS_NAMES
from regsurgery.frontends.conversion.files import Scratch, digest
from regsurgery.frontends.conversion.layout import copy_all_but_weights
from regsurgery.frontends.loaded import Converted, Loaded
from regsurgery.frontends.transformers import from_pretrained
from regsurgery.options import LoadOptions
from regsurgery.settings import quiet_transformers

CONFIG_NAME, WEIGHTS_NAME, PICKLED_NAME = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MERGE = "merge it with peft (PeftModel.from_pretrained(model, ADAPTER).merge_and_unload()) and save the result"
BASE_KEY = "base_model_name_or_path"
INSIDE = "base_model.model."  # what peft puts in front of the base model's names

Load = Callable[[str, LoadOptions], Loaded]
Tensors = Mapping[str, Any]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    return (folder / CONFIG_NAME).is_file() and not (folder / "config.json").is_file()


def merge_adapter(folder: Path, options: LoadOptions, load: Load) -> Scratch:
    """The adapter's base model, which its config names, with the adapter merged into it by peft.

    Raises:
        CheckpointError: the adapter or its base model cannot be read, or they do not belong together.
        UserError: peft is not installed.
    """
    refuse_links_out(folder)
    settings = read_json(folder / CONFIG_NAME)
    base = _base(folder, settings)
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{folder}: is an adapter of {base}; install peft (pip install peft), or {MERGE}")
    weights = _weights(folder, options)
    revision = settings.get("revision")
    own = LoadOptions(
        allow_pickle=options.allow_pickle,
        trust_remote_code=options.trust_remote_code,
        commit=revision if isinstance(revision, str) else None,
    )
    loaded = load(base, own)
    if loaded.library == "open_clip":
        raise CheckpointError(
            f"{folder}: is an adapter of {base}, an open_clip checkpoint, into which none can be merged here; {MERGE}, "
            "as a state dict that --arch open_clip:ARCH reads"
        )
    tensors = read_weights_file(weights, options.allow_pickle).weights(None, loaded.library).tensors
    with scratch_folder() as home:
        merged = home.path / "converted"
        merged.mkdir()
        copy_all_but_weights(loaded.folder, merged)
        if loaded.library == "timm":
            model = _merged(_timm_model(loaded, tensors), folder, tensors)
            write_json(merged / loaded.config_name, _with_classes(loaded.config, model.num_classes))
            write_tensors(merged / WEIGHTS_NAMES["timm"], model.state_dict())
        else:
            _merged(_transformers_model(folder, loaded, settings, tensors, own), folder, tensors).save_pretrained(
                merged
            )
        copy_all_but_weights(folder, merged)
        (merged / CONFIG_NAME).unlink()
    name = Path(base).name if Path(base).is_absolute() else base
    note = f"an adapter, merged into {name} (weights sha256 {loaded.source.sha256})"
    options.progress.say(f"{folder.name}: {note}")
    return Scratch(merged, loaded.library, Converted(weights, digest((weights,)), (note,)), home)


def _base(folder: Path, settings: Mapping[str, Any]) -> str:
    """The base model as MODEL; peft does not record that of a timm model, and users write it there."""
    base, trained = settings.get(BASE_KEY), _trained_on(settings)
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: does not name the model that the adapter is for; put it there as {BASE_KEY!r}: a "
            "folder, a Hub id or timm:NAME"
        )
    of_timm = trained.get("parent_library", "").startswith("timm.") and not os.path.isdir(base)
    return f"timm:{base}" if of_timm and "/" not in base and ":" not in base else base


def _trained_on(settings: Mapping[str, Any]) -> dict[str, str]:
    """What peft recorded of the base model's class: `base_model_class`, `parent_library`."""
    found = settings.get("auto_mapping")
    return {key: value for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


def _weights(folder: Path, options: LoadOptions) -> Path:
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        weights = folder / PICKLED_NAME
        if not weights.is_file():
            raise CheckpointError(f"{weights.with_name(WEIGHTS_NAME)}: missing, so the adapter has no weights; add it")
        if not options.allow_pickle:
            refuse_pickle(weights)
    return weights


def _timm_model(loaded: Loaded, tensors: Tensors) -> Any:
    """The base model, with as many classes as the adapter's own classifier."""
    model: Any = loaded.model
    num_classes = _num_classes(tensors, str(model.pretrained_cfg.get("classifier")))
    if num_classes not in (None, model.num_classes):
        model.reset_classifier(num_classes)
    return model


def _num_classes(tensors: Tensors, classifier: str) -> int | None:
    """That of the adapter's own classifier, if it has one."""
    weight = tensors.get(f"{INSIDE}{classifier}.weight")
    return None if weight is None or weight.ndim != 2 else weight.shape[0]


def _with_classes(config: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """The `config` of timm for a classifier of `num_classes`, which it says in several places."""
    if config.get("num_classes") == num_classes:
        return dict(config)
    parts = {name: part for name, part in config.items() if isinstance(part, dict) and "num_classes" in part}
    others = {name: value for name, value in config.items() if not name.startswith("label_")}  # of the base's classes
    return {
        **others,
        "num_classes": num_classes,
        **{name: {**part, "num_classes": num_classes} for name, part in parts.items()},
    }


def _transformers_model(
    folder: Path, loaded: Loaded, settings: Mapping[str, Any], tensors: Tensors, options: LoadOptions
) -> Any:
    """The base model in the class that the adapter was trained in, with as many classes as its own classifier.

    Raises:
        CheckpointError: neither the base model nor the adapter has a tensor of that class.
    """
    import transformers

    name = _trained_on(settings).get("base_model_class", "")
    cls = getattr(transformers, name, None) if name != type(loaded.model).__name__ else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        cls = type(loaded.model)
    num_classes = _num_classes(tensors, "classifier")
    if cls is type(loaded.model) and num_classes in (None, loaded.model.config.num_labels):  # type: ignore[union-attr]
        return loaded.model
    how = {} if num_classes is None else {"num_labels": num_classes}
    with quiet_transformers():
        model, info = from_pretrained(  # nosec B615 # a folder
            cls, loaded.folder, None, ignore_mismatched_sizes=True, trust_remote_code=options.trust_remote_code, **how
        )
    lacking = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    lacking -= {key.removeprefix(INSIDE) for key in tensors}
    if lacking:
        raise CheckpointError(
            f"{folder}: was trained on {cls.__name__}, whose {min(lacking)!r} neither it nor its base model has "
            f"({len(lacking)} such tensors); {MERGE}"
        )
    return model


def _merged(model: Any, folder: Path, tensors: Tensors) -> Any:
    """`model` with the adapter merged into it.

    Raises:
        CheckpointError: peft refuses, or finds no place in the model for one of the adapter's `tensors`.
    """
    import peft  # pyright: ignore[reportMissingImports]  # not everybody needs it

    with _refused_by_peft(folder):
        # On `meta` until the weights are there: a config may name a rank of two million.
        adapted = peft.PeftModel.from_pretrained(model, str(folder), low_cpu_mem_usage=True)
        taken = peft.get_peft_model_state_dict(adapted)
    lost = sorted(tensors.keys() - taken.keys())
    if lost:  # peft itself only warns
        raise CheckpointError(
            f"{folder}: is not an adapter of the model that it names: that has no place for {lost[0]!r} ({len(lost)} "
            f"tensors in all); correct {BASE_KEY!r} in {CONFIG_NAME}"
        )
    with _refused_by_peft(folder):
        return adapted.merge_and_unload()  # type: ignore[operator]


@contextmanager
def _refused_by_peft(folder: Path) -> Iterator[None]:
    try:
        yield
    except (*BROKEN, re.error) as error:  # it takes names of modules for patterns
        raise CheckpointError(f"{folder}: peft cannot merge it: {in_short(error)}; {MERGE}") from error
