"""The runtime of a patched checkpoint: the neuron shift and the module form of the surgery.

This file is copied into every patched folder (as the first part of `modeling_regsurgery.py`), so it imports torch and
nothing from regsurgery. It replaces submodules and registers no hooks; state-dict names stay the same, plus one
parameter `register_tokens`.

Shape suffixes: B batch, T tokens (prefix + patches + registers), P prefix tokens, N patches, R registers,
K register neurons of one block, H hidden units of the MLP, D width of the residual stream.
Blocks and neurons are counted from 0.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from regsurgery.runtime.hidden import PASSING, forward_with, hidden_site

# The parameters that a tower gets, by mode.
REGISTER_TOKENS, ATTENTION_CONSTANTS = "register_tokens", "attention_constants"
# In a tower that has register tokens of its own, by that name; transformers renames whatever contains that.
OTHER_REGISTER_TOKENS = "test_time_registers"
ADDED = (REGISTER_TOKENS, OTHER_REGISTER_TOKENS, ATTENTION_CONSTANTS)
RECORD = "_regsurgery"  # the tower's attribute that holds what was done to it


def registers_for(num_patches: int, num_registers: int, chosen_for: int | None) -> int:
    """The number of registers of a model that sees `num_patches` patches, given `num_registers` of `chosen_for`.

    It grows in proportion, halves rounded up, and is at least one; if `chosen_for` is None, it is always
    `num_registers`. Works on integers only, including symbolic ones (`torch.SymInt`).
    """
    if chosen_for is None or num_registers == 0:
        return num_registers
    number: Any = torch.sym_max(1, (2 * num_registers * num_patches + chosen_for) // (2 * chosen_for))
    return number


class RegisterCount:
    """The number of registers, derived from the number of tokens; nothing is shared between modules.

    Args:
        num_registers, chosen_for: see `registers_for`.
        num_prefix: prefix tokens, which are not patches.
    """

    def __init__(self, num_registers: int, chosen_for: int | None = None, num_prefix: int = 0) -> None:
        self.num_registers, self.chosen_for, self.num_prefix = num_registers, chosen_for, num_prefix

    def beside(self, num_tokens: int) -> int:
        """The number of registers for `num_tokens` tokens (prefix tokens and patches)."""
        if self.chosen_for is None:
            return self.num_registers
        return registers_for(_number(num_tokens) - self.num_prefix, self.num_registers, self.chosen_for)

    def among(self, num_tokens: int) -> int:
        """The number of registers among `num_tokens` tokens (prefix tokens, patches and registers).

        N patches come with R(N) registers, and N + R(N) grows strictly with N. Let r be R without its minimum of one:
        the smallest N for which N + r(N) reaches the number of patches and registers is the number of patches, or one
        more if r is 0.
        """
        if self.chosen_for is None:
            return self.num_registers
        both, per, more = _number(num_tokens) - self.num_prefix, self.chosen_for, self.num_registers
        num_patches = (2 * per * both - per + 2 * (per + more) - 1) // (2 * (per + more))
        number: Any = torch.sym_max(1, both - num_patches)
        return number


def _number(size: int) -> int:
    # While torch.jit.trace runs, sizes are tensors; a traced model is valid for one image size anyway.
    return int(size) if torch.jit.is_tracing() else size  # type: ignore[attr-defined]


def repeated_registers(register_tokens_1RD: Tensor, num_registers: int) -> Tensor:
    """`num_registers` register tokens: row i is row `i % R` of `[1, R, D]`."""
    times = (num_registers + register_tokens_1RD.shape[1] - 1) // register_tokens_1RD.shape[1]
    return register_tokens_1RD.repeat(1, times, 1).narrow(1, 0, num_registers)


def insert_registers(tokens_BTD: Tensor, register_tokens_1RD: Tensor, start: int | None) -> Tensor:
    """`[B, T, D]` and `[1, R, D]` to `[B, T + R, D]`, on the tokens' device and in their dtype.

    Args:
        start: index of the first register; None: after the patches.
    """
    registers_BRD = register_tokens_1RD.to(tokens_BTD.device, tokens_BTD.dtype).expand(tokens_BTD.shape[0], -1, -1)
    if start is None:
        return torch.cat((tokens_BTD, registers_BRD), dim=1)
    return torch.cat((tokens_BTD[:, :start], registers_BRD, tokens_BTD[:, start:]), dim=1)


def insert_constant(tokens_BTD: Tensor, constants_LD: Tensor, index: int, start: int | None) -> Tensor:
    """`[B, T, D]` and row `index` of `[L, D]` to `[B, T + 1, D]`: one more row, the same for every image."""
    return insert_registers(tokens_BTD, constants_LD[index].reshape(1, 1, -1), start)


def strip_registers(x: Tensor, dims: Sequence[int], num_registers: int, start: int | None) -> Tensor:
    """`x` without `num_registers` entries from `start` on (None: the last ones; a view) along each of `dims`."""
    for dim in dims:
        kept = x.shape[dim] - num_registers
        if start is None:
            x = x.narrow(dim, 0, kept)
        else:
            x = torch.cat((x.narrow(dim, 0, start), x.narrow(dim, start + num_registers, kept - start)), dim=dim)
    return x


def pad_registers(x: Tensor, dims: Sequence[int], num_registers: int, start: int | None) -> Tensor:
    """`x`, a bias or mask over tokens, with entries for the registers along each of `dims`: no bias, not masked."""
    for dim in dims:
        first = x.shape[dim] if start is None else start
        shape = [num_registers if axis == dim % x.ndim else size for axis, size in enumerate(x.shape)]
        free = x.new_ones(shape) if x.dtype == torch.bool else x.new_zeros(shape)
        x = torch.cat((x.narrow(dim, 0, first), free, x.narrow(dim, first, x.shape[dim] - first)), dim=dim)
    return x


def signed_peak(values_BTK: Tensor) -> Tensor:
    """The signed value of the largest magnitude over the tokens, `[B, 1, K]`; the positive one if two tie."""
    low_B1K, high_B1K = values_BTK.aminmax(dim=1, keepdim=True)
    return torch.where(high_B1K >= -low_B1K, high_B1K, low_B1K)


def shared_peak(peak_B1K: Tensor) -> Tensor:
    """One extreme for all neurons of the block, as in the reference code, `[B, 1, K]`."""
    return signed_peak(peak_B1K.transpose(1, 2)).transpose(1, 2).expand_as(peak_B1K)


def _peak(values_BTK: Tensor, one_peak: bool) -> Tensor:
    peak_B1K = signed_peak(values_BTK)
    return shared_peak(peak_B1K) if one_peak else peak_B1K


def filled(values_BnK: Tensor, patches_BNK: Tensor, fill: str) -> Tensor:
    """What remains of `values_BnK` (patches, or the prefix) once the extremes are moved away; see `neuron_shift`."""
    if fill == "keep":
        return values_BnK
    if fill == "zero":
        return values_BnK.new_full((), 0).expand_as(values_BnK)
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
    inside_prefix: bool,
    scale: Sequence[float],
    fill: str,
    fill_prefix: bool,
    one_peak: bool,
    in_place: bool,
    num_registers: int | None = None,
) -> Tensor:
    """Move each register neuron's extreme value onto the register tokens and clear it on the patches.

    The neuron shift of Jiang et al., arXiv 2506.08010, Algorithm 2, separately for every item of the batch and for
    every neuron. The registers come after the patches or after the prefix.

    Args:
        hidden_BTH: MLP activations of one block, the input of the down projection, `[B, T, H]`.
        index_K: register neurons of that block, int64 `[K]`, on the device of `hidden_BTH`.
        num_prefix: number of prefix tokens (CLS and the like) before the patches, registers not counted.
        inside_prefix: the registers are between prefix tokens and patches, not at the end.
        scale: one factor per register; register r gets `scale[r] * peak`.
        fill: what the patches keep: `zero` 0; `mean` the mean over the patches; `outliers` only values above mean + 1
            standard deviation become the mean; `keep` unchanged.
        fill_prefix: fill the prefix tokens as well (the paper's Algorithm 2); otherwise they keep their values (the
            authors' code).
        one_peak: one signed extreme for all listed neurons of the block, as in the authors' code (`compat: reference`).
        in_place: write into `hidden_BTH`; only for a tensor that nothing else reads. Ignored while autograd or
            `torch.jit.trace` records.
        num_registers: the number of registers if `scale` is one factor for all of them; by default, the number of
            factors.

    Returns:
        `[B, T, H]`: `hidden_BTH` itself if written in place, else a copy.
    """
    common = num_registers is not None
    num_registers = num_registers if num_registers is not None else len(scale)
    recorded = torch.jit.is_tracing() or (torch.is_grad_enabled() and hidden_BTH.requires_grad)  # type: ignore[attr-defined]
    in_place = in_place and not recorded
    num_tokens = hidden_BTH.shape[1] - num_registers
    first_patch = num_prefix + (num_registers if inside_prefix else 0)
    unscaled = scale[0] == 1 if common else all(factor == 1 for factor in scale)
    if in_place and unscaled and fill == "zero" and not fill_prefix and not torch.compiler.is_compiling():
        registers = (num_prefix if inside_prefix else num_tokens, num_registers)
        return _moved(hidden_BTH, index_K, (first_patch, num_tokens - num_prefix), registers, one_peak)
    values_BTK = hidden_BTH.index_select(-1, index_K)
    prefix_BPK = values_BTK.narrow(1, 0, num_prefix)
    patches_BNK = values_BTK.narrow(1, first_patch, num_tokens - num_prefix)
    peak_B1K = _peak(values_BTK, one_peak)
    new_prefix_BPK = filled(prefix_BPK, patches_BNK, fill) if fill_prefix else prefix_BPK
    new_patches_BNK = filled(patches_BNK, patches_BNK, fill)
    shifted = [peak_B1K if factor == 1 else peak_B1K * factor for factor in scale]
    shifted = [shifted[0].expand(-1, num_registers, -1)] if common else shifted
    order = (*shifted, new_patches_BNK) if inside_prefix else (new_patches_BNK, *shifted)
    shifted_BTK = torch.cat((new_prefix_BPK, *order), dim=1)
    if in_place:
        return hidden_BTH.index_copy_(-1, index_K, shifted_BTK)
    return hidden_BTH.index_copy(-1, index_K, shifted_BTK)


def _moved(
    hidden_BTH: Tensor, index_K: Tensor, patches: tuple[int, int], registers: tuple[int, int], one_peak: bool
) -> Tensor:
    """`neuron_shift` in place, for `fill` `zero` and a scale of 1; tokens are given by their first and their number.

    In two writes, and nothing is put together first: two thirds of the time. A compiler needs no help.
    """
    peak_B1K = _peak(hidden_BTH.index_select(-1, index_K), one_peak) if registers[1] else None
    hidden_BTH.narrow(1, *patches).index_fill_(-1, index_K, 0)
    if peak_B1K is not None:
        hidden_BTH.narrow(1, *registers).index_copy_(-1, index_K, peak_B1K.expand(-1, registers[1], -1))
    return hidden_BTH


def shift_arguments(
    num_prefix: int, scale: Sequence[float], placement: str, fill: str, prefix: str, compat: str
) -> dict[str, Any]:
    """The keywords of `neuron_shift` that a recipe and the sites decide, all but `in_place`."""
    return {
        "num_prefix": num_prefix,
        "inside_prefix": placement == "prefix",
        "scale": list(scale),
        "fill": fill,
        "fill_prefix": prefix == "fill",
        "one_peak": compat == "reference",
    }


class _Grafted:
    """Base of the classes below, each of which `_graft` mixes in before a stock module's own class."""

    def __init_subclass__(cls) -> None:
        # transformers evaluates the annotations of a model's class and its bases, and does not find what this file
        # names where it was run without being imported.
        cls.__annotations__ = {}
        super().__init_subclass__()

    def __reduce__(self) -> Any:
        mixins, stock = _parts(type(self))
        return _revive, (mixins[::-1], stock), self.__dict__


def _parts(grafted: type) -> tuple[list[type], type]:
    """What was mixed in, last first, and the stock class."""
    mixins = []
    while issubclass(grafted, _Grafted):
        mixin, grafted = grafted.__bases__
        mixins.append(mixin)
    return mixins, grafted


def _grafted_class(mixin: type, stock: type) -> type:
    # The stock class's names stay: transformers keys output capturing on them, and accelerate and FSDP key placement.
    names: dict[str, Any] = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
    }
    if "forward" in vars(mixin):  # keep the signature of the stock forward, from which the Trainer picks inputs
        own: Any = vars(mixin)["forward"]  # a copy of it: a function that calls it would be one more call
        copied = FunctionType(own.__code__, own.__globals__, own.__name__, own.__defaults__, own.__closure__)
        names["forward"] = functools.wraps(stock.forward)(copied)  # type: ignore[attr-defined]
    return type(stock.__name__, (mixin, stock), names)


