"""The timm part of `modeling_regsurgery.py`. Copied into patched folders after `surgery.py`."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from regsurgery.runtime.surgery import ADDED, _graft, _Grafted, operate, register_start


class _StripsIntermediates(_Grafted):
    """`forward_intermediates` (and with it `get_intermediate_layers`) without the registers."""

    _start: int | None

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        stock = super().forward_intermediates  # type: ignore[misc]
        given = inspect.signature(stock).bind(*args, **kwargs)
        output_fmt, x = given.arguments.get("output_fmt", "NCHW"), given.arguments["x"]
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError("output_fmt must be NCHW or NLC")
        given.arguments["output_fmt"] = "NLC"
        result = stock(*given.args, **given.kwargs)
        height, width = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))  # type: ignore[attr-defined]

        def patches(y: Any) -> Any:
            if isinstance(y, tuple):
                return patches(y[0]), y[1]
            y = y.narrow(1, 0 if self._start is None else y.shape[1] - height * width, height * width)
            if output_fmt == "NCHW":
                y = y.reshape(y.shape[0], height, width, -1).permute(0, 3, 1, 2).contiguous()
            return y

        if isinstance(result, dict):
            result["image_intermediates"] = [patches(y) for y in result["image_intermediates"]]
            return result
        if given.arguments.get("intermediates_only"):
            return [patches(y) for y in result]
        return result[0], [patches(y) for y in result[1]]


class _GroupsParameters(_Grafted):
    """timm's groups of parameters: what the surgery added is treated like the class token."""

    def no_weight_decay(self) -> set[str]:
        return {*super().no_weight_decay(), *ADDED}  # type: ignore[misc]

    def group_matcher(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        groups = super().group_matcher(*args, **kwargs)  # type: ignore[misc]
        return {**groups, "stem": "|^".join((groups["stem"], *ADDED))}


def load(folder: str | Path = Path(__file__).parent, *, state: Any = None, **kwargs: Any) -> nn.Module:
    """The patched model of this folder, in eval mode; `kwargs` go to `timm.create_model` (`img_size`, ...).

    As in timm, a classifier of another number of classes (`num_classes=10`) starts at random, and `features_only=True`
    (with `out_indices`) gives feature maps of blocks. A `state` dict is used as it is, instead of the folder's weights.
    """
    import timm
    from safetensors.torch import load_file
    from timm.models._features import FeatureGetterNet

    folder = Path(folder)
    surgery = json.loads((folder / "config.json").read_text("utf-8"))["regsurgery"]
    features_only, out_indices = kwargs.pop("features_only", False), kwargs.pop("out_indices", 3)  # timm's own default
    given, state = state is not None, state or load_file(folder / "model.safetensors")
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=False, **kwargs)
    model.to(next(value.dtype for value in state.values() if value.is_floating_point()))
    added = {name: state.pop(name) for name in list(state) if name.endswith(ADDED)}
    if not given:
        _load_stock(model, state)
    operate(model, surgery)
    if given:
        model.load_state_dict({**_resized(model)(state, model), **added}, strict=True, assign=True)
    elif model.load_state_dict(added, strict=False).unexpected_keys:
        raise ValueError(f"{folder}: {', '.join(added)}: no such parameter in the patched {type(model).__name__}")
    if surgery["num_registers"]:
        _graft(model, _StripsIntermediates, _start=register_start(surgery))
    if added:
        _graft(model, _GroupsParameters)
    if features_only:
        model, stock = FeatureGetterNet(model, out_indices), model
        model.pretrained_cfg = model.default_cfg = stock.pretrained_cfg
    return model.eval()


def _resized(model: nn.Module) -> Any:
    """The function of timm that fits a state dict to `model`, such as position embeddings to its image size."""
    return getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", lambda state, model: state)


def _load_stock(model: Any, state: Any) -> None:
    """Load weights as timm does, for the number of classes, channels and image size that `model` was made with."""
    from timm.models import load_pretrained

    convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    source = {**model.pretrained_cfg, "source": "", "state_dict": state}
    load_pretrained(model, source, model.num_classes, convolution.in_channels, _resized(model))
