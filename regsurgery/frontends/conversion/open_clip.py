"""A weights file as an open_clip checkpoint: read by `load_checkpoint`, OpenAI's archives by their own builder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.checkpoints.limits import read_json
from regsurgery.checkpoints.whole import temporary_folder
from regsurgery.checkpoints.writing import write_json, write_tensors
from regsurgery.errors import ModelNotFoundError, did_you_mean, in_short
from regsurgery.formats import WEIGHTS_NAMES
from regsurgery.frontends.conversion.arch import Arch
from regsurgery.frontends.conversion.layout import copy_all_but_weights
from regsurgery.frontends.open_clip import UNLOADABLE
from regsurgery.runtime.open_clip import stock_model

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_NAME = "open_clip_config.json"
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


class OpenClipTarget:
    """A CLIP of the architecture `arch`."""

    def __init__(self, arch: Arch) -> None:
        self._folder, self._config = arch.folder, _config_of(arch)
        self._model: Any = None
        self._dtypes: dict[str, Any] = {}

    def size(self) -> int:
        return len(self._built().state_dict())

    def take(self, tensors: Mapping[str, Tensor]) -> str | None:
        import open_clip

        with temporary_folder() as scratch:
            file = scratch / "given.safetensors"
            write_tensors(file, tensors)
            try:
                open_clip.load_checkpoint(self._built(), str(file), strict=True)  # type: ignore[arg-type]
            except UNLOADABLE as error:
                return in_short(error)
        self._dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        return None

    def write(self, folder: Path) -> None:
        if self._folder is None:
            write_json(folder / CONFIG_NAME, self._config)
        else:
            copy_all_but_weights(self._folder, folder)
        state = self._built().state_dict()  # in float32; a file's own dtype holds the same numbers
        own = {name: value.to(self._dtypes.get(name, value.dtype)) for name, value in state.items()}
        write_tensors(folder / WEIGHTS_NAMES["open_clip"], own)

    def _built(self) -> Any:
        if self._model is None:
            with temporary_folder() as scratch:
                write_json(scratch / CONFIG_NAME, self._config)
                self._model = stock_model(scratch)
        return self._model


class OpenAITarget:
    """A CLIP of OpenAI, whose tensors tell its architecture."""

    def __init__(self) -> None:
        self._model: Any = None

    def size(self) -> int:
        return 0

    def take(self, tensors: Mapping[str, Tensor]) -> str | None:
        from open_clip.model import build_model_from_openai_state_dict

        if "visual.proj" not in tensors:
            return "it is not a CLIP of OpenAI with a Vision Transformer (it has no tensor 'visual.proj')"
        try:
            self._model = build_model_from_openai_state_dict(dict(tensors))
        except UNLOADABLE as error:
            return in_short(error)
        return None

    def write(self, folder: Path) -> None:
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        model, visual = self._model, self._model.visual
        size = visual.image_size
        config = {
            "embed_dim": model.text_projection.shape[1],
            "quick_gelu": True,
            "vision_cfg": {
                "image_size": size[0] if isinstance(size, (tuple, list)) else size,
                "layers": len(visual.transformer.resblocks),
                "width": visual.conv1.out_channels,
                "patch_size": visual.conv1.kernel_size[0],
            },
            "text_cfg": {
                "context_length": model.context_length,
                "vocab_size": model.vocab_size,
                "width": model.ln_final.weight.shape[0],
                "heads": model.ln_final.weight.shape[0] // 64,
                "layers": len(model.transformer.resblocks),
            },
        }
        preprocessing = {"mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD)}
        write_json(folder / CONFIG_NAME, {"model_cfg": config, "preprocess_cfg": preprocessing})
        write_tensors(folder / WEIGHTS_NAMES["open_clip"], model.state_dict())


def _config_of(arch: Arch) -> dict[str, Any]:
    """The config that open_clip would save: of a folder, of a built-in architecture, or of one with a tag.

    Raises:
        ModelNotFoundError: open_clip has no such architecture or tag.
    """
    import open_clip
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    if arch.folder is not None:
        return read_json(arch.folder / CONFIG_NAME)
    name, _, tag = arch.name.partition("/")
    model = open_clip.get_model_config(name)
    if model is None:
        hint = did_you_mean(name, open_clip.list_models()) or "; open_clip.list_models() in Python lists them"
        raise ModelNotFoundError(f"--arch open_clip:{arch.name}: open_clip has no such model{hint}")
    preprocessing: dict[str, Any] = {"mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD)}
    if tag:
        published = open_clip.get_pretrained_cfg(name, tag)
        if not published:
            tags = open_clip.list_pretrained_tags_by_model(name)
            hint = did_you_mean(tag, tags) or f"; give open_clip:{name} alone"
            raise ModelNotFoundError(f"--arch open_clip:{arch.name}: open_clip has no such tag{hint}")
        preprocessing |= {key: published[key] for key in PREPROCESSING if published.get(key) is not None}
        if published.get("quick_gelu"):
            model["quick_gelu"] = True
    return {"model_cfg": model, "preprocess_cfg": preprocessing}
