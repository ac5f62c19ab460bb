"""The timm part of `modeling_regsurgery.py`. Copied into patched folders behind `runtime.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from regsurgery.runtime import _graft, _Grafted, operate


class _StripsIntermediates(_Grafted):
    """`forward_intermediates` (and with it `get_intermediate_layers`) without the registers."""

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Any = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError("output_fmt must be NCHW or NLC")
        result = super().forward_intermediates(  # type: ignore[misc]
            x,
            indices=indices,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            stop_early=stop_early,
            output_fmt="NLC",
            intermediates_only=intermediates_only,
            output_dict=output_dict,
            **kwargs,
        )
        height, width = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))  # type: ignore[attr-defined]

        def patches(y: Any) -> Any:
            if isinstance(y, tuple):
                return patches(y[0]), y[1]
            y = y.narrow(1, 0, height * width)
            if output_fmt == "NCHW":
                y = y.reshape(y.shape[0], height, width, -1).permute(0, 3, 1, 2).contiguous()
            return y

        if output_dict:
            result["image_intermediates"] = [patches(y) for y in result["image_intermediates"]]
            return result
        if intermediates_only:
            return [patches(y) for y in result]
        return result[0], [patches(y) for y in result[1]]


def load(folder: str | Path = Path(__file__).parent, **kwargs: Any) -> nn.Module:
    """The patched model of this folder, in eval mode; `kwargs` go to `timm.create_model` (`img_size`, ...)."""
    import timm
    from safetensors.torch import load_file

    folder = Path(folder)
    surgery = json.loads((folder / "config.json").read_text("utf-8"))["regsurgery"]
    state = load_file(folder / "model.safetensors")
    model = timm.create_model(f"local-dir:{folder}", pretrained=False, **kwargs)
    model.to(next(value.dtype for value in state.values() if value.is_floating_point()))
    resize = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    added = ("register_tokens", "attention_constants")
    tokens = {name: state.pop(name) for name in list(state) if name.endswith(added)}
    state = state if resize is None else resize(state, model)
    operate(model, surgery)
    model.load_state_dict({**state, **tokens}, strict=True)
    if surgery["num_registers"]:
        _graft(model, _StripsIntermediates)
    return model.eval()
