"""Add one constant row to the input of every attention: its key and value are mode `bias`'s constants for each head."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from regsurgery.compiler.graph import ancestor_sets, find_node, is_ancestor, set_parameter
from regsurgery.compiler.passes.plan import INSERTED, REGION_END, PassResult, Plan
from regsurgery.errors import UnsupportedModelError
from regsurgery.runtime.surgery import insert_constant


def insert_constants(graph_module: fx.GraphModule, plan: Plan) -> PassResult:
    """Add the parameter `plan.constants_name` `[L, D]` (zero) and concatenate one row to each attention's input.

    Raises:
        UnsupportedModelError: an attention whose projections do not all read the same tokens.
    """
    if not plan.constant_blocks:
        return PassResult((), "")
    graph, start = graph_module.graph, plan.sites.register_start
    real = next(graph_module.parameters())
    zeros_LD = torch.zeros(len(plan.constant_blocks), plan.sites.width, dtype=real.dtype, device=real.device)
    set_parameter(graph_module, plan.constants_name, nn.Parameter(zeros_LD))
    constants = next(iter(graph.find_nodes(op="placeholder"))).meta["val"].fake_mode.from_tensor(zeros_LD)
    masks = ancestor_sets(graph)
    joined_values: dict[str, Tensor] = {}  # blocks mostly read one shape, and symbolic shapes take long
    inserted = []
    for index, block in enumerate(plan.constant_blocks):
        site = plan.sites.blocks[block]
        if not site.attention_input:
            raise UnsupportedModelError(
                f"mode bias: the projections of block {block}'s attention read different tokens; use mode shift"
            )
        tokens, end = find_node(graph_module, site.attention_input), find_node(graph_module, site.attention_output)
        value = tokens.meta["val"]
        with graph.inserting_after(tokens):
            parameter = graph.get_attr(plan.constants_name)
        with graph.inserting_after(parameter):
            joined = graph.call_function(insert_constant, (tokens, parameter, index, start))
        for user in list(tokens.users):
            if user is not joined and is_ancestor(masks, user, end):
                user.replace_input_with(tokens, joined)
        for node in (parameter, joined):
            node.meta["nn_module_stack"] = tokens.meta.get("nn_module_stack", {})
            node.meta[INSERTED] = "insert_constants"
        joined.meta[REGION_END] = end.name
        parameter.meta["val"] = constants
        shape = f"{value.shape} {value.dtype}"  # a symbolic size has no hash
        if shape not in joined_values:
            with value.fake_mode:
                joined_values[shape] = insert_constant(value, constants, index, start)
        joined.meta["val"] = joined_values[shape]
        inserted.append(joined.name)
    return PassResult(tuple(inserted), "a constant in every attention")
