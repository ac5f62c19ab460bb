"""What a patched checkpoint needs to run: the neuron shift and the module form of the surgery.

This file is copied into every patched folder (as the first part of `modeling_regsurgery.py`), so it imports torch and
nothing of regsurgery. It replaces submodules and registers no hook; state-dict names stay what they were, plus one
parameter `register_tokens`.

Shape suffixes: B batch, T tokens (prefix + patches + registers), P prefix tokens, N patches, R registers,
K register neurons of one block, H hidden units of the MLP, D width of the residual stream.
Blocks and neurons are counted from 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def append_registers(tokens_BTD: Tensor, register_tokens_1RD: Tensor) -> Tensor:
    """`[B, T, D]` and `[1, R, D]` to `[B, T + R, D]`: the registers go behind the patches, in the tokens' dtype."""
    registers_BRD = register_tokens_1RD.to(tokens_BTD.dtype).expand(tokens_BTD.shape[0], -1, -1)
    return torch.cat((tokens_BTD, registers_BRD), dim=1)


def append_constant(tokens_BTD: Tensor, constants_LD: Tensor, index: int) -> Tensor:
    """`[B, T, D]` and row `index` of `[L, D]` to `[B, T + 1, D]`: one more row, the same for every image."""
    constant_B1D = constants_LD[index].to(tokens_BTD.dtype).expand(tokens_BTD.shape[0], 1, -1)
    return torch.cat((tokens_BTD, constant_B1D), dim=1)


def strip_registers(x: Tensor, dims: Sequence[int], num_registers: int) -> Tensor:
    """`x` without its last `num_registers` entries along each of `dims`; a view."""
    for dim in dims:
        x = x.narrow(dim, 0, x.shape[dim] - num_registers)
    return x


def signed_peak(values_BTK: Tensor) -> Tensor:
    """The signed value of the largest magnitude over the tokens, `[B, 1, K]`; the positive one where two tie."""
    high_B1K = values_BTK.amax(dim=1, keepdim=True)
    low_B1K = values_BTK.amin(dim=1, keepdim=True)
    return torch.where(high_B1K >= -low_B1K, high_B1K, low_B1K)


def shared_peak(peak_B1K: Tensor) -> Tensor:
    """One extreme for all neurons of the block, as the reference code has it, `[B, 1, K]`."""
    return signed_peak(peak_B1K.transpose(1, 2)).transpose(1, 2).expand_as(peak_B1K)


def filled(values_BnK: Tensor, patches_BNK: Tensor, fill: str) -> Tensor:
    """What stays of `values_BnK` (patches, or the prefix) once its extremes are moved away; see `neuron_shift`."""
    if fill == "keep":
        return values_BnK
    if fill == "zero":
        return torch.zeros_like(values_BnK)
    mean_B1K = patches_BNK.mean(dim=1, keepdim=True)
    if fill == "mean":
        return mean_B1K.expand_as(values_BnK)
    limit_B1K = mean_B1K + patches_BNK.std(dim=1, keepdim=True)
    return torch.where(values_BnK > limit_B1K, mean_B1K, values_BnK)


def neuron_shift(
    hidden_BTH: Tensor,
    index_K: Tensor,
    *,
    num_prefix: int,
    scale: Sequence[float],
    fill: str,
    fill_prefix: bool,
    one_peak: bool,
    in_place: bool,
) -> Tensor:
    """Move each register neuron's extreme value onto the register tokens and clear it on the patches.

    The neuron shift of Jiang et al., arXiv 2506.08010, Algorithm 2, separately for every item of the batch and for
    every neuron. The last `len(scale)` tokens are the registers.

    Args:
        hidden_BTH: MLP activations of one block, the input of the down projection, `[B, T, H]`.
        index_K: register neurons of that block, int64 `[K]`, on the device of `hidden_BTH`.
        num_prefix: number of prefix tokens (CLS and the like) before the patches.
        scale: one factor a register; register r gets `scale[r] * peak`.
        fill: what the patches keep: `zero` 0; `mean` the mean over the patches; `outliers` only values above mean + 1
            standard deviation become the mean; `keep` unchanged.
        fill_prefix: fill the prefix tokens as well (the paper's Algorithm 2); otherwise they keep their values (the
            authors' code).
        one_peak: one signed extreme for all listed neurons of the block, as in the authors' code (`compat: reference`).
        in_place: write into `hidden_BTH`; only for a tensor that nothing else reads. Ignored while autograd records.

    Returns:
        `[B, T, H]`: `hidden_BTH` itself where written in place, else a copy.
    """
    num_registers = len(scale)
    values_BTK = hidden_BTH.index_select(-1, index_K)
    num_tokens = values_BTK.shape[1] - num_registers
    prefix_BPK = values_BTK.narrow(1, 0, num_prefix)
    patches_BNK = values_BTK.narrow(1, num_prefix, num_tokens - num_prefix)
    peak_B1K = signed_peak(values_BTK)
    if one_peak:
        peak_B1K = shared_peak(peak_B1K)
    shifted_BTK = torch.cat(
        (
            filled(prefix_BPK, patches_BNK, fill) if fill_prefix else prefix_BPK,
            filled(patches_BNK, patches_BNK, fill),
            *(peak_B1K * factor for factor in scale),
        ),
        dim=1,
    )
    if in_place and not (torch.is_grad_enabled() and hidden_BTH.requires_grad):
        return hidden_BTH.index_copy_(-1, index_K, shifted_BTK)
    return hidden_BTH.index_copy(-1, index_K, shifted_BTK)


