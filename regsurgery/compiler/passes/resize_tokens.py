"""Give every node between the registers and the last residual add its true shape.

`torch.export` writes the token count as a literal into views, expands, slices and splits. Shapes are propagated again,
node by node; the token axis of a tensor is the one whose size changed, never one whose size happens to equal the token
count. Biases and masks over pairs of tokens get entries for the registers. If an operator splits the tokens by
position, registers inside the prefix count as prefix; registers at the end would be taken for the patches that they
follow, so that is refused (`PositionError`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from regsurgery.compiler.graph import hint, module_path, shape_of
from regsurgery.compiler.ops import ADDS, DIM_ARGUMENT, EXPANDS, POSITIONAL, RESHAPES, SLICES, aten
from regsurgery.compiler.passes.plan import INSERTED, ORIGINAL_SHAPE, PassResult, Plan, concatenations, register_region
from regsurgery.compiler.passes.reshape_rule import reshaped
from regsurgery.errors import LISTED, UnsupportedModelError
from regsurgery.runtime.surgery import pad_registers


class PositionError(UnsupportedModelError):
    """Tokens are told apart by their position, where registers would be taken for patches."""


Part = tuple[int, int]  # a run of the original's tokens, end excluded


@dataclass(frozen=True)
class _Region:
    """The state that the rules share.

    Attributes:
        before: node -> its value with the original's shape.
        start, num_added: index of the first register (None: at the end), and how many there are.
        parts: node -> which of the original's tokens it has; for a split, one part for each result.
        fake: where shapes are propagated, with an example of the batch: symbolic sizes take most of the time.
        results: what an operator gave, by the operator and `_key` of its arguments: blocks ask the same of the same
            shapes; also example tensors, by size, stride, dtype and device.
    """

    before: dict[fx.Node, Any]
    start: int | None
    num_added: int
    num_tokens: int
    parts: dict[fx.Node, Part | list[Part]] = field(default_factory=dict)
    fake: FakeTensorMode = field(default_factory=FakeTensorMode)
    results: dict[Hashable, Any] = field(default_factory=dict)

    def moved(self, index: int) -> int:
        """A boundary between tokens of the original, in the patched model."""
        return index + self.num_added if self.start is not None and index >= self.start else index

    def part(self, node: fx.Node) -> Part:
        part = self.parts.get(node, (0, self.num_tokens))
        assert isinstance(part, tuple)
        return part


def resize_tokens(graph_module: fx.GraphModule, plan: Plan) -> PassResult:
    """Re-propagate shapes over the region and patch the token counts in it; see the module.

    Raises:
        PositionError: registers at the end would be taken for patches.
        UnsupportedModelError: an operator cannot take the registers.
    """
    nodes = register_region(graph_module, plan)
    starts = concatenations(graph_module)
    if not starts:
        return PassResult((), "")
    region = _Region(
        {node: node.meta.get("val") for node in nodes},
        plan.sites.register_start,
        plan.num_added,
        plan.sites.num_tokens,
    )
    changed: list[str] = []
    for node in nodes:
        if node in starts:
            region.before[node] = node.all_input_nodes[0].meta["val"]
            continue
        _inherit_part(node, region)
        if node.target in RULES:
            RULES[node.target](node, region)
        _propagate(node, region)
        if _token_axes(node, region):
            changed.append(node.name)
    for node in nodes:
        original = region.before[node]
        if isinstance(original, Tensor):
            node.meta[ORIGINAL_SHAPE] = original.shape  # where it differs are the axes that a strip cuts
    return PassResult(tuple(changed), "a new token count")


def _refuse(node: fx.Node, reason: str, error: type[UnsupportedModelError] = UnsupportedModelError) -> NoReturn:
    path = module_path(node)
    where = f" in {path}" if path else ""
    raise error(f"no room for a register: {reason} (node '{node.name}', {node.target}{where}); {LISTED}")


def _propagate(node: fx.Node, region: _Region) -> None:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: _example(source, region))
    key = node.target, _key(args), _key(tuple(kwargs.items()))
    if key not in region.results:
        try:
            with region.fake, torch.no_grad():
                region.results[key] = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, ValueError, IndexError) as error:
            _refuse(node, f"shapes no longer fit ({_rows_for_tokens(node, region) or str(error).splitlines()[0]})")
    node.meta["val"] = region.results[key]
    node.meta.pop("tensor_meta", None)


def _rows_for_tokens(node: fx.Node, region: _Region) -> str | None:
    """What else than tokens an operator is given for each of the tokens, if there is such a thing."""
    for source in node.all_input_nodes:
        if source not in region.before and region.num_tokens in shape_of(source.meta.get("val")):
            return (
                f"'{source.name}' has values for {region.num_tokens} tokens, such as positions, and none for a register"
            )
    return None


def _example(node: fx.Node, region: _Region) -> Any:
    """The value of `node` in `region.fake`."""

    def concrete(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return hint(value) if isinstance(value, torch.SymInt) else value
        sizes, strides = (tuple(map(hint, each)) for each in (value.shape, value.stride()))
        key = sizes, strides, value.dtype, value.device
        if key not in region.results:
            region.results[key] = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
        return region.results[key]

    with region.fake:
        return pytree.tree_map(concrete, node.meta.get("val"))


def _key(value: Any) -> Hashable:
    """All that the shape of an operator's result can depend on."""
    if isinstance(value, Tensor):
        return value.dtype, value.device, *value.shape, *value.stride()
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return type(value), value


