"""Where the registers go: after the patches, or inside the prefix if attention tells tokens apart by position."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import Tensor, fx

from regsurgery.compiler.passes.insert_registers import insert_registers
from regsurgery.compiler.passes.plan import plan_surgery
from regsurgery.compiler.passes.resize_tokens import PositionError, resize_tokens
from regsurgery.compiler.sites import Sites
from regsurgery.compiler.trace import Traced
from regsurgery.errors import UnsupportedModelError
from regsurgery.families import REGISTER_KEYS
from regsurgery.frontends.loaded import Loaded
from regsurgery.recipe import Recipe

ONE_REGISTER = Recipe({})


def beside_trained(sites: Sites, num_trained: int) -> Sites:
    """`sites`, adapted for a model with trained registers: new ones join them inside the prefix."""
    return replace(sites, placement="prefix") if num_trained and sites.num_prefix else sites


def place(traced: Traced, sites: Sites) -> Sites:
    """`sites` with the placement that the first block's attention requires.

    A register is put after the patches in a copy of the graph, and shapes are propagated through one block. An operator
    that splits the tokens there (rotary positions on the last N tokens, a split into prefix and patches) would take it
    for a patch. Other obstacles are left to the surgery, which names them.
    """
    first_block = replace(sites, last=sites.blocks[0].output)
    graph_module = fx.GraphModule(traced.graph_module, copy.deepcopy(traced.graph_module.graph))
    plan = plan_surgery(first_block, ONE_REGISTER)
    insert_registers(graph_module, plan)
    try:
        resize_tokens(graph_module, plan)
    except PositionError:
        return replace(sites, placement="prefix") if sites.num_prefix else sites
    except UnsupportedModelError:
        pass
    return sites


def trained_registers(loaded: Loaded, sites: Sites) -> int:
    """How many register tokens the model was trained with, from its config or else its attributes; usually 0."""
    vision = getattr(getattr(loaded.model, "config", None), "vision_config", getattr(loaded.model, "config", None))
    for holder in (vision, loaded.model, getattr(loaded.model, "visual", None)):
        for key in REGISTER_KEYS:
            value = getattr(holder, key, None)
            if isinstance(value, int) and 0 < value < sites.num_tokens:
                return value
            if isinstance(value, Tensor) and value.ndim == 3:
                return value.shape[1]
    return 0