# --- the module form ------------------------------------------------------------------------------------------------


class ShiftedLinear(nn.Linear):
    """A down projection with the neuron shift on its input. Made from the stock linear; same parameters, same names."""

    neurons: list[int]
    shift: dict[str, Any]
    _index_K: Tensor | None

    @staticmethod
    def operate(linear: nn.Linear, neurons: list[int], shift: dict[str, Any]) -> None:
        if type(linear) is not nn.Linear:
            raise TypeError(f"expected a plain torch.nn.Linear as down projection, found {type(linear).__name__}")
        linear.__class__ = ShiftedLinear
        assert isinstance(linear, ShiftedLinear)
        linear.neurons, linear.shift, linear._index_K = neurons, shift, None

    def _index(self, device: torch.device) -> Tensor:
        # Neither a parameter nor a buffer: a non-persistent buffer comes back uninitialised from a load on `meta`.
        if torch.compiler.is_compiling():
            return torch.tensor(self.neurons, device=device)
        if self._index_K is None or self._index_K.device != device:
            with torch.inference_mode(False):  # an inference tensor could not be used in a later training step
                self._index_K = torch.tensor(self.neurons, device=device)
        return self._index_K

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(neuron_shift(input, self._index(input.device), **self.shift))


class _Grafted:
    """Base of the classes below, each mixed in front of a stock module's own class by `_graft`."""

    def __reduce__(self) -> Any:
        mixin, stock = type(self).__bases__
        return _revive, (mixin, stock), self.__dict__


def _grafted_class(mixin: type, stock: type) -> type:
    # The names stay those of the stock class: transformers keys output capturing, and accelerate and FSDP key
    # placement, on them.
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock.__name__, (mixin, stock), names)


def _revive(mixin: type, stock: type) -> nn.Module:
    cls: Any = _grafted_class(mixin, stock)
    return cls.__new__(cls)


def _graft(module: nn.Module, mixin: type, **attributes: Any) -> None:
    module.__class__ = _grafted_class(mixin, type(module))
    for name, value in attributes.items():
        # Past nn.Module.__setattr__: what is shared with another module must not be registered here as a child.
        object.__setattr__(module, name, value)


class _Registers:
    """Shares the parameter `register_tokens` of the tower with the module that inserts it, without a second name."""

    def __init__(self, tower: nn.Module) -> None:
        self.tower = tower

    def append(self, hidden: Tensor) -> Tensor:
        return append_registers(hidden, self.tower.register_tokens)  # type: ignore[arg-type]


class _InsertsRegisters(_Grafted):
    _registers: _Registers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            args = (self._registers.append(args[0]), *args[1:])
        else:
            kwargs["hidden_states"] = self._registers.append(kwargs["hidden_states"])
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class _StripsRegisters(_Grafted):
    _num_registers: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if isinstance(output, tuple):
            return (strip_registers(output[0], (1,), self._num_registers), *output[1:])
        return strip_registers(output, (1,), self._num_registers)


class _StripsAttention(_Grafted):
    """Strips the attention maps that an attention module returns beside its output; rows then sum to less than 1."""

    _num_registers: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if not isinstance(output, tuple):
            return output
        return tuple(
            strip_registers(part, (2, 3), self._num_registers) if isinstance(part, Tensor) and part.ndim == 4 else part
            for part in output
        )


class _Constants:
    """Shares the parameter `attention_constants` of the tower with an attention module, without a second name."""

    def __init__(self, tower: nn.Module, index: int) -> None:
        self.tower, self.index = tower, index

    def append(self, hidden: Tensor) -> Tensor:
        return append_constant(hidden, self.tower.attention_constants, self.index)  # type: ignore[arg-type]


