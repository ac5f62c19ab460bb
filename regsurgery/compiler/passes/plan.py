"""Shared by the passes: the plan of one surgery, and the region of the graph where tensors hold registers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from regsurgery.compiler.graph import ancestor_sets, find_node, is_ancestor
from regsurgery.compiler.sites import Sites
from regsurgery.recipe import Recipe
from regsurgery.runtime.surgery import ATTENTION_CONSTANTS, registers_for, shift_arguments

INSERTED = "regsurgery"  # key in node.meta of every node that a pass made; its value is the pass
REGION_END = "regsurgery_end"  # key in node.meta of a concatenation: the last node before which it is stripped again
ORIGINAL_SHAPE = "regsurgery_shape"  # key in node.meta: the shape before the registers, on every node of the region


@dataclass(frozen=True)
class Plan:
    """Sites and recipe, resolved into what the passes need. Made by `plan_surgery`.

    Attributes:
        num_registers: register tokens on the stream, at the size of the trace; none in mode `bias`.
        constant_blocks: blocks whose attention gets a constant (mode `bias`).
    """

    sites: Sites
    num_registers: int
    register_neurons: Mapping[int, tuple[int, ...]]
    shift: Mapping[str, Any]
    constant_blocks: tuple[int, ...] = ()

    @property
    def num_added(self) -> int:
        """Rows that a concatenation adds."""
        return self.num_registers or len(self.constant_blocks[:1])

    @property
    def register_name(self) -> str:
        return f"{self.sites.tower_path}.{self.sites.register_name}".lstrip(".")

    @property
    def constants_name(self) -> str:
        return f"{self.sites.tower_path}.{ATTENTION_CONSTANTS}".lstrip(".")


@dataclass(frozen=True)
class PassResult:
    """What a pass changed (node names), and a description of what was due ("" if nothing was)."""

    changed: tuple[str, ...]
    due: str


def follows_size(sites: Sites, recipe: Recipe) -> int | None:
    """The number of patches for which the recipe's registers were chosen, or None if the number is fixed.

    Inside the prefix it is always fixed: attention there counts the prefix tokens only once.
    """
    return recipe.num_patches if sites.placement == "end" else None


def plan_surgery(sites: Sites, recipe: Recipe) -> Plan:
    """The plan of `recipe` at `sites`, with the number of registers for the traced image size."""
    bias = recipe.kind.constants
    num_patches = follows_size(sites, recipe)
    num_registers = registers_for(sites.num_tokens - sites.num_prefix, recipe.num_registers, num_patches)
    scale = list(recipe.scale) if num_patches is None else [recipe.scale[0]] * num_registers
    shift = shift_arguments(
        sites.num_prefix, [] if bias else scale, sites.placement, recipe.fill, recipe.prefix, recipe.compat
    )
    if bias:
        blocks = tuple(range(constant_start(recipe), len(sites.blocks)))
        return Plan(sites, 0, dict(recipe.register_neurons), shift, blocks)
    return Plan(sites, num_registers, dict(recipe.register_neurons), shift)


def constant_start(recipe: Recipe) -> int:
    """The first block whose attention gets a constant in mode `bias`: the first to see a filled register."""
    return min(recipe.register_neurons) + 1


def concatenations(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The nodes that add rows to a tensor: registers on the stream, constants in attentions."""
    return [node for node in graph_module.graph.nodes if REGION_END in node.meta]


def register_region(graph_module: fx.GraphModule, plan: Plan) -> dict[fx.Node, None]:
    """Descendants of each concatenation that are ancestors of its end (the last residual add), in graph order."""
    starts = concatenations(graph_module)
    if not starts:
        return {}
    masks = ancestor_sets(graph_module.graph)
    ends = [find_node(graph_module, start.meta[REGION_END]) for start in starts]
    return {
        node: None
        for node in graph_module.graph.nodes
        if any(
            is_ancestor(masks, start, node) and is_ancestor(masks, node, end)
            for start, end in zip(starts, ends, strict=True)
        )
    }
