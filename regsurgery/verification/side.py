"""The two sides of a comparison: graphs, and the places of their tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from regsurgery.compiler.located import Located
from regsurgery.compiler.mlp import mlp_of
from regsurgery.compiler.passes.pipeline import apply_passes
from regsurgery.compiler.passes.plan import plan_surgery
from regsurgery.compiler.sites import Sites
from regsurgery.compiler.surgery import Surgery
from regsurgery.compiler.trace import Traced
from regsurgery.frontends.loaded import Loaded
from regsurgery.recipe import Recipe


@dataclass(frozen=True)
class Side:
    """One of the two models: its graph, and the places of its tokens.

    Attributes:
        loaded: what the graph was traced from; it knows how to call it.
        detectors: linear nodes and the unit of each that is native mode's detector of registers.
    """

    loaded: Loaded
    graph_module: fx.GraphModule
    sites: Sites
    patches: slice
    registers: slice
    detectors: tuple[tuple[str, int], ...] = ()


def original_side(located: Located) -> Side:
    """The original: its patches, and no registers."""
    sites = located.sites
    return Side(located.loaded, located.traced.graph_module, sites, sites.patches, slice(0, 0))


def sides(surgery: Surgery) -> tuple[Side, Side]:
    """Original and patched model of a surgery."""
    sites, traced, loaded = surgery.sites, surgery.traced, surgery.loaded
    original = original_side(surgery.located)
    found = detectors(traced, sites, surgery.recipe) if surgery.recipe.kind.stock else ()
    return original, Side(loaded, surgery.graph_module, sites, *sites.patched(surgery.plan.num_registers), found)


def with_unused_registers(located: Located, num_registers: int) -> fx.GraphModule | None:
    """The original's graph with register tokens appended and no neuron shifted; None without registers."""
    if not num_registers:
        return None
    recipe = Recipe({}, num_registers=num_registers, scale=(1.0,) * num_registers)
    return apply_passes(located.traced, plan_surgery(located.sites, recipe))[0]


def detectors(traced: Traced, sites: Sites, recipe: Recipe) -> tuple[tuple[str, int], ...]:
    """The detector of every block: all its register neurons share it, except for the slope."""
    found = []
    for block, neurons in recipe.register_neurons.items():
        gate = mlp_of(traced, sites.blocks[block]).gate
        found.append((gate.node, gate.offset + neurons[0]))
    return tuple(found)
