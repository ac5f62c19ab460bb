"""What the passes share: the plan of one surgery, and the region of the graph where tensors hold registers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from regsurgery.graph import ancestor_sets, find_node, is_ancestor
from regsurgery.recipe import Recipe
from regsurgery.sites import Sites

INSERTED = "regsurgery"  # key in node.meta of every node that a pass made; its value is the pass
ORIGINAL_SHAPE = "regsurgery_shape"  # key in node.meta: the shape before the registers, on every node of the region


@dataclass(frozen=True)
class Plan:
    """Sites and recipe, resolved into what the passes need. Made by `plan_surgery`."""

    sites: Sites
    num_registers: int
    register_neurons: Mapping[int, tuple[int, ...]]
    shift: Mapping[str, Any]

    @property
    def register_name(self) -> str:
        return f"{self.sites.tower_path}.register_tokens".lstrip(".")


@dataclass(frozen=True)
class PassResult:
    """What a pass changed (node names), and what was due, in words ("" where nothing was)."""

    changed: tuple[str, ...]
    due: str


def plan_surgery(sites: Sites, recipe: Recipe) -> Plan:
    shift = {
        "num_prefix": sites.num_prefix,
        "scale": list(recipe.scale),
        "fill": recipe.fill,
        "fill_prefix": recipe.prefix == "fill",
        "one_peak": recipe.compat == "reference",
    }
    return Plan(sites, recipe.num_registers, dict(recipe.register_neurons), shift)


def registers_node(graph_module: fx.GraphModule) -> fx.Node | None:
    """The node that `insert_registers` made: the token stream with registers."""
    return next(
        (n for n in graph_module.graph.nodes if n.meta.get(INSERTED) == "insert_registers" and n.op == "call_function"),
        None,
    )


def register_region(graph_module: fx.GraphModule, plan: Plan) -> dict[fx.Node, None]:
    """Descendants of the inserted registers that are ancestors of the last residual add, in graph order."""
    start = registers_node(graph_module)
    if start is None:
        return {}
    masks = ancestor_sets(graph_module.graph)
    last = find_node(graph_module, plan.sites.last)
    return {
        node: None
        for node in graph_module.graph.nodes
        if is_ancestor(masks, start, node) and is_ancestor(masks, node, last)
    }
