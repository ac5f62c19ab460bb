"""Remove the registers on every edge that leaves the region, so that all outputs have the original's shapes."""

from __future__ import annotations

from torch import fx
from torch._subclasses import FakeTensor

from regsurgery.compiler.graph import hint
from regsurgery.compiler.passes.plan import INSERTED, ORIGINAL_SHAPE, PassResult, Plan, register_region
from regsurgery.runtime import surgery


def strip_registers(graph_module: fx.GraphModule, plan: Plan) -> PassResult:
    """Insert `runtime.surgery.strip_registers` on every edge from a node with registers to one outside the region."""
    region, start = register_region(graph_module, plan), plan.sites.register_start
    stripped = []
    for node in region:
        leaving = [user for user in node.users if user not in region]
        value = node.meta.get("val")
        if not leaving or not isinstance(value, FakeTensor):
            continue
        old = node.meta[ORIGINAL_SHAPE]
        axes = tuple(axis for axis, size in enumerate(value.shape) if hint(size) != hint(old[axis]))
        if not axes:
            continue
        with graph_module.graph.inserting_after(node):
            strip = graph_module.graph.call_function(surgery.strip_registers, (node, axes, plan.num_added, start))
        for user in leaving:
            user.replace_input_with(node, strip)
        strip.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        strip.meta[INSERTED] = "strip_registers"
        with value.fake_mode:
            strip.meta["val"] = surgery.strip_registers(value, axes, plan.num_added, start)
        stripped.append(strip.name)
    return PassResult(tuple(stripped), "a strip at the exits" if region else "")