def _revive(mixins: Sequence[type], stock: type) -> nn.Module:
    cls: Any = stock
    for mixin in mixins:
        cls = _grafted_class(mixin, cls)
    return cls.__new__(cls)


def _graft(module: nn.Module, mixin: type, **attributes: Any) -> None:
    module.__class__ = _grafted_class(mixin, type(module))
    for name, value in attributes.items():
        # Bypass nn.Module.__setattr__: what is shared with another module must not be registered here as a child.
        object.__setattr__(module, name, value)


class _Shift:
    """The neuron shift of one block, as a step of the module form.

    Args:
        neurons, shift, count: register neurons, keywords of `neuron_shift`, and the number of registers.
    """

    def __init__(self, neurons: Sequence[int], shift: Mapping[str, Any], count: RegisterCount) -> None:
        self.neurons, self.shift, self.count = list(neurons), dict(shift), count
        # Neither parameters nor buffers: a non-persistent buffer is uninitialised after a load on `meta`. By device,
        # for replicas share it. An inference tensor could not be used in a later training step.
        with torch.inference_mode(False):
            self._index_of = {"cpu": torch.tensor(self.neurons, device="cpu")}

    def __call__(self, hidden_BTH: Tensor, in_place: bool = True) -> Tensor:
        """`hidden_BTH`, shifted; it is written into only if `in_place` and the block's activation is fresh."""
        num_registers = None if self.count.chosen_for is None else self.count.among(hidden_BTH.shape[1])
        shift = {**self.shift, "in_place": in_place and self.shift["in_place"], "num_registers": num_registers}
        return neuron_shift(hidden_BTH, self._index(hidden_BTH.device), **shift)

    def _index(self, device: torch.device) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.tensor(self.neurons, device=device)
        index_K = self._index_of.get(str(device))
        if index_K is None:
            with torch.inference_mode(False):
                index_K = self._index_of["cpu"].to(device)
            self._index_of[str(device)] = index_K
        return index_K