class _AttendsToConstant(_Grafted):
    """Attention with one more row of input, whose key and value are the constants; it is stripped from what comes out.

    Query, key and value may be the same tensor or three; maps are stripped too, their rows then sum to less than 1.
    """

    _constants: _Constants

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        longer: dict[int, Tensor] = {}

        def appended(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim != 3:
                return value
            if id(value) not in longer:  # a query that is the key stays the key
                longer[id(value)] = self._constants.append(value)
            return longer[id(value)]

        output = super().forward(  # type: ignore[misc]
            *(appended(value) for value in args), **{name: appended(value) for name, value in kwargs.items()}
        )
        if not isinstance(output, tuple):
            return strip_registers(output, (1,), 1)
        rest = (
            strip_registers(part, (2, 3), 1) if isinstance(part, Tensor) and part.ndim == 4 else part
            for part in output[1:]
        )
        return (strip_registers(output[0], (1,), 1), *rest)


class _StripsHiddenStates(_Grafted):
    """Strips the hidden states that a transformers encoder collects; `last_hidden_state` left the last block stripped.

    How many tokens a hidden state should have is read off `last_hidden_state` of the same output, so that stripping
    twice (in the encoder and in the model around it) changes nothing.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        as_tuple = kwargs.get("return_dict") is False
        if as_tuple:
            kwargs["return_dict"] = True
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        states = getattr(output, "hidden_states", None)
        if states is not None:
            num_tokens = output.last_hidden_state.shape[1]
            output["hidden_states"] = tuple(
                state if state is None else state.narrow(1, 0, num_tokens) for state in states
            )
        return output.to_tuple() if as_tuple else output


def resolve_layout(model: nn.Module, layouts: Sequence[Mapping[str, Any]]) -> tuple[nn.Module, Mapping[str, Any]]:
    """The tower of `model` and the first of `layouts` all of whose module paths exist in it.

    A checkpoint lists more than one layout where library versions name the same modules differently: first by the names
    on disk, which are the older and the more nested ones.

    Raises:
        ValueError: no layout fits; the message names the first missing module of each.
    """
    missing = []
    for layout in layouts:
        for tower_path in dict.fromkeys((layout["tower"], "")):
            try:
                tower = model.get_submodule(tower_path)
                for path in (layout["insert"], layout["strip"], *layout["attentions"], *layout["down"].values()):
                    tower.get_submodule(path)
            except AttributeError as error:
                missing.append(f"{tower_path or type(model).__name__}: {error}")
                continue
            return tower, layout
    raise ValueError(
        "regsurgery: this library version lays the model out in a way the checkpoint does not know: "
        + "; ".join(missing)
    )


def operate(model: nn.Module, surgery: Mapping[str, Any], *, keep_registers: bool = False) -> nn.Module:
    """Turn a stock model into its patched module form, in place.

    Args:
        model: stock model, freshly built or loaded; its weights are not read.
        surgery: the `regsurgery` block of the checkpoint's config.
        keep_registers: leave the registers at the end of the token outputs; only for a model that is nothing but the
            tower, since a head over all tokens would take them for patches.

    Returns:
        `model`, whose tower has a new parameter, zero until loaded: `register_tokens` `[1, R, D]`, or in mode `bias`
        `attention_constants` `[L, D]`.
    """
    num_registers = int(surgery["num_registers"])
    tower, layout = resolve_layout(model, surgery["layouts"])
    if keep_registers and tower is not model:
        raise ValueError(
            "keep_registers=True needs the vision tower alone, without the head around it; load it with AutoModel"
        )
    shift = {
        "num_prefix": int(surgery["num_prefix"]),
        "scale": [float(factor) for factor in surgery["scale"]],
        "fill": surgery["fill"],
        "fill_prefix": surgery["prefix"] == "fill",
        "one_peak": surgery["compat"] == "reference",
    }
    for block, neurons in surgery["register_neurons"].items():
        linear = tower.get_submodule(layout["down"][block])
        in_place = block in surgery["in_place_blocks"]
        ShiftedLinear.operate(linear, list(neurons), {**shift, "in_place": in_place})  # type: ignore[arg-type]
    like = next(tower.get_submodule(layout["strip"]).parameters())
    if surgery["mode"] == "bias":
        blocks = surgery["constant_blocks"]
        zeros_LD = torch.zeros(len(blocks), int(surgery["width"]), dtype=like.dtype, device=like.device)
        tower.register_parameter("attention_constants", nn.Parameter(zeros_LD))
        for index, block in enumerate(blocks):
            attention = tower.get_submodule(layout["attentions"][block])
            _graft(attention, _AttendsToConstant, _constants=_Constants(tower, index))
        return model
    if num_registers == 0:
        return model
    zeros_1RD = torch.zeros(1, num_registers, int(surgery["width"]), dtype=like.dtype, device=like.device)
    tower.register_parameter("register_tokens", nn.Parameter(zeros_1RD))
    _graft(tower.get_submodule(layout["insert"]), _InsertsRegisters, _registers=_Registers(tower))
    if not keep_registers:
        _graft(tower.get_submodule(layout["strip"]), _StripsRegisters, _num_registers=num_registers)
        for path in layout["collectors"]:
            _graft(tower.get_submodule(path), _StripsHiddenStates)
    for path in layout["attentions"]:
        _graft(tower.get_submodule(path), _StripsAttention, _num_registers=num_registers)
    return model
