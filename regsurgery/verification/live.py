"""Is the surgery still in effect in a model that somebody holds: after an adapter, quantisation, a copy, training?

Nothing of the model's own steps is trusted. What the down projections read, and the stream after the last but one
block, are looked at from outside, while the vision tower runs on images.

Shape suffixes: B batch, T tokens (prefix + patches + registers), N patches, H hidden units, K register neurons of a
block, D width. Blocks and neurons are counted from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regsurgery.compiler.outliers import outliers, token_norms
from regsurgery.errors import UserError
from regsurgery.modes import MODES
from regsurgery.runtime.surgery import RECORD, RegisterCount, register_start, resolve_layout
from regsurgery.verification.measure import MAX_OUTLIERS, PARITY
from regsurgery.verification.patched import existing_folder, folder_format, read_patched_config

FULL = "give the folder that it was loaded from (folder=...)"


@dataclass(frozen=True)
class StillPatched:
    """What `still_patched` saw; it is true if the surgery is in effect.

    Attributes:
        mode: in which the model was patched.
        num_images: how many images were seen.
        blocks: those whose shift was looked for; empty in mode native, whose weights do it.
        silent: those of `blocks` whose register neurons were zero on all tokens, registers, too: these images say
            nothing about them.
        block: after which the stream was looked at: the last but one.
        outliers_per_image: patches above 5 times the median patch norm of their image.
        max_patch_norm: the largest of all images.
        problems: what is not in effect; empty if all is.
    """

    mode: str
    num_images: int
    blocks: tuple[int, ...]
    silent: tuple[int, ...]
    block: int
    outliers_per_image: float
    max_patch_norm: float
    problems: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`: the attributes, and `patched`."""
        return {"patched": bool(self), **asdict(self)}


def still_patched(
    model: nn.Module,
    images: Tensor,
    *,
    folder: str | Path | None = None,
    run: Callable[[Tensor], Any] | None = None,
) -> StillPatched:
    """Whether the surgery is in effect in `model`: a patched model that was wrapped, quantised, copied or trained.

    In modes shift and bias, every down projection of a block with register neurons must read shifted values; in all
    modes, no outlier tokens may be left. Runs the vision tower once, without gradients and in the model's own mode.

    Args:
        model: the model, or what wraps it (peft, `nn.DataParallel`, `torch.compile`, ...).
        images: preprocessed for the model, on its device, `[B, 3, H, W]`.
        folder: the patched folder it was loaded from; by default the record that the model carries is used. With it, a
            stock model is found not to be patched, instead of refused.
        run: runs `model` on `images`; by default the vision tower is called alone, with the images as its argument.

    Raises:
        UserError: the model carries no record of a surgery, or its modules are not those of the record.
    """
    record = _record_of(model) if folder is None else _record_in(existing_folder(folder))
    native = MODES[record["mode"]].stock
    tower, blocks = _native_blocks(model, record) if native else _recorded_blocks(model, record)
    seen = _Seen(record)
    block = max(0, len(blocks.outputs) - 2)
    with seen.hooked(blocks, block), torch.no_grad():
        (run or tower)(images)
    return seen.result(block, len(images))


class _Blocks(NamedTuple):
    """The modules that are looked at.

    Attributes:
        outputs: the blocks, in order; the first tensor that one returns is the stream.
        downs: block -> the down projection whose input is looked at.
    """

    outputs: Sequence[nn.Module]
    downs: Mapping[int, nn.Module]


def _record_of(model: nn.Module) -> dict[str, Any]:
    for module in model.modules():
        record = getattr(module, RECORD, None) or getattr(getattr(module, "config", None), "regsurgery", None)
        if isinstance(record, Mapping):
            return dict(record)
    raise UserError(f"{type(model).__name__}: carries no record of a surgery, so it is not patched, or {FULL}")


def _record_in(folder: Path) -> dict[str, Any]:
    return read_patched_config(folder, folder_format(folder))["regsurgery"]


def _recorded_blocks(model: nn.Module, record: Mapping[str, Any]) -> tuple[nn.Module, _Blocks]:
    """The tower, and its blocks by the paths of the record."""
    for module in model.modules():  # whatever wraps the model is around it
        try:
            tower, layout = resolve_layout(module, record["layouts"])
        except ValueError:
            continue
        depth = layout["strip"].count(".") + 1
        paths = [".".join(path.split(".")[:depth]) for path in layout["attentions"]]
        downs = {int(block): tower.get_submodule(path) for block, path in layout["down"].items()}
        return tower, _Blocks([tower.get_submodule(path) for path in paths], downs)
    raise UserError(f"{type(model).__name__}: its modules are not those of the patched model; give the model itself")


def _native_blocks(model: nn.Module, record: Mapping[str, Any]) -> tuple[nn.Module, _Blocks]:
    """The model, and its longest row of equal blocks: native mode writes vision models alone."""
    rows = [
        [*module]
        for module in model.modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(one) for one in module}) == 1
    ]
    if not rows:
        raise UserError(f"{type(model).__name__}: has no row of blocks, so it is no vision transformer")
    return model, _Blocks(max(rows, key=len), {})