class _ShiftsOutput(_Grafted):
    """A module that returns the hidden activation: shifted, for whoever reads it."""

    _shift: _Shift

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden_BTH = super().forward(*args, **kwargs)  # type: ignore[misc]
        # One that passes its input on would write into what a hook on that input was given.
        seen = isinstance(self, PASSING) and bool(self._forward_pre_hooks)  # type: ignore[attr-defined]
        return self._shift(hidden_BTH, in_place=not seen)


class _ShiftsInside(_Grafted):
    """An MLP whose own forward makes the hidden activation: the same forward, with the shift as one more step."""

    _shift: _Shift
    _down: str
    _forwards: tuple[Any, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forwards[self.training](self, *args, **kwargs)  # type: ignore[attr-defined]

    def __reduce__(self) -> Any:
        make, args, state = super().__reduce__()
        return make, args, {name: value for name, value in state.items() if name != "_forwards"}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        _step_inside(self, self._down)


def _step_inside(mlp: Any, down: str) -> None:
    """Make the forwards of `mlp` by those of its stock class."""
    grafted = type(mlp)
    _, mlp.__class__ = _parts(grafted)
    try:
        forwards = forward_with(mlp, down, "_shift")
    finally:
        mlp.__class__ = grafted
    object.__setattr__(mlp, "_forwards", forwards)


class _ShiftsInput(_Grafted):
    """A down projection that shifts what it is given, a copy: what else reads its input reads it unshifted."""

    _shift: _Shift

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self._shift(input, in_place=False))  # type: ignore[misc]


