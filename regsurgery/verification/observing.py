"""Observing a model, original or patched: block outputs, MLP neurons, queries, keys, values and attention.

All are read from nodes of the traced graph, batched, on the model's device; there are no hooks, and attention maps are
computed only when asked for.

Shape suffixes: B images, T tokens, N patches, D width, H hidden units, A heads, C channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from regsurgery.compiler.graph import find_node
from regsurgery.compiler.match import ADDS, ATTENTIONS
from regsurgery.compiler.sites import Block
from regsurgery.compiler.taps import tap
from regsurgery.compiler.trace import tensor_inputs
from regsurgery.errors import UnsupportedModelError, UserError
from regsurgery.verification.side import Side

aten = torch.ops.aten
WHAT = ("blocks", "neurons", "queries", "keys", "values", "scores", "attention")


@dataclass(frozen=True)
class Subject:
    """A model as a graph that can be observed.

    Attributes:
        side: its graph, its sites, and the places of patches and registers in its token stream.
        mode: `original`, or the mode in which it was patched.
        image_size: (height, width) in pixels of the images that the graph takes.
        attended_patches, attended_registers: their places among the tokens of an attention; in mode `bias`, whose
            stream has no registers, the constant key counts as one.
        outputs_of: (the graph's outputs, images) -> outputs by the names of the original's; a second forward if a
            stock host of native mode has other outputs.
    """

    side: Side
    mode: str
    image_size: tuple[int, int]
    attended_patches: slice
    attended_registers: slice
    outputs_of: Callable[[Mapping[str, Tensor], Tensor], Mapping[str, Tensor]] = lambda outputs, images: outputs

    @property
    def num_blocks(self) -> int:
        return len(self.side.sites.blocks)

    @property
    def patch_size(self) -> int:
        """The side of a patch in pixels."""
        height, width = self.image_size
        return round(math.sqrt(height * width / (self.side.patches.stop - self.side.patches.start)))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches: patch n is in row n // columns."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def has_class_token(self) -> bool:
        """Whether a token that is not one of our registers precedes the patches; the class token is the first."""
        patches, registers = self.side.patches, self.side.registers
        return patches.start > max(0, min(registers.stop, patches.start) - registers.start)


@dataclass(frozen=True)
class AttentionSite:
    """The nodes of one attention.

    Attributes:
        query, key, value: nodes `[B, A, T, C]`, the key transposed if `transposed`; "" if the graph has none.
        mask: what is added to the scores (or a boolean mask of allowed attention), "" for none.
        scores, weights: nodes before and after the softmax if the graph has it; otherwise both are "" and computed from
            query and key.
    """

    query: str
    key: str
    value: str
    mask: str = ""
    scale: float | None = None
    transposed: bool = False
    scores: str = ""
    weights: str = ""


def attention_site(graph_module: fx.GraphModule, block: Block) -> AttentionSite:
    """The attention of `block`.

    Raises:
        UnsupportedModelError: the graph computes attention in an unknown way.
    """
    node = _first(find_node(graph_module, block.attention_output), ATTENTIONS, lambda node: node.all_input_nodes)
    if node is None:
        raise UnsupportedModelError(f"block {block.index}: no attention above node '{block.attention_output}'")
    if node.target is not aten.scaled_dot_product_attention.default:
        return _eager(node, block)
    given: dict[str, Any] = dict(
        zip(("query", "key", "value", "mask", "dropout_p", "is_causal"), node.args, strict=False)
    )
    given |= {"mask": given.get("mask", node.kwargs.get("attn_mask"))}
    if given.get("is_causal", node.kwargs.get("is_causal", False)) or node.kwargs.get("enable_gqa", False):
        raise UnsupportedModelError(
            f"block {block.index}: its attention is causal or shares keys between heads (node '{node.name}'); its maps "
            "cannot be observed"
        )
    mask = given["mask"]
    return AttentionSite(
        given["query"].name,
        given["key"].name,
        given["value"].name,
        mask.name if isinstance(mask, fx.Node) else "",
        node.kwargs.get("scale"),  # type: ignore[arg-type]
    )


def _first(start: fx.Node, targets: Collection, neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> fx.Node | None:
    """The nearest node with one of `targets`, from `start` on."""
    work, seen = [start], {start}
    for node in work:
        if node.target in targets:
            return node
        fresh = [other for other in neighbours(node) if other not in seen]
        work += fresh
        seen.update(fresh)
    return None


def _eager(softmax: fx.Node, block: Block) -> AttentionSite:
    """The attention around an explicit softmax in the graph."""
    products = (aten.matmul.default, aten.bmm.default)
    scores = product = softmax.all_input_nodes[0]
    through = ADDS | {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.to.dtype}
    while product.target in through:
        product = product.all_input_nodes[0]
    weighted = _first(softmax, products, lambda node: node.users)
    if product.target not in products or weighted is None:
        raise UnsupportedModelError(
            f"block {block.index}: no query, key and value of its attention found around node '{softmax.name}'"
        )
    query, key = product.args[:2]
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(weighted.args[1], fx.Node)
    return AttentionSite(
        query.name, key.name, weighted.args[1].name, transposed=True, scores=scores.name, weights=softmax.name
    )


@dataclass(frozen=True)
class Observation:
    """What was observed for one batch; tensors stay on the model's device.

    Attributes:
        outputs: the model's outputs, by the names of the original's; empty if they were not asked for.
        taps: by "WHAT BLOCK".
    """

    subject: Subject
    outputs: Mapping[str, Tensor]
    taps: Mapping[str, Tensor]
    sites: Mapping[int, AttentionSite]

    def tokens(self, block: int) -> Tensor:
        """The stream after `block`, `[B, T, D]`; for the places of patches and registers see `subject.side`."""
        return self.taps[f"blocks {block}"]

    def patches(self, block: int) -> Tensor:
        """The patches after `block`, `[B, N, D]`."""
        return self.tokens(block)[:, self.subject.side.patches]

    def neurons(self, block: int) -> Tensor:
        """MLP activations as the down projection of `block` reads them (after the shift), `[B, T, H]`."""
        return self.taps[f"neurons {block}"]

    def queries(self, block: int) -> Tensor:
        """Queries by head, `[B, A, T, C]`."""
        return self.taps[f"query {block}"]

    def keys(self, block: int) -> Tensor:
        """Keys by head, `[B, A, T, C]`."""
        key = self.taps[f"key {block}"]
        return key.transpose(-1, -2) if self.sites[block].transposed else key

    def values(self, block: int) -> Tensor:
        """Values by head, `[B, A, T, C]`."""
        return self.taps[f"value {block}"]

    def scores(self, block: int) -> Tensor:
        """Attention before the softmax, scaled, mask added, `[B, A, T, T]`: row query, column key."""
        site = self.sites[block]
        if site.scores:
            return self.taps[f"scores {block}"]
        query, key = self.queries(block), self.keys(block)
        scores = (query * (query.shape[-1] ** -0.5 if site.scale is None else site.scale)) @ key.transpose(-1, -2)
        if not site.mask:
            return scores
        mask = self.taps[f"mask {block}"]
        return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask

    def attention(self, block: int) -> Tensor:
        """Attention after the softmax, float32, `[B, A, T, T]`; rows sum to 1, registers included."""
        if self.sites[block].scores:
            return self.taps[f"weights {block}"].float()
        return self.scores(block).float().softmax(-1)


class Observer:
    """Runs a subject on batches and records what was asked for.

    Args:
        blocks: of which blocks, 0-based; `what`: of `WHAT`.
        outputs: also record the model's outputs; otherwise, only what the taps need is computed.
        streams: further block outputs to record.

    Raises:
        UserError: there is no such block, or no such thing to observe.
        UnsupportedModelError: attention was asked for, and the graph computes it in an unknown way.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        blocks: Iterable[int] = (),
        what: Sequence[str] = (),
        outputs: bool = False,
        streams: Sequence[int] = (),
    ) -> None:
        self.subject, self.with_outputs = subject, outputs
        graph_module, sites = subject.side.graph_module, subject.side.sites
        unknown = sorted(set(what) - set(WHAT))
        if unknown:
            raise UserError(f"'{unknown[0]}' cannot be observed; choose from {', '.join(WHAT)}")
        self.blocks = tuple(check_block(subject, block) for block in blocks)
        self.sites: dict[int, AttentionSite] = {}
        nodes = {f"blocks {block}": sites.blocks[block].output for block in streams}
        for block in self.blocks:
            site = sites.blocks[block]
            if "blocks" in what:
                nodes[f"blocks {block}"] = site.output
            if "neurons" in what:
                hidden = find_node(graph_module, site.down).args[0]
                assert isinstance(hidden, fx.Node)
                nodes[f"neurons {block}"] = hidden.name
            if set(what) - {"blocks", "neurons"}:
                found = self.sites[block] = attention_site(graph_module, site)
                for part in ("query", "key", "value", "mask", "scores", "weights"):
                    if name := getattr(found, part):
                        nodes[f"{part} {block}"] = name
        self.tapped = tap(graph_module, nodes, early_exit=not outputs)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Observation:
        """Run on preprocessed images `[B, 3, H, W]`."""
        outputs, taps = self.tapped(*tensor_inputs(self.subject.side.loaded, images))
        named = self.subject.outputs_of(outputs, images) if self.with_outputs else {}
        return Observation(self.subject, named, taps, self.sites)


def check_block(subject: Subject, block: int) -> int:
    """`block`, counted from the end if it is negative.

    Raises:
        UserError: there is no such block.
    """
    if not -subject.num_blocks <= block < subject.num_blocks:
        raise UserError(f"block {block} does not exist: the model has {subject.num_blocks} blocks, counted from 0")
    return block % subject.num_blocks
