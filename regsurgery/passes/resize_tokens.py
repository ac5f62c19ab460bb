"""Give every node between the registers and the last residual add its true shape.

`torch.export` writes the token count as a literal into views, expands and slices. Shapes are propagated anew, node by
node; the token axis of a tensor is where its shape changed, never where a size happens to equal the token count. Only
literals are patched; an operator that would treat a register as the patch that follows the last one is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from regsurgery.errors import UnsupportedModelError
from regsurgery.graph import hint, module_path, shape_of
from regsurgery.passes.plan import ORIGINAL_SHAPE, PassResult, Plan, concatenations, register_region

aten = torch.ops.aten

RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
EXPANDS = {aten.expand.default}
SLICES = {aten.slice.Tensor}
# Operators that tell tokens apart by their position.
POSITIONAL = {aten.select.int, aten.index.Tensor, aten.index_select.default, aten.split.Tensor, aten.chunk.default,
              aten.split_with_sizes.default, aten.unbind.int, aten.flip.default, aten.roll.default, aten.gather.default,
              aten.cat.default, aten.narrow.default, aten.cumsum.default, aten.conv1d.default, aten.conv2d.default,
              aten.convolution.default, aten.unfold.default, aten.avg_pool2d.default, aten.unflatten.int,
              aten.pixel_shuffle.default, aten.constant_pad_nd.default, aten.pad.default}  # fmt: skip
# Which argument of them is the axis.
DIM_ARGUMENT: dict[object, int] = {
    aten.select.int: 1, aten.unflatten.int: 1, aten.unbind.int: 1, aten.narrow.default: 1, aten.index_select.default: 1,
    aten.cat.default: 1, aten.cumsum.default: 1, aten.gather.default: 1,
    aten.split.Tensor: 2, aten.chunk.default: 2, aten.split_with_sizes.default: 2,
}  # fmt: skip


def resize_tokens(graph_module: fx.GraphModule, plan: Plan) -> PassResult:
    """Re-propagate shapes over the region and patch the token counts in it; see the module."""
    region = register_region(graph_module, plan)
    starts = concatenations(graph_module)
    before = {node: node.meta.get("val") for node in region}
    if not starts:
        return PassResult((), "")
    fake = starts[0].meta["val"].fake_mode
    changed = []
    for node in region:
        if node in starts:
            before[node] = node.all_input_nodes[0].meta["val"]
            continue
        if node.target in RESHAPES:
            changed += _patch_reshape(node, before)
        elif node.target in EXPANDS:
            changed += _patch_expand(node, before)
        elif node.target in SLICES:
            changed += _patch_slice(node, before)
        elif node.target in POSITIONAL:
            _refuse_positional(node, before)
        _propagate(node, fake)
    for node in region:
        original = before[node]
        if isinstance(original, Tensor):
            node.meta[ORIGINAL_SHAPE] = original.shape  # where it differs are the axes that a strip cuts
    return PassResult(tuple(changed) or tuple(node.name for node in region), "a new token count")


def _refuse(node: fx.Node, reason: str) -> NoReturn:
    path = module_path(node)
    where = f" in {path}" if path else ""
    raise UnsupportedModelError(f"no room for a register: {reason} (node '{node.name}', {node.target}{where})")


def _propagate(node: fx.Node, fake: Any) -> None:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    try:
        with fake, torch.no_grad():
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, ValueError, IndexError) as error:
        _refuse(node, f"shapes do not fit any more ({str(error).splitlines()[0]})")
    node.meta.pop("tensor_meta", None)


def _token_axes(node: fx.Node, before: dict[fx.Node, Any]) -> list[int]:
    """Axes of `node`'s value along which registers were added, merged axes included."""
    if node not in before:
        return []
    old, new = shape_of(before[node]), shape_of(node.meta.get("val"))
    return [axis for axis, (o, n) in enumerate(zip(old, new, strict=True)) if o != n]


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


# --- rules ----------------------------------------------------------------------------------------------------------


def _patch_reshape(node: fx.Node, before: dict[fx.Node, Any]) -> list[str]:
    source = _source(node)
    if not _token_axes(source, before):
        return []
    sizes = node.args[1]
    assert isinstance(sizes, Sequence)
    old_in, new_in = shape_of(before[source]), shape_of(source.meta["val"])
    old_out = shape_of(before[node])
    new_out = _reshaped(node, old_in, new_in, old_out)
    patched = list(sizes)
    for axis, (old, new) in enumerate(zip(old_out, new_out, strict=True)):
        if old == new or sizes[axis] == -1:
            continue
        # A size that is a node is a product of the batch and the old token count; reshape infers it instead.
        patched[axis] = new if isinstance(sizes[axis], int) else -1
    if sum(size == -1 for size in patched if isinstance(size, int)) > 1:
        _refuse(node, "two sizes of a view would have to be inferred")
    if patched == list(sizes):
        return []
    node.update_arg(1, patched)
    return [node.name]


