"""A weights file as a timm checkpoint: read by `checkpoint_filter_fn`, written by `save_for_hf`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from regsurgery.checkpoints.stored import without_memory
from regsurgery.checkpoints.writing import write_tensors
from regsurgery.errors import ModelNotFoundError, did_you_mean, in_short, library_fails
from regsurgery.formats import WEIGHTS_NAMES
from regsurgery.frontends.conversion.arch import Arch
from regsurgery.frontends.conversion.layout import copy_all_but_weights
from regsurgery.frontends.conversion.tensors import common_dtype
from regsurgery.frontends.timm import UNLOADABLE
from regsurgery.settings import replaced

if TYPE_CHECKING:
    from torch import Tensor

# Wrappers, DeiT-III's first names of layer scales, and facebook's name of DINOv2's registers, which patching adds.
SUSPECT = re.compile(r"^(module|_orig_mod)\.|(^|\.)gamma_\d+$|^register_tokens$")
# Arguments of timm's training script -> of `create_model`.
ARGUMENTS = {"gp": "global_pool", "in_chans": "in_chans"}


class TimmTarget:
    """A timm model of the architecture `arch`, made as the training script with these `arguments` made it."""

    def __init__(self, arch: Arch, arguments: Mapping[str, Any]) -> None:
        self._name = arch.name if arch.folder is None else f"local-dir:{arch.folder}"
        self._folder = arch.folder
        if arch.folder is None:
            _check_known(arch.name)
        self._arguments = arguments
        given = {ours: arguments.get(theirs) for theirs, ours in ARGUMENTS.items()}
        more = arguments.get("model_kwargs")
        self._options = {name: value for name, value in given.items() if value is not None}
        self._options |= more if isinstance(more, dict) else {}
        self._untrained: Any = None
        self._model: Any = None

    def size(self) -> int:
        return len(self._built().state_dict())

    def take(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Load as timm loads published weights, for only then its own renaming takes place; all must fit."""
        import timm

        load = nn.Module.load_state_dict
        own = self._built().pretrained_cfg
        num_classes = self._num_classes(tensors)
        published = {"state_dict": dict(tensors), "source": "", "custom_load": False, "first_conv": None}
        try:
            with replaced(nn.Module, "load_state_dict", lambda self, state, *_, **__: load(self, state, strict=True)):
                model: Any = timm.create_model(
                    self._name,
                    pretrained=True,
                    pretrained_cfg_overlay={**published, "num_classes": num_classes},
                    **{**self._options, "num_classes": num_classes},
                )
        except UNLOADABLE as error:
            return in_short(error)
        model.pretrained_cfg = {**own, "num_classes": num_classes}
        self._model = model.to(common_dtype(tensors))
        return None

    def write(self, folder: Path) -> None:
        import timm
        from timm.data.config import resolve_data_config

        if self._folder is not None:
            copy_all_but_weights(self._folder, folder)
            write_tensors(folder / WEIGHTS_NAMES["timm"], self._model.state_dict())
            return
        if self._arguments:
            data = resolve_data_config(dict(self._arguments), model=self._model)
            self._model.pretrained_cfg.update(data)
        timm.models.save_for_hf(self._model, str(folder), model_args=self._options, safe_serialization=True)

    def _num_classes(self, tensors: Mapping[str, Tensor]) -> int:
        """That of the file's classifier, 0 if it has none; the architecture's own, if its config says it."""
        model = self._built()
        classifier = model.pretrained_cfg.get("classifier")
        if not isinstance(classifier, str) or self._folder is not None:
            return model.num_classes
        weight = tensors.get(f"{classifier}.weight")
        return 0 if weight is None else weight.shape[0]

    def _built(self) -> Any:
        """The untrained model."""
        import timm

        if self._untrained is None:
            self._untrained = timm.create_model(self._name, pretrained=False, **self._options)
        return self._untrained


def is_renamed(folder: Path, names: Iterable[str]) -> bool:
    """Whether timm renames tensors of a folder when it loads them.

    Raises:
        CheckpointError: timm cannot make the model.
    """
    import timm

    suspect = {name for name in names if SUSPECT.search(name)}
    if not suspect:
        return False
    try:
        with without_memory():
            model = timm.create_model(f"local-dir:{folder}", pretrained=False)
    except UNLOADABLE as error:
        raise library_fails("timm", folder, error) from error
    return not suspect <= model.state_dict().keys()


def _check_known(name: str) -> None:
    """Raise `ModelNotFoundError` if timm has no architecture `name`."""
    import timm

    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        hint = did_you_mean(base, timm.list_models()) or "; timm.list_models() in Python lists them"
        raise ModelNotFoundError(f"--arch timm:{name}: timm has no such model{hint}")
    if tag and timm.models.get_pretrained_cfg(name, allow_unregistered=False) is None:
        tags = timm.list_pretrained(f"{base}.*")
        hint = did_you_mean(name, tags) or f"; give timm:{base} alone"
        raise ModelNotFoundError(f"--arch timm:{name}: timm knows no such tag{hint}")