def _shift_hidden(model: nn.Module, down: str, attention: str, shift: _Shift) -> None:
    """Put `shift` where the hidden activation is made; see `hidden.py`."""
    site = hidden_site(model, down, attention)
    if site is None:
        _graft(model.get_submodule(down), _ShiftsInput, _shift=shift)
    elif site.inline:
        _graft(site.module, _ShiftsInside, _shift=shift, _down=site.inline)
        _step_inside(site.module, site.inline)
    else:
        _graft(site.module, _ShiftsOutput, _shift=shift)


class _HoldsParameter(_Grafted):
    """The tower. What reads its parameter refers to it, and a replica of `nn.DataParallel` must read its own."""

    _readers: Sequence[str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for path in self._readers:
            reader: Any = self.get_submodule(path)  # type: ignore[attr-defined]
            if reader._added.tower is not self:
                object.__setattr__(reader, "_added", reader._added.of(self))
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class _Registers:
    """Shares the tower's register tokens with the module that inserts them, without a second name."""

    def __init__(self, tower: nn.Module, name: str, count: RegisterCount, start: int | None) -> None:
        self.tower, self.name, self.count, self.start = tower, name, count, start

    def of(self, tower: nn.Module) -> _Registers:
        return _Registers(tower, self.name, self.count, self.start)

    def insert(self, hidden: Tensor) -> Tensor:
        tokens_1RD: Any = getattr(self.tower, self.name)
        if self.count.chosen_for is not None:
            tokens_1RD = repeated_registers(tokens_1RD, self.count.beside(hidden.shape[1]))
        return insert_registers(hidden, tokens_1RD, self.start)


class _InsertsRegisters(_Grafted):
    _added: _Registers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            args = (self._added.insert(args[0]), *args[1:])
        else:
            kwargs["hidden_states"] = self._added.insert(kwargs["hidden_states"])
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class _StripsRegisters(_Grafted):
    _count: RegisterCount
    _start: int | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if isinstance(output, tuple):
            return (self._stripped(output[0]), *output[1:])
        return self._stripped(output)

    def _stripped(self, hidden: Tensor) -> Tensor:
        return strip_registers(hidden, (1,), self._count.among(hidden.shape[1]), self._start)


class _TakesMoreTokens(_Grafted):
    """Attention that may be given a mask or bias over pairs of tokens, `[..., T or 1, T]`, without registers, and may
    return attention maps, from which they are cut off; the rows of a map then sum to less than 1.

    A mask is what the attention calls so; transformers makes one, for exports and flex attention, before there are
    registers. Of a bias nothing but its shape is known, so all arguments are looked at where biases are given. One
    class for both, and no more than needed where there is neither: every call takes time, in every block.
    """

    _count: RegisterCount
    _start: int | None
    _mask_at: list[int]
    _biased: bool
    _strips: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        looked_at = self._biased or len(args) > 1
        for name in kwargs:
            if "mask" in name and kwargs[name] is not None:
                looked_at = True
        if looked_at:
            args, kwargs = self._longer(args, kwargs)
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if self._strips and isinstance(output, tuple):
            return tuple(_without_map(part, self._count, self._start) for part in output)
        return output

    def _longer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else next(iter(kwargs.values()))
        num_registers = self._count.among(hidden.shape[1])

        def padded(value: Any, is_mask: bool) -> Any:
            if not is_mask and not self._biased:
                return value
            return _padded(value, hidden.shape[1] - num_registers, num_registers, self._start)

        return (
            tuple(padded(value, at in self._mask_at) for at, value in enumerate(args)),
            {name: padded(value, "mask" in name) for name, value in kwargs.items()},
        )


def _without_map(part: Any, count: RegisterCount, start: int | None) -> Any:
    if not isinstance(part, Tensor) or part.ndim != 4:
        return part
    return strip_registers(part, (2, 3), count.among(part.shape[-1]), start)


def _padded(value: Any, num_tokens: int, num_registers: int, start: int | None) -> Any:
    """`value` with entries for the registers, if it is a mask or bias over pairs of `num_tokens` tokens."""
    if type(value).__name__ == "BlockMask":  # of flex attention, which takes a second to import
        return _longer_block_mask(value, num_registers, start) if value.seq_lengths[1] == num_tokens else value
    if not isinstance(value, Tensor) or value.ndim < 3 or value.shape[-1] != num_tokens:
        return value
    if value.shape[-2] not in (1, num_tokens):  # tokens
        return value
    return pad_registers(value, (-1,) if value.shape[-2] == 1 else (-2, -1), num_registers, start)


def _longer_block_mask(mask: Any, num_registers: int, start: int | None) -> Any:
    """A `BlockMask` of flex attention with registers, which are not masked; made once for all blocks it is given to."""
    from torch.nn.attention.flex_attention import create_block_mask

    made = getattr(mask, "_with_registers", None)
    if made is not None:
        return made
    num_queries, num_tokens = mask.seq_lengths
    first = num_tokens if start is None else start

    def stock(index: Tensor) -> Tensor:
        return torch.where(index >= first + num_registers, index - num_registers, index.clamp(max=num_tokens - 1))

    def is_register(index: Tensor) -> Tensor:
        return (index >= first) & (index < first + num_registers)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return is_register(query) | is_register(key) | mask.mask_mod(batch, head, stock(query), stock(key))

    batch_size, num_heads = mask.kv_num_blocks.shape[:2]
    sizes = (num_queries + num_registers, num_tokens + num_registers)
    mask._with_registers = create_block_mask(
        mask_mod, batch_size, num_heads, *sizes, device=mask.kv_num_blocks.device, BLOCK_SIZE=mask.BLOCK_SIZE
    )
    return mask._with_registers


class _PadsBias(_Grafted):
    """A module that makes a bias over pairs of tokens, `[..., T, T]`, with rows and columns for the registers."""

    _count: RegisterCount
    _start: int | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dim_size") is not None:  # BEiT's and Data2Vec's: the number of tokens to interpolate to
            rows, columns = args[0] if args else kwargs["window_size"]
            num_tokens = rows * columns + self._count.num_prefix
            # A bias that all blocks share is made before there are registers.
            if kwargs["dim_size"] == num_tokens + self._count.beside(num_tokens):
                kwargs["dim_size"] = num_tokens
        bias = super().forward(*args, **kwargs)  # type: ignore[misc]
        return pad_registers(bias, (-2, -1), self._count.beside(bias.shape[-1]), self._start)


class _PadsOwnBias(_Grafted):
    """The same for timm modules that are not called for their bias."""

    _count: RegisterCount
    _start: int | None

    def _get_rel_pos_bias(self) -> Tensor:
        return self._padded(super()._get_rel_pos_bias())  # type: ignore[misc]

    def get_bias(self) -> Tensor:
        return self._padded(super().get_bias())  # type: ignore[misc]

    def _padded(self, bias: Tensor) -> Tensor:
        return pad_registers(bias, (-2, -1), self._count.beside(bias.shape[-1]), self._start)


class _Constants:
    """Shares the tower's parameter `attention_constants` with an attention module, without a second name."""

    def __init__(self, tower: nn.Module, index: int, start: int | None) -> None:
        self.tower, self.index, self.start = tower, index, start
        self.width = tower.attention_constants.shape[-1]  # type: ignore[index,union-attr]

    def of(self, tower: nn.Module) -> _Constants:
        return _Constants(tower, self.index, self.start)

    def insert(self, hidden: Tensor) -> Tensor:
        return insert_constant(hidden, self.tower.attention_constants, self.index, self.start)  # type: ignore[arg-type]


class _AttendsToConstant(_Grafted):
    """Attention with one more row of input, whose key and value are the constants; it is stripped from the output.

    Query, key and value may be one tensor or three; maps are stripped too, so their rows sum to less than 1.
    """

    _added: _Constants

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        longer: dict[int, Tensor] = {}

        def inserted(value: Any, first: bool) -> Any:
            # The first argument is not looked at: while `torch.fx` traces, no value has a shape.
            if not first and not self._is_tokens(value):
                return value
            if id(value) not in longer:  # a tensor that is both query and key stays one tensor
                longer[id(value)] = self._added.insert(value)
            return longer[id(value)]

        output = super().forward(  # type: ignore[misc]
            *(inserted(value, at == 0) for at, value in enumerate(args)),
            **{name: inserted(value, name == "hidden_states") for name, value in kwargs.items()},
        )
        start = self._added.start
        if not isinstance(output, tuple):
            return strip_registers(output, (1,), 1, start)
        rest = (_without_map(part, RegisterCount(1), start) for part in output[1:])
        return (strip_registers(output[0], (1,), 1, start), *rest)

    def _is_tokens(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim == 3 and value.shape[-1] == self._added.width


class _StripsHiddenStates(_Grafted):
    """Strips the hidden states that a transformers encoder collects; those not asked for are None.

    The number of tokens of a hidden state is taken from the last block's stripped output, so that stripping twice (in
    the encoder and in the model around it) changes nothing.
    """

    _start: int | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        as_tuple = kwargs.get("return_dict") is False
        if as_tuple:
            kwargs["return_dict"] = True
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        states = getattr(output, "hidden_states", None)
        if states is not None:
            left = (getattr(output, "last_hidden_state", None), *states)
            num_tokens = min(state.shape[1] for state in left if state is not None)
            output["hidden_states"] = tuple(
                state if state is None else strip_registers(state, (1,), state.shape[1] - num_tokens, self._start)
                for state in states
            )
        return output.to_tuple() if as_tuple else output


def resolve_layout(model: nn.Module, layouts: Sequence[Mapping[str, Any]]) -> tuple[nn.Module, Mapping[str, Any]]:
    """The tower of `model` and the first of `layouts` all of whose module paths exist in it.

    A checkpoint lists more than one layout if library versions name the same modules differently: first the one by the
    names on disk, which are older and more nested.

    Raises:
        ValueError: no layout fits; the message names the first missing module of each.
    """
    missing = []
    for layout in layouts:
        parts = layout["tower"].split(".")
        for tower_path in (".".join(parts[depth:]) for depth in range(len(parts) + 1)):
            try:
                tower = model.get_submodule(tower_path)
                for path in (layout["insert"], layout["strip"], *layout["attentions"], *layout["down"].values()):
                    tower.get_submodule(path)
            except AttributeError as error:
                missing.append(f"{tower_path or type(model).__name__}: {error}")
                continue
            return tower, layout
    raise ValueError(
        "regsurgery: the checkpoint does not know this library version's module layout: " + "; ".join(missing)
    )


def register_start(surgery: Mapping[str, Any]) -> int | None:
    """The index of the first register among the tokens; None if registers are at the end."""
    return int(surgery["num_prefix"]) if surgery["placement"] == "prefix" else None


def operate(model: nn.Module, surgery: Mapping[str, Any], *, keep_registers: bool = False) -> nn.Module:
    """Turn a stock model into its patched module form, in place.

    Args:
        model: stock model, freshly built or loaded; its weights are not read.
        surgery: the `regsurgery` block of the checkpoint's config.
        keep_registers: leave the registers at the end of the token outputs; only for a model that is just the tower,
            since a head over all tokens would take them for patches.

    Returns:
        `model`, whose tower has a new parameter, zero until loaded: `register_tokens` (see also
        `OTHER_REGISTER_TOKENS`) `[1, R, D]`, or in mode `bias`
        `attention_constants` `[L, D]`. If the `regsurgery` block has `num_patches`, the number of registers follows the
        image size, see `registers_for`; R is the number for `num_patches` patches.
    """
    num_registers, num_prefix = int(surgery["num_registers"]), int(surgery["num_prefix"])
    count = RegisterCount(num_registers, surgery.get("num_patches"), num_prefix)  # older folders lack the key
    tower, layout = resolve_layout(model, surgery["layouts"])
    object.__setattr__(tower, RECORD, surgery)
    if keep_registers and tower is not model:
        raise ValueError(
            "keep_registers=True needs the vision tower alone, without the head around it; load it with AutoModel"
        )
    scale = [float(factor) for factor in surgery["scale"]][: None if count.chosen_for is None else 1]
    names = ("placement", "fill", "prefix", "compat")
    shift = shift_arguments(num_prefix, scale, **{name: surgery[name] for name in names})
    for block, neurons in surgery["register_neurons"].items():
        step = _Shift(neurons, {**shift, "in_place": block in surgery["in_place_blocks"]}, count)
        _shift_hidden(tower, layout["down"][block], layout["attentions"][int(block)], step)
    like = next(tower.get_submodule(layout["strip"]).parameters())
    start = register_start(surgery)
    if surgery["mode"] == "bias":
        blocks = surgery["constant_blocks"]
        zeros_LD = torch.zeros(len(blocks), int(surgery["width"]), dtype=like.dtype, device=like.device)
        tower.register_parameter(ATTENTION_CONSTANTS, nn.Parameter(zeros_LD))
        one = RegisterCount(1, num_prefix=num_prefix)
        readers = [layout["attentions"][block] for block in blocks]
        _make_room(tower, readers, layout, one, start, strips=False)
        for index, path in enumerate(readers):
            _graft(tower.get_submodule(path), _AttendsToConstant, _added=_Constants(tower, index, start))
        _graft(tower, _HoldsParameter, _readers=readers)
        return model
    if num_registers == 0:
        return model
    zeros_1RD = torch.zeros(1, num_registers, int(surgery["width"]), dtype=like.dtype, device=like.device)
    name = surgery.get("register_name", REGISTER_TOKENS)
    tower.register_parameter(name, nn.Parameter(zeros_1RD))
    _graft(tower.get_submodule(layout["insert"]), _InsertsRegisters, _added=_Registers(tower, name, count, start))
    _graft(tower, _HoldsParameter, _readers=[layout["insert"]])
    where: dict[str, Any] = {"_count": count, "_start": start}
    if not keep_registers:
        _graft(tower.get_submodule(layout["strip"]), _StripsRegisters, **where)
        for collector in _collectors(model, tower, layout):
            _graft(collector, _StripsHiddenStates, _start=start)
    _make_room(tower, layout["attentions"], layout, count, start, strips=True)
    return model


def _collectors(model: nn.Module, tower: nn.Module, layout: Mapping[str, Any]) -> list[nn.Module]:
    """The modules that may return the tower's hidden states: in it, and around it if a model takes only images."""
    if not layout["collectors"]:
        return []
    around = [
        module
        for module in model.modules()
        if module is not tower
        and any(inner is tower for inner in module.modules())
        and "pixel_values" in (parameters := inspect.signature(module.forward).parameters)
        and "input_ids" not in parameters
    ]
    return [*(tower.get_submodule(path) for path in layout["collectors"]), *around]


def _make_room(
    tower: nn.Module,
    attentions: Sequence[str],
    layout: Mapping[str, Any],
    count: RegisterCount,
    start: int | None,
    *,
    strips: bool,
) -> None:
    """Make attention that uses positions, or biases over pairs of tokens, accept more tokens.

    A bias is either made inside the attention or given to it.

    Args:
        strips: cut the further tokens off the attention maps that it returns.
    """
    where: dict[str, Any] = {"_count": count, "_start": start}
    everywhere = layout["attentions"]
    given = [path for path in layout["biases"] if not any(_inside(path, each) for each in everywhere)]
    for attention in attentions:
        module = tower.get_submodule(attention)
        if start is not None and hasattr(module, "num_prefix_tokens"):  # timm's attention with rotary positions
            module.num_prefix_tokens += count.num_registers  # type: ignore[operator]  # it is fixed inside the prefix
        for path in layout["biases"]:
            if _inside(path, attention):
                maker = tower.get_submodule(path)
                maker = getattr(maker, "rel_pos", maker)
                own = hasattr(maker, "_get_rel_pos_bias") or hasattr(maker, "get_bias")
                _graft(maker, _PadsOwnBias if own else _PadsBias, **where)
        names = list(inspect.signature(module.forward).parameters)
        masks = [at for at, name in enumerate(names) if "mask" in name]
        _graft(module, _TakesMoreTokens, **where, _mask_at=masks, _biased=bool(given), _strips=strips)


def _inside(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")