class _Seen:
    """What the hooks saw."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record, self.num_prefix = record, int(record["num_prefix"])
        native = MODES[record["mode"]].stock  # whose hosts have registers inside the prefix
        self.start = self.num_prefix if native else register_start(record)
        self.count = RegisterCount(int(record["num_registers"]), record.get("num_patches"), self.num_prefix)
        self.problems: dict[int, str] = {}
        self.called: dict[int, bool] = {}  # block -> whether a register neuron was not zero
        self.looked_for: tuple[int, ...] = ()
        self.outliers_per_image: list[int] = []
        self.max_patch_norm = 0.0

    @contextmanager
    def hooked(self, blocks: _Blocks, last: int) -> Iterator[None]:
        self.looked_for = tuple(sorted(blocks.downs))
        handles = [blocks.outputs[last].register_forward_hook(self._stream)]
        for block, down in blocks.downs.items():
            handles.append(down.register_forward_pre_hook(partial(self._hidden, block), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def result(self, block: int, num_images: int) -> StillPatched:
        for each in set(self.looked_for) - self.called.keys():
            self.problems[each] = f"block {each}: its down projection was not called, so nothing is known of its shift"
        if not self.outliers_per_image:
            raise UserError(f"block {block} was not called, so its stream is unknown; give run=...")
        each = sum(self.outliers_per_image) / len(self.outliers_per_image)
        problems = [self.problems[number] for number in sorted(self.problems)]
        if each > MAX_OUTLIERS:
            problems.append(f"{each:.2f} outlier tokens per image after block {block}")
        if not math.isfinite(self.max_patch_norm):
            problems.append(f"NaN or infinity after block {block}")
        return StillPatched(
            mode=self.record["mode"],
            num_images=num_images,
            blocks=self.looked_for,
            silent=tuple(number for number, loud in sorted(self.called.items()) if not loud),
            block=block,
            outliers_per_image=each,
            max_patch_norm=self.max_patch_norm,
            problems=tuple(problems),
        )

    def _stream(self, module: nn.Module, args: Any, output: Any) -> None:
        tokens_BTD = output if isinstance(output, Tensor) else output[0]
        patches, _ = self._places(tokens_BTD)
        norms_BN = token_norms(tokens_BTD[:, patches])
        self.outliers_per_image += outliers(norms_BN).sum(dim=1).tolist()
        largest = float(norms_BN.max())
        self.max_patch_norm = max(self.max_patch_norm, largest) if math.isfinite(largest) else largest

    def _hidden(self, block: int, module: Any, args: Any, kwargs: Any) -> None:
        hidden_BTH = args[0] if args else next(iter(kwargs.values()))
        if hasattr(module, "_shift"):  # the one place where the shift is a step of the down projection itself
            hidden_BTH = module._shift(hidden_BTH, in_place=False)
        values_BTK = hidden_BTH[..., self.record["register_neurons"][str(block)]].detach()
        fired = not self.record["num_registers"] or bool(values_BTK.any())  # without registers, zero is all to be seen
        self.called[block] = self.called.get(block, False) or fired
        problem = self._unshifted(values_BTK)
        if problem is not None:
            self.problems[block] = f"block {block}: {problem}"

    def _places(self, tokens: Tensor) -> tuple[slice, slice]:
        """Where patches and registers are among `[B, T, ...]`."""
        num_tokens = tokens.shape[1]
        num_registers = self.count.among(num_tokens)
        if self.start is None:
            end = num_tokens - num_registers
            return slice(self.num_prefix, end), slice(end, num_tokens)
        first = self.start + num_registers
        return slice(first, num_tokens), slice(self.start, first)

    def _unshifted(self, values_BTK: Tensor) -> str | None:
        """What of `values_BTK` is not as a shift leaves it; None if all is."""
        patches, registers = self._places(values_BTK)
        tolerance = PARITY.get(values_BTK.dtype, 0.0)
        values_BTK = values_BTK.double()
        patches_BNK, registers_BRK = values_BTK[:, patches], values_BTK[:, registers]
        size = float(values_BTK.abs().max())
        fill = self.record["fill"]
        kept = {"zero": patches_BNK, "mean": patches_BNK - patches_BNK.mean(dim=1, keepdim=True)}.get(fill)
        left = 0.0 if kept is None else float(kept.abs().max())
        if left > (0.0 if fill == "zero" else tolerance * size):
            return f"its register neurons are up to {left:.3g} on patches, so the shift is not in effect"
        largest_BK = (1 - tolerance) * patches_BNK.abs().amax(dim=1)
        for index, scale in enumerate(self.record["scale"][: registers_BRK.shape[1]]):
            if bool((registers_BRK[:, index].abs() < abs(scale) * largest_BK).any()):
                return f"register {index} does not hold the extremes, so the shift is not in effect"
        return None