def _reshaped(
    node: fx.Node, old_in: tuple[int, ...], new_in: tuple[int, ...], old_out: tuple[int, ...]
) -> tuple[int, ...]:
    """The output shape for `new_in`, where `old_in` gave `old_out`: axes are matched in groups of equal volume."""
    new_out = list(old_out)
    for axes_in, axes_out in _groups(old_in, old_out):
        grown = [axis for axis in axes_in if old_in[axis] != new_in[axis]]
        if not grown:
            continue
        old_volume, new_volume = _volume(old_in, axes_in), _volume(new_in, axes_in)
        candidates = [axis for axis in axes_out if old_out[axis] * new_volume % old_volume == 0 and old_out[axis] > 1]
        if len(axes_in) > 1 and len(axes_out) > 1:  # e.g. [B, T] -> [B, T]: the axis of the same rank in the group
            candidates = [axis for axis in candidates if old_out[axis] == old_in[grown[0]]]
        if len(candidates) != 1:
            _refuse(node, f"a view from {list(old_in)} to {list(old_out)} takes the token axis apart")
        new_out[candidates[0]] = old_out[candidates[0]] * new_volume // old_volume
    return tuple(new_out)


def _volume(shape: tuple[int, ...], axes: list[int]) -> int:
    volume = 1
    for axis in axes:
        volume *= shape[axis]
    return volume


def _groups(left: tuple[int, ...], right: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The finest pairing of consecutive axes of `left` and `right` with equal volumes."""
    groups = []
    i = j = 0
    while i < len(left) or j < len(right):
        axes_left, axes_right = [], []
        if i < len(left):
            axes_left, i = [i], i + 1
        if j < len(right):
            axes_right, j = [j], j + 1
        while (a := _volume(left, axes_left)) != (b := _volume(right, axes_right)):
            if a < b:
                axes_left, i = [*axes_left, i], i + 1
            else:
                axes_right, j = [*axes_right, j], j + 1
        groups.append((axes_left, axes_right))
    return groups


def _patch_expand(node: fx.Node, before: dict[fx.Node, Any]) -> list[str]:
    source = _source(node)
    sizes = node.args[1]
    assert isinstance(sizes, Sequence)
    lead = len(sizes) - len(shape_of(source.meta["val"]))
    patched = list(sizes)
    for axis in _token_axes(source, before):
        if isinstance(sizes[lead + axis], int) and sizes[lead + axis] != -1:
            patched[lead + axis] = shape_of(source.meta["val"])[axis]
    if patched == list(sizes):
        return []
    node.update_arg(1, patched)
    return [node.name]


def _patch_slice(node: fx.Node, before: dict[fx.Node, Any]) -> list[str]:
    source = _source(node)
    axes = _token_axes(source, before)
    dim = node.args[1] if len(node.args) > 1 else 0
    assert isinstance(dim, int)
    old = shape_of(before[source]) if source in before else shape_of(source.meta["val"])
    axis = dim % len(old)
    if axis not in axes:
        return []
    if shape_of(before[node])[axis] != old[axis]:
        _refuse(node, "a slice of the tokens inside a block tells them apart by their position")
    end = node.args[3] if len(node.args) > 3 else None
    if end is None or (isinstance(end, int) and end > hint(source.meta["val"].shape[axis])):
        return []
    node.update_arg(3, torch.iinfo(torch.int64).max)
    return [node.name]


def _refuse_positional(node: fx.Node, before: dict[fx.Node, Any]) -> None:
    for source in node.all_input_nodes:
        axes = _token_axes(source, before)
        if not axes:
            continue
        rank = len(shape_of(source.meta["val"]))
        if node.target in DIM_ARGUMENT:
            position = DIM_ARGUMENT[node.target]
            dim = node.args[position] if len(node.args) > position else 0
            assert isinstance(dim, int)
            if dim % rank not in axes:
                continue
        elif node.target is aten.index.Tensor:
            indices = node.args[1]
            assert isinstance(indices, Sequence)
            if not any(axis < len(indices) and indices[axis] is not None for axis in axes):
                continue
        _refuse(node, "an operator inside a block tells tokens apart by their position")
