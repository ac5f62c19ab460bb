"""The open_clip part of `modeling_regsurgery.py`. Copied into patched folders after `surgery.py`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from regsurgery.runtime.surgery import _graft, _Grafted, operate, register_start


class _StripsIntermediates(_Grafted):
    """`forward_intermediates` of open_clip's own tower, or of a timm tower (`trunk`), without the registers."""

    _start: int | None

    def forward_intermediates(self, x: Tensor, *args: Any, output_fmt: str = "NCHW", **kwargs: Any) -> Any:
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError("output_fmt must be NCHW or NLC")
        result = super().forward_intermediates(x, *args, output_fmt="NLC", **kwargs)  # type: ignore[misc]
        height, width = self._grid(x)
        first = [0 if self._start is None else y.shape[1] - height * width for y in result["image_intermediates"]]
        patches = [y.narrow(1, at, height * width) for at, y in zip(first, result["image_intermediates"], strict=True)]
        if output_fmt == "NCHW":
            patches = [y.reshape(y.shape[0], height, width, -1).permute(0, 3, 1, 2).contiguous() for y in patches]
        result["image_intermediates"] = patches
        return result

    def _grid(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in images `[B, 3, H, W]`."""
        trunk = getattr(self, "trunk", None)
        if trunk is not None:
            return trunk.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        rows, columns = self.patch_size  # type: ignore[attr-defined]
        return x.shape[-2] // rows, x.shape[-1] // columns


def stock_model(folder: str | Path, **kwargs: Any) -> nn.Module:
    """The unpatched CLIP that the folder's config describes, weights not loaded.

    open_clip would load the first safetensors file it finds, whatever it holds, so the caller loads the weights; the
    warning that none were loaded is suppressed.
    """
    import open_clip

    def other(record: logging.LogRecord) -> bool:
        return "No pretrained weights loaded" not in record.getMessage()

    logging.getLogger().addFilter(other)
    try:
        return open_clip.create_model(f"local-dir:{folder}", load_weights=False, **kwargs)
    finally:
        logging.getLogger().removeFilter(other)


def load(folder: str | Path = Path(__file__).parent, *, state: Any = None, **kwargs: Any) -> nn.Module:
    """The patched CLIP of this folder, in eval mode; `kwargs` go to `open_clip.create_model` (`precision`, ...).

    A `state` dict is loaded instead of the folder's weights, and its tensors become the model's.
    """
    import open_clip
    from open_clip.model import resize_pos_embed

    folder = Path(folder)
    surgery = json.loads((folder / "open_clip_config.json").read_text("utf-8"))["regsurgery"]
    model: Any = stock_model(folder, **kwargs)
    operate(model, surgery)
    if state is None:
        open_clip.load_checkpoint(model, str(folder / "open_clip_model.safetensors"), strict=True)
    else:
        resize_pos_embed(state, model)  # as `load_checkpoint` does
        model.load_state_dict(state, strict=True, assign=True)
    if surgery["num_registers"]:
        _graft(model.visual, _StripsIntermediates, _start=register_start(surgery))
    return model.eval()


def image_transform(model: Any, size: tuple[int, int] | None = None) -> Any:
    """The evaluation transform that the folder's config describes: PIL image -> `[3, height, width]`; the image size is
    the config's unless another one is given.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2

    settings = model.visual.preprocess_cfg
    if size is not None:
        settings = {**settings, "size": size}
    return image_transform_v2(PreprocessCfg(**settings), is_train=False)
