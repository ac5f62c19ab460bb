"""A weights file as a transformers checkpoint: its names stay, since `from_pretrained` converts them at every load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from regsurgery.checkpoints.writing import write_tensors
from regsurgery.errors import CheckpointError, in_short
from regsurgery.formats import WEIGHTS_NAMES
from regsurgery.frontends.config import read_config
from regsurgery.frontends.conversion.arch import Arch
from regsurgery.frontends.conversion.layout import copy_all_but_weights
from regsurgery.frontends.transformers import UNLOADABLE, class_of, from_pretrained
from regsurgery.options import LoadOptions
from regsurgery.settings import quiet_transformers

if TYPE_CHECKING:
    from torch import Tensor


class TransformersTarget:
    """The model that the config in a folder describes."""

    def __init__(self, arch: Arch, options: LoadOptions) -> None:
        assert arch.folder is not None
        self._folder, self._options = arch.folder, options
        _, name, config = read_config(self._folder, "transformers")
        self._class = class_of(self._folder, name, config, options)
        self._taken: Mapping[str, Tensor] = {}

    def size(self) -> int:
        import torch
        from transformers import AutoConfig

        try:
            with quiet_transformers(), torch.device("meta"):
                config_class = getattr(self._class, "config_class", None) or AutoConfig
                config = config_class.from_pretrained(self._folder, trust_remote_code=self._options.trust_remote_code)
                return len(getattr(self._class, "from_config", self._class)(config).state_dict())
        except UNLOADABLE as error:
            reason = in_short(error)
            raise CheckpointError(
                f"{self._folder}: transformers cannot make the model that its config describes: {reason}; correct it"
            ) from error

    def take(self, tensors: Mapping[str, Tensor]) -> str | None:
        try:
            with quiet_transformers():
                how = {"trust_remote_code": self._options.trust_remote_code, "ignore_mismatched_sizes": True}
                _, info = from_pretrained(self._class, self._folder, tensors, **how)  # nosec B615 # a folder
        except UNLOADABLE as error:
            return in_short(error)
        for kind, problem in (("missing_keys", "is missing"), ("mismatched_keys", "has another shape")):
            for found in sorted(info.get(kind) or (), key=str):
                return f"tensor {found if isinstance(found, str) else found[0]!r} {problem} ({len(info[kind])} in all)"
        left_over = set(map(str, info.get("unexpected_keys") or ()))
        self._taken = {name: value for name, value in tensors.items() if name not in left_over}
        return None

    def write(self, folder: Path) -> None:
        copy_all_but_weights(self._folder, folder)
        write_tensors(folder / WEIGHTS_NAMES["transformers"], self._taken)