def _token_axes(node: fx.Node, region: _Region) -> list[int]:
    """Axes of `node`'s value along which registers were added, merged axes included."""
    if node not in region.before:
        return []
    old, new = shape_of(region.before[node]), shape_of(node.meta.get("val"))
    return [axis for axis, (o, n) in enumerate(zip(old, new, strict=True)) if o != n]


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _patch_reshape(node: fx.Node, region: _Region) -> None:
    source = _source(node)
    if not _token_axes(source, region):
        return
    sizes = node.args[1]
    assert isinstance(sizes, Sequence)
    old_in, new_in = shape_of(region.before[source]), shape_of(source.meta["val"])
    old_out = shape_of(region.before[node])
    new_out = reshaped(old_in, new_in, old_out)
    if new_out is None:
        _refuse(node, f"a view from {list(old_in)} to {list(old_out)} splits the token axis")
    patched = list(sizes)
    for axis, (old, new) in enumerate(zip(old_out, new_out, strict=True)):
        if old == new or sizes[axis] == -1:
            continue
        # A size that is a node is a product of the batch and the old token count; reshape infers it instead.
        patched[axis] = new if isinstance(sizes[axis], int) else -1
    if sum(size == -1 for size in patched if isinstance(size, int)) > 1:
        _refuse(node, "two sizes of a view would have to be inferred")
    if patched == list(sizes):
        return
    node.update_arg(1, patched)


def _patch_expand(node: fx.Node, region: _Region) -> None:
    source = _source(node)
    sizes = node.args[1]
    assert isinstance(sizes, Sequence)
    lead = len(sizes) - len(shape_of(source.meta["val"]))
    patched = list(sizes)
    for axis in _token_axes(source, region):
        if isinstance(sizes[lead + axis], int) and sizes[lead + axis] != -1:
            patched[lead + axis] = shape_of(source.meta["val"])[axis]
    if patched == list(sizes):
        return
    node.update_arg(1, patched)


def _patch_slice(node: fx.Node, region: _Region) -> None:
    source = _source(node)
    axes = _token_axes(source, region)
    old = shape_of(region.before[source]) if source in region.before else shape_of(source.meta["val"])
    axis = _argument(node, 1, 0) % len(old)
    if axis not in axes:
        return
    first, end = _argument(node, 2, None) or 0, _argument(node, 3, None)
    if not isinstance(end, int) or end > hint(source.meta["val"].shape[axis]):
        end = None
    if shape_of(region.before[node])[axis] == old[axis]:
        if end is None:
            return
        node.update_arg(3, torch.iinfo(torch.int64).max)
        return
    _check_positions(node, region, "a slice of the tokens inside a block")
    if _argument(node, 4, 1) != 1 or not isinstance(first, int):
        _refuse(node, "a slice of the tokens with a step")
    begin, stop = region.part(source)
    part = (begin + first % old[axis], stop if end is None else begin + (end + old[axis] if end < 0 else end))
    region.parts[node] = part
    offset = region.moved(begin) if begin else 0
    node.update_arg(2, (region.moved(part[0]) if part[0] else 0) - offset)
    if end is not None:
        node.update_arg(3, region.moved(part[1]) - offset)


def _patch_split(node: fx.Node, region: _Region) -> None:
    source = _source(node)
    old = shape_of(region.before[source]) if source in region.before else ()
    if not old or _argument(node, 2, 0) % len(old) not in _token_axes(source, region):
        return
    _check_positions(node, region, "a split of the tokens inside a block")
    sizes: Any = node.args[1]
    begin = region.part(source)[0]
    parts: list[Part] = []
    for size in sizes:
        parts.append((begin, begin + size))
        begin += size
    region.parts[node] = parts
    patched = [region.moved(stop) - (region.moved(start) if start else 0) for start, stop in parts]
    if patched == list(sizes):
        return
    node.update_arg(1, patched)


