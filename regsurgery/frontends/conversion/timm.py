"""A weights file as a timm checkpoint: read by `checkpoint_filter_fn`, written by `save_for_hf`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.errors import ModelNotFoundError, did_you_mean
from regsurgery.formats import WEIGHTS_NAMES
from regsurgery.frontends.conversion import tensors as plain
from regsurgery.frontends.conversion.arch import Arch
from regsurgery.frontends.conversion.layout import copy_side_files
from regsurgery.frontends.timm import UNLOADABLE

if TYPE_CHECKING:
    from torch import Tensor

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
        self._model: Any = None

    def size(self) -> int:
        return len(self._built(None).state_dict())

    def take(self, tensors: Mapping[str, Tensor]) -> str | None:
        try:
            model = self._built(self._num_classes(tensors)).to(plain.common_dtype(tensors))
            convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
            state = dict(tensors)
            model.load_state_dict(state if convert is None else convert(state, model), strict=True)
        except UNLOADABLE as error:
            return " ".join(str(error).split())
        return None

    def write(self, folder: Path) -> None:
        import timm
        from timm.data.config import resolve_data_config

        if self._folder is not None:
            copy_side_files(self._folder, folder)
            plain.write(self._model.state_dict(), folder / WEIGHTS_NAMES["timm"])
            return
        if self._arguments:
            data = resolve_data_config(dict(self._arguments), model=self._model)
            self._model.pretrained_cfg.update(data)
        timm.models.save_for_hf(self._model, str(folder), model_args=self._options, safe_serialization=True)

    def _num_classes(self, tensors: Mapping[str, Tensor]) -> int | None:
        """That of the file's classifier; None: the architecture's own, if its config says it."""
        classifier = self._built(None).pretrained_cfg.get("classifier")
        if not isinstance(classifier, str) or self._folder is not None:
            return None
        weight = tensors.get(f"{classifier}.weight")
        return 0 if weight is None else weight.shape[0]

    def _built(self, num_classes: int | None) -> Any:
        """The model with that many classes, made again only for another number."""
        import timm

        if self._model is None or (num_classes is not None and self._model.num_classes != num_classes):
            options = self._options if num_classes is None else {**self._options, "num_classes": num_classes}
            self._model = timm.create_model(self._name, pretrained=False, **options)
        return self._model


def _check_known(name: str) -> None:
    """Raise `ModelNotFoundError` if timm has no architecture `name`."""
    import timm

    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise ModelNotFoundError(f"--arch timm:{name}: timm has no such model{did_you_mean(base, timm.list_models())}")
    if tag and timm.models.get_pretrained_cfg(name, allow_unregistered=False) is None:
        tags = timm.list_pretrained(f"{base}.*")
        raise ModelNotFoundError(f"--arch timm:{name}: timm knows no such tag{did_you_mean(name, tags)}")
