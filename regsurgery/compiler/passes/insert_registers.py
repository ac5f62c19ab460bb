"""Put the register tokens into the token stream, before any pre-norm and after the position embedding."""

from __future__ import annotations

import torch
from torch import fx, nn

from regsurgery.compiler.graph import find_node, set_parameter
from regsurgery.compiler.passes.plan import INSERTED, REGION_END, PassResult, Plan
from regsurgery.runtime import surgery


def insert_registers(graph_module: fx.GraphModule, plan: Plan) -> PassResult:
    """Add the parameter `plan.register_name` (zero, no position embedding) and concatenate it."""
    if plan.num_registers == 0:
        return PassResult((), "")
    graph = graph_module.graph
    tokens = find_node(graph_module, plan.sites.tokens)
    value = tokens.meta["val"]
    real = next(graph_module.parameters())
    zeros_1RD = torch.zeros(1, plan.num_registers, plan.sites.width, dtype=value.dtype, device=real.device)
    set_parameter(graph_module, plan.register_name, nn.Parameter(zeros_1RD))
    with graph.inserting_after(tokens):
        parameter = graph.get_attr(plan.register_name)
    with graph.inserting_after(parameter):
        joined = graph.call_function(surgery.insert_registers, (tokens, parameter, plan.sites.register_start))
    tokens.replace_all_uses_with(joined, delete_user_cb=lambda user: user is not joined)
    for node in (parameter, joined):
        node.meta["nn_module_stack"] = tokens.meta.get("nn_module_stack", {})
        node.meta[INSERTED] = "insert_registers"
    joined.meta[REGION_END] = plan.sites.last
    fake = value.fake_mode
    with fake:
        parameter.meta["val"] = fake.from_tensor(zeros_1RD)
        joined.meta["val"] = surgery.insert_registers(value, parameter.meta["val"], plan.sites.register_start)
    return PassResult((joined.name,), "a concatenation of the registers")
