"""The timm part of `modeling_regsurgery.py`. Copied into patched folders after `surgery.py`."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from regsurgery.runtime.surgery import ATTENTION_CONSTANTS, REGISTER_TOKENS, _graft, _Grafted, operate, register_start


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


def load(folder: str | Path = Path(__file__).parent, *, state: Any = None, **kwargs: Any) -> nn.Module:
    """The patched model of this folder, in eval mode; `kwargs` go to `timm.create_model` (`img_size`, ...).

    A `state` dict is used as it is, instead of the folder's weights.
    """
    import timm
    from safetensors.torch import load_file

    folder = Path(folder)
    surgery = json.loads((folder / "config.json").read_text("utf-8"))["regsurgery"]
    given, state = state is not None, state or load_file(folder / "model.safetensors")
    model = timm.create_model(f"local-dir:{folder}", pretrained=False, **kwargs)
    model.to(next(value.dtype for value in state.values() if value.is_floating_point()))
    resize = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    added = (REGISTER_TOKENS, ATTENTION_CONSTANTS)
    tokens = {name: state.pop(name) for name in list(state) if name.endswith(added)}
    state = state if resize is None else resize(state, model)
    operate(model, surgery)
    model.load_state_dict({**state, **tokens}, strict=True, assign=given)
    if surgery["num_registers"]:
        _graft(model, _StripsIntermediates, _start=register_start(surgery))
    return model.eval()
