"""`Traced` -> `Sites`: where the registers go in, where the MLP activations are, where the registers come out.

Matching is structural; no family name decides anything. A failed match says why and at which node.

1. A **residual add** adds two tensors of equal shape, exactly one of which is an ancestor of the other (position
   embeddings and rotary embeddings fail that).
2. A **stream** is a chain of residual adds; its first tensor, found by walking back through norm, cast and dropout, is
   the **tokens** node. The vision stream is the one whose tokens come from the image and from no token-id embedding;
   if there are several, the first on the image's way. If several are first, one must be named.
3. An add is an **MLP** add if its branch leads back through dropout, layer scale and norm to a linear (the down
   projection) whose input cone is pointwise, split or norm only, holds a nonlinearity, and ends in linears.
4. **Prefix tokens** are the rows of the tokens node that stay finite when the image is all NaN.
5. **Placement** of the registers: see `placement.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import fx

from regsurgery.compiler.graph import (
    ancestor_sets,
    common_path,
    hint,
    is_ancestor,
    is_fixed,
    module_path,
    symbolic_shape,
)
from regsurgery.compiler.ops import (
    ADDS,
    ALIASES,
    ATTENTIONS,
    CONVOLUTIONS,
    EMBEDDINGS,
    IDENTITIES,
    LINEARS,
    NONLINEAR,
    NORMS,
    POINTWISE,
    PRODUCTS,
    SPLITS,
    aten,
)
from regsurgery.compiler.placement import place
from regsurgery.compiler.sites import Block, Sites
from regsurgery.compiler.taps import tap
from regsurgery.compiler.trace import Traced
from regsurgery.errors import SeveralStreamsError, UnsupportedModelError, several
from regsurgery.frontends.loaded import inside


def match(traced: Traced, tower: str | None = None) -> Sites:
    """Find the sites of `traced`.

    Args:
        tower: path of the module whose stream is meant, where several match.

    Raises:
        SeveralStreamsError: several streams match, and none is named.
        UnsupportedModelError: the model has no such sites; the message gives the reason and the node.
    """
    graph = traced.graph_module.graph
    nodes = {node.name: node for node in graph.nodes}
    ancestors = ancestor_sets(graph)
    stream, tokens = _vision_stream(graph, nodes[traced.image], ancestors, tower)
    shape = symbolic_shape(tokens)
    if len(shape) != 3:
        _no_match(f"the token stream has {len(shape)} dimensions, expected [batch, tokens, width]", tokens)
    if is_fixed(shape[0]):
        if not is_fixed(shape[1]):
            _no_match("its tokens are [tokens, batch, width]; only [batch, tokens, width] is supported", tokens)
        _no_match("all images of a batch are packed into one sequence of tokens", tokens)
    num_tokens, width = int(shape[1]), int(shape[2])
    for add in stream:
        if [hint(n) for n in symbolic_shape(add)][1:] != [num_tokens, width]:
            _no_match(
                f"the stream changes its shape from {shape} to {symbolic_shape(add)}: windowed and hierarchical "
                "models are not supported",
                add,
            )
    blocks = _blocks(stream, tokens, ancestors)
    num_prefix = _count_prefix(traced, tokens)
    convolution = _patch_embedding(nodes[traced.image], tokens, ancestors)
    holder = common_path([module_path(convolution), *(block.path for block in blocks)])
    sites = Sites(
        tokens=tokens.name,
        last=stream[-1].name,
        blocks=tuple(blocks),
        num_prefix=num_prefix,
        num_tokens=num_tokens,
        width=width,
        tower_path=holder,
        insert_path=_insert_path(tokens, blocks[0]),
    )
    return place(traced, sites)


def _no_match(reason: str, node: fx.Node) -> NoReturn:
    path = module_path(node)
    raise UnsupportedModelError(f"no match: {reason} (node '{node.name}'{f' in {path}' if path else ''})")


def _residual_operands(node: fx.Node, masks: dict[fx.Node, int]) -> tuple[fx.Node, fx.Node] | None:
    """(stream, branch) of a residual add, or None if `node` is not one."""
    if node.target not in ADDS or len(node.args) < 2:
        return None
    left, right = node.args[0], node.args[1]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    if not symbolic_shape(left) or symbolic_shape(left) != symbolic_shape(right):
        return None
    left_first, right_first = is_ancestor(masks, left, right), is_ancestor(masks, right, left)
    if left_first == right_first:
        return None
    return (left, right) if left_first else (right, left)


def _back(node: fx.Node, through: set) -> fx.Node:
    while node.target in through:
        node = node.all_input_nodes[0]
    return node


@dataclass(frozen=True)
class _Stream:
    """A chain of residual adds, and the tensor that it begins with; `path` is the module that holds all the adds."""

    root: fx.Node
    adds: list[fx.Node]

    @property
    def path(self) -> str:
        return common_path([module_path(add) for add in self.adds])


def _streams(graph: fx.Graph, masks: dict[fx.Node, int]) -> list[_Stream]:
    root_of: dict[fx.Node, fx.Node] = {}
    streams: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        operands = _residual_operands(node, masks)
        if operands is None:
            continue
        before = _back(operands[0], NORMS | IDENTITIES)
        root = root_of.get(before, before)
        root_of[node] = root
        streams.setdefault(root, []).append(node)
    return [_Stream(root, adds) for root, adds in streams.items()]


def _vision_stream(
    graph: fx.Graph, image: fx.Node, masks: dict[fx.Node, int], tower: str | None
) -> tuple[list[fx.Node], fx.Node]:
    """The stream that the image enters first; a decoder or a pooling head may follow."""
    streams = _streams(graph, masks)
    if not streams:
        raise UnsupportedModelError("no match: the graph has no residual add, so it is not a transformer")
    vision = [
        stream
        for stream in streams
        if is_ancestor(masks, image, stream.root)
        and len(symbolic_shape(stream.root)) >= 3
        and not _reads_token_ids(graph, stream.root, masks)
        and any(_mlp(add, masks) is not None for add in stream.adds)
    ]
    if not vision:
        raise UnsupportedModelError(
            "no match: no residual stream of the graph is fed by the image alone and has an MLP on it, as a vision "
            "transformer's is"
        )
    named = [stream for stream in vision if tower is None or inside(stream.path, tower) or inside(tower, stream.path)]
    if not named:
        paths = ", ".join(sorted(stream.path for stream in vision))
        raise UnsupportedModelError(f"no match: --tower {tower} holds no stream of tokens; there are some in {paths}")
    first = [
        stream
        for stream in named
        if not any(other is not stream and is_ancestor(masks, other.adds[0], stream.root) for other in named)
    ]
    if len(first) > 1:
        raise SeveralStreamsError(several(sorted(stream.path for stream in first)))
    (stream,) = first
    if tower is None:
        for other in vision:
            if other is not stream:
                _check_follower(stream, other, masks)
    return stream.adds, stream.root


def _check_follower(stream: _Stream, other: _Stream, masks: dict[fx.Node, int]) -> None:
    """Refuse a stream that goes on as `other`, with other tokens: a stage of a hierarchical model, or a broken stack.

    A decoder of queries that attend to the stream may follow, and what has one token (a pooling head) or has more.
    """
    if _stack(stream) and _stack(stream) == _stack(other):
        _no_match(
            f"the stream of the blocks in {_stack(stream)} is broken: between them its tokens are changed by something "
            "other than a residual branch",
            other.root,
        )
    if 1 < _num_tokens(other.root) < _num_tokens(stream.root) and _continues(stream, other, masks):
        _no_match("the stream goes on with fewer tokens; hierarchical models are not supported", other.root)


def _stack(stream: _Stream) -> str:
    """The list of modules that the blocks of a stream are in: `encoder.layer` for `encoder.layer.3`."""
    parts = module_path(stream.adds[-1]).split(".")
    at = next((index for index in range(len(parts) - 1, -1, -1) if parts[index].isdecimal()), 0)
    return ".".join(parts[:at])


def _continues(stream: _Stream, other: _Stream, masks: dict[fx.Node, int]) -> bool:
    """Whether the first tokens of `other` are made of those of `stream`, not of queries that attend to them."""
    wanted = set(stream.adds)
    work, seen = [other.root], {other.root}
    for node in work:
        if node in wanted:
            return True
        # Of an attention's operands the first is the query, or the weights that it gave; so are those of its products.
        followed = node.all_input_nodes[:1] if node.target in ATTENTIONS | PRODUCTS else node.all_input_nodes
        fresh = [source for source in followed if source not in seen]
        work += fresh
        seen.update(fresh)
    return False


def _num_tokens(node: fx.Node) -> int:
    return math.prod(map(hint, symbolic_shape(node)[1:-1]))


def _reads_token_ids(graph: fx.Graph, root: fx.Node, masks: dict[fx.Node, int]) -> bool:
    inputs = [node for node in graph.find_nodes(op="placeholder") if not node.meta["val"].is_floating_point()]
    return any(
        node.target in EMBEDDINGS
        and is_ancestor(masks, node, root)
        and any(is_ancestor(masks, source, node.args[1]) for source in inputs)  # type: ignore[arg-type]
        for node in graph.nodes
    )


@dataclass(frozen=True)
class _Mlp:
    down: fx.Node
    hidden: fx.Node
    ups: tuple[fx.Node, ...]


def _mlp(add: fx.Node, masks: dict[fx.Node, int]) -> _Mlp | None:
    """The MLP whose output `add` adds to the stream, or None if its branch is something else (attention)."""
    operands = _residual_operands(add, masks)
    assert operands is not None
    stream, node = operands
    while node.target not in LINEARS:
        sources = [source for source in node.all_input_nodes if is_ancestor(masks, stream, source)]
        scaled = node.target in (aten.mul.Tensor, aten.mul_.Tensor)  # layer scale
        if len(sources) != 1 or not (node.target in NORMS | IDENTITIES or scaled):
            return None
        node = sources[0]
    hidden = node.args[0]
    assert isinstance(hidden, fx.Node)
    ups = _cone(hidden, stream, masks)
    return None if ups is None else _Mlp(node, hidden, ups)


def _cone(hidden: fx.Node, stream: fx.Node, masks: dict[fx.Node, int]) -> tuple[fx.Node, ...] | None:
    """The linears at which the pointwise cone above `hidden` ends; None if it does not belong to an MLP."""
    ends: dict[fx.Node, None] = {}
    nonlinear = False
    seen: set[fx.Node] = set()
    work = [hidden]
    while work:
        node = work.pop()
        if node in seen or not is_ancestor(masks, stream, node):
            continue  # a constant, a parameter
        seen.add(node)
        if node.target in LINEARS:
            ends[node] = None
            continue
        halved = node.target is aten.slice.Tensor and node.args[1] in (-1, len(symbolic_shape(node)) - 1)
        getitem = node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"
        if not (node.target in POINTWISE | SPLITS | NORMS | IDENTITIES or halved or getitem):
            return None
        nonlinear = nonlinear or node.target in NONLINEAR
        work.extend(node.all_input_nodes)
    return tuple(sorted(ends, key=lambda node: masks[node].bit_length())) if nonlinear and ends else None


def _blocks(stream: list[fx.Node], tokens: fx.Node, masks: dict[fx.Node, int]) -> list[Block]:
    mlps = [(position, mlp) for position, add in enumerate(stream) if (mlp := _mlp(add, masks)) is not None]
    blocks = []
    start = 0
    for index, (position, mlp) in enumerate(mlps):
        end = position
        if index == len(mlps) - 1:
            end = len(stream) - 1
        output = stream[end]
        shape = symbolic_shape(mlp.hidden)
        if len(shape) != 3 or hint(shape[1]) != hint(symbolic_shape(tokens)[1]):
            _no_match(
                f"block {index}: the MLP activation is {list(shape)}, expected [batch, tokens, hidden]", mlp.hidden
            )
        found = _attention(stream[start:position], masks)
        if found is None:
            _no_match(
                f"block {index}: no attention adds to the token stream before the MLP; windowed and hierarchical "
                "models are not supported",
                output,
            )
        attention, branch = found
        blocks.append(
            Block(
                index=index,
                hidden=mlp.hidden.name,
                down=mlp.down.name,
                ups=tuple(up.name for up in mlp.ups),
                output=output.name,
                hidden_size=int(shape[2]),
                in_place=_writable(mlp.hidden),
                path=_block_path(output, attention),
                down_path=module_path(mlp.down),
                attention_path=module_path(attention),
                attention_weights=_projections(attention, tokens, masks),
                attention_input=_attention_input(attention, tokens, masks),
                attention_output=branch.name,
            )
        )
        start = position + 1
    return blocks


def _block_path(output: fx.Node, attention: fx.Node) -> str:
    """The module that is the block: what holds its attention and its last residual add, if that is one of a list."""
    path = module_path(output)
    common = common_path([path, module_path(attention)])
    return common if common.rpartition(".")[2].isdecimal() else path


def _writable(hidden: fx.Node) -> bool:
    """Whether `hidden` is a fresh tensor that only the down projection reads."""
    node = hidden
    while len(node.users) == 1 and node.target in ALIASES:
        node = node.all_input_nodes[0]
    return len(node.users) == 1 and node.target in POINTWISE


def _attention(adds: Iterable[fx.Node], masks: dict[fx.Node, int]) -> tuple[fx.Node, fx.Node] | None:
    """The node that computes attention on the branch of one of `adds`, and that branch, or None."""
    for add in adds:
        operands = _residual_operands(add, masks)
        assert operands is not None
        found = next((node for node in _between(*operands, masks) if node.target in ATTENTIONS), None)
        if found is not None:
            return found, operands[1]
    return None


def _attention_input(attention: fx.Node, tokens: fx.Node, masks: dict[fx.Node, int]) -> str:
    """The node that all projections nearest above `attention` read, or "" if they read different tensors."""
    sources = {
        _back(node.all_input_nodes[0], IDENTITIES | {aten.transpose.int, aten.permute.default}).name
        for node in _between(tokens, attention, masks, stop=LINEARS)
        if node.target in LINEARS
    }
    return sources.pop() if len(sources) == 1 else ""


def _projections(attention: fx.Node, tokens: fx.Node, masks: dict[fx.Node, int]) -> tuple[str, ...]:
    """Weights of the linears nearest above `attention`: its query, key and value projections."""
    linears = [node for node in _between(tokens, attention, masks, stop=LINEARS) if node.target in LINEARS]
    weights = [node.args[1] for node in linears]
    return tuple(sorted(str(weight.target) for weight in weights if isinstance(weight, fx.Node)))


def _between(start: fx.Node, end: fx.Node, masks: dict[fx.Node, int], stop: Collection = ()) -> Iterator[fx.Node]:
    """Nodes from `end` back to `start`, breadth first, stopping at nodes whose target is in `stop`."""
    work, seen = [end], {end}
    for node in work:
        yield node
        if node.target in stop:
            continue
        for source in node.all_input_nodes:
            if source not in seen and is_ancestor(masks, start, source):
                seen.add(source)
                work.append(source)


def _insert_path(tokens: fx.Node, first: Block) -> str:
    node = tokens
    while len(node.users) == 1 and next(iter(node.users)).target in IDENTITIES:
        node = next(iter(node.users))
    users = list(node.users)
    if len(users) == 1 and users[0].target in NORMS and not inside(module_path(users[0]), first.path):
        return module_path(users[0])
    return first.path


def _patch_embedding(image: fx.Node, tokens: fx.Node, masks: dict[fx.Node, int]) -> fx.Node:
    """The convolution (or linear) that turns the image into patches."""
    for node in masks:
        if (
            node.target in CONVOLUTIONS | LINEARS
            and is_ancestor(masks, image, node)
            and is_ancestor(masks, node, tokens)
        ):
            return node
    _no_match("no patch embedding between the image and the tokens", tokens)


def _count_prefix(traced: Traced, tokens: fx.Node) -> int:
    """Feed an all-NaN image: the rows of `tokens` that stay finite do not depend on the image."""
    graph_module = traced.graph_module
    nan_image = [
        torch.full_like(value, float("nan")) if node.name == traced.image else value
        for node, value in zip(graph_module.graph.find_nodes(op="placeholder"), traced.example, strict=True)
    ]
    with torch.no_grad():
        value = tap(graph_module, {"tokens": tokens.name}, early_exit=True)(*nan_image)[1]["tokens"]
    finite_T = value[0].isfinite().all(dim=-1)
    num_prefix = int(finite_T.sum())
    if not bool(finite_T[:num_prefix].all()):
        rows = finite_T.nonzero().flatten().tolist()
        _no_match(f"tokens that do not depend on the image come after patches (rows {rows})", tokens)
    if num_prefix == len(finite_T):
        _no_match("the tokens do not depend on the image", tokens)
    return num_prefix
