"""What must hold for the graph after every pass: the spec of the intermediate form, as code."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from regsurgery.compiler.graph import hint
from regsurgery.compiler.passes.plan import INSERTED, Plan, register_region
from regsurgery.errors import PassError
from regsurgery.runtime.surgery import insert_constant, insert_registers, neuron_shift, pad_registers, strip_registers

CALLABLES = {insert_registers, insert_constant, pad_registers, neuron_shift,
             strip_registers}  # fmt: skip
# What export leaves in the graph for arithmetic on symbolic sizes and for selecting one of several results.
SIZE_ARITHMETIC = {operator.getitem, operator.mul, operator.add, operator.sub, operator.floordiv, operator.mod,
                   operator.eq, operator.ge, operator.le, operator.gt, operator.lt, operator.ne,
                   torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_not}  # fmt: skip


def check_spec(graph_module: fx.GraphModule, plan: Plan, after: str, *, final: bool) -> None:
    """Raise `PassError`, naming the pass, if the graph breaks the spec.

    Always: the graph is well formed; only placeholders, parameters, ATen operators, arithmetic on sizes and the
    inserted functions are in it; every inserted node is used and has a module of origin. From `resize_tokens` on: every
    three-dimensional residual node in the region holds exactly T + R tokens. At the end: edges leave the region only
    through a strip.
    """

    def fail(message: str, node: fx.Node) -> PassError:
        return PassError(f"pass {after} broke the graph: {message} (node '{node.name}')")

    graph_module.graph.lint()
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            if not isinstance(node.target, torch._ops.OpOverload) and node.target not in CALLABLES | SIZE_ARITHMETIC:
                raise fail(f"the unknown function {node.target}", node)
        elif node.op not in ("placeholder", "get_attr", "output"):
            raise fail(f"a node of kind {node.op}", node)
        if INSERTED in node.meta and not node.users:
            raise fail("an inserted node without a user", node)
        if INSERTED in node.meta and "nn_module_stack" not in node.meta:
            raise fail("an inserted node without a module stack", node)
    region = register_region(graph_module, plan)
    if after not in ("insert_registers", "insert_constants"):
        stream = {plan.sites.last, *(block.output for block in plan.sites.blocks)}
        expected = plan.sites.num_tokens + plan.num_registers
        for node in region:
            if node.name in stream and hint(node.meta["val"].shape[1]) != expected:
                raise fail(f"{hint(node.meta['val'].shape[1])} tokens on the stream, expected {expected}", node)
    if final:
        for node in region:
            for user in node.users:
                if user in region or user.meta.get(INSERTED) == "strip_registers":
                    continue
                if isinstance(node.meta.get("val"), Tensor) and user.op == "output":
                    raise fail(f"registers leave the region to '{user.name}' without a strip", node)
        for node in graph_module.graph.nodes:
            if node.op == "placeholder" and not isinstance(node.meta.get("val"), Tensor):
                raise fail("an input that is not a tensor", node)