def _inherit_part(node: fx.Node, region: _Region) -> None:
    """Which of the tokens a node has: those of its sources; tokens that were split may only meet in a `cat`."""
    parts = set()
    for source in node.all_input_nodes:
        part = region.parts.get(source)
        if isinstance(part, list):
            if node.target is operator.getitem:
                region.parts[node] = part[node.args[1]]  # type: ignore[index]
                return
            _refuse(node, "the parts of a token split are used in an unknown way")
        if part is not None:
            parts.add(part)
        elif _token_axes(source, region):
            parts.add((0, region.num_tokens))
    if len(parts) == 1:
        region.parts[node] = parts.pop()
    elif parts and node.target is not aten.cat.default:
        _refuse(node, "different parts of the tokens are combined")


def _join_parts(node: fx.Node, region: _Region) -> None:
    """A `cat` of parts of the tokens must restore their order."""
    sources: Any = node.args[0]
    rank = len(shape_of(region.before.get(node)))
    dim = _argument(node, 1, 0) % max(rank, 1)
    grown = [source for source in sources if dim in _token_axes(source, region)]
    if not grown:
        return
    _check_positions(node, region, "a concatenation of tokens inside a block")
    begin, stop = region.part(sources[0])[0], region.part(sources[0])[0]
    for source in sources:
        part = region.part(source)
        if part[0] != stop:
            _refuse(node, "tokens inside a block are reordered")
        stop = part[1]
    region.parts[node] = (begin, stop)


def _pad_mask(node: fx.Node, region: _Region) -> None:
    """An attention mask or bias that does not include the registers."""
    mask = _argument(node, 3, node.kwargs.get("attn_mask"))
    query, key = node.args[0], node.args[1]
    if not isinstance(mask, fx.Node) or mask in region.before:
        return
    rank = len(shape_of(mask.meta["val"]))
    grown = [
        axis
        for axis, source in ((-2, query), (-1, key))
        if len(shape_of(source.meta["val"])) - 2 in _token_axes(source, region)  # type: ignore[arg-type,union-attr]
    ]
    _pad(node, mask, [axis + rank for axis in grown], region)


def _pad_bias(node: fx.Node, region: _Region) -> None:
    """A bias from outside that is added to attention scores."""
    left, right = node.args[0], node.args[1]
    for tokens, bias in ((left, right), (right, left)):
        if isinstance(tokens, fx.Node) and isinstance(bias, fx.Node) and bias not in region.before:
            shift = len(shape_of(tokens.meta["val"])) - len(shape_of(bias.meta["val"]))
            axes = [axis - shift for axis in _token_axes(tokens, region) if axis >= shift]
            _pad(node, bias, axes, region)
            return


def _pad(node: fx.Node, bias: fx.Node, axes: list[int], region: _Region) -> None:
    """Pad `bias` along those of `axes` on which it is not constant."""
    value = bias.meta["val"]
    if region.parts.get(node) not in (None, (0, region.num_tokens)):
        return
    axes = [axis for axis in axes if shape_of(value)[axis] == region.num_tokens]
    if not axes:
        return
    with node.graph.inserting_before(node):
        padded = node.graph.call_function(pad_registers, (bias, axes, region.num_added, region.start))
    node.replace_input_with(bias, padded)
    padded.meta["nn_module_stack"] = bias.meta.get("nn_module_stack", {})
    padded.meta[INSERTED] = "resize_tokens"
    with value.fake_mode:
        padded.meta["val"] = pad_registers(value, axes, region.num_added, region.start)


def _check_positions(node: fx.Node, region: _Region, what: str) -> None:
    """Where tokens are told apart, only a non-empty prefix can take registers."""
    if not region.start:
        _refuse(node, f"{what} tells them apart by their position", PositionError)


def _refuse_positional(node: fx.Node, region: _Region) -> None:
    for source in node.all_input_nodes:
        axes = _token_axes(source, region)
        if not axes:
            continue
        rank = len(shape_of(source.meta["val"]))
        if node.target in DIM_ARGUMENT:
            if _argument(node, DIM_ARGUMENT[node.target], 0) % rank not in axes:
                continue
        elif node.target is aten.index.Tensor:
            indices = node.args[1]
            assert isinstance(indices, Sequence)
            if not any(axis < len(indices) and indices[axis] is not None for axis in axes):
                continue
        _refuse(node, "an operator inside a block tells tokens apart by their position", PositionError)


def _argument(node: fx.Node, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else default


Rule = Callable[[fx.Node, _Region], None]
# What to do with a node of the region, by its operator; all other operators take the longer tensors unchanged.
RULES: dict[Any, Rule] = {
    **dict.fromkeys(RESHAPES, _patch_reshape),
    **dict.fromkeys(EXPANDS, _patch_expand),
    **dict.fromkeys(SLICES, _patch_slice),
    aten.split_with_sizes.default: _patch_split,
    aten.cat.default: _join_parts,
    aten.scaled_dot_product_attention.default: _pad_mask,
    **dict.fromkeys(ADDS, _pad_bias),
    **dict.fromkeys(POSITIONAL, _refuse_positional),
}
