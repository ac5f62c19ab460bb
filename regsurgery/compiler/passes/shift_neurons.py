"""One fused node after each target MLP activation, on the input of the down projection."""

from __future__ import annotations

import torch
from torch import fx

from regsurgery.compiler.graph import find_node
from regsurgery.compiler.passes.plan import INSERTED, PassResult, Plan
from regsurgery.runtime.surgery import neuron_shift


def shift_neurons(graph_module: fx.GraphModule, plan: Plan) -> PassResult:
    """Insert `runtime.surgery.neuron_shift` before the down projection of every block that has register neurons.

    It works in place if the activation is fresh, has one consumer and is not a view. The node stays one call of a
    Python function; the `.pt2` back end lowers it to ATen.
    """
    graph = graph_module.graph
    shifted = []
    for block, neurons in plan.register_neurons.items():
        site = plan.sites.blocks[block]
        hidden, down = find_node(graph_module, site.hidden), find_node(graph_module, site.down)
        weight = down.args[1]
        assert isinstance(weight, fx.Node)
        index_K = torch.tensor(neurons, device=graph_module.get_parameter(str(weight.target)).device)
        name = f"register_neurons_{block}"
        graph_module.register_buffer(name, index_K)
        with graph.inserting_before(down):
            index = graph.get_attr(name)
            shift = graph.call_function(neuron_shift, (hidden, index), {**plan.shift, "in_place": site.in_place})
        down.replace_input_with(hidden, shift)
        fake = hidden.meta["val"].fake_mode
        with fake:
            index.meta["val"] = fake.from_tensor(index_K)
        shift.meta["val"] = hidden.meta["val"]
        for node in (index, shift):
            node.meta["nn_module_stack"] = down.meta.get("nn_module_stack", {})
            node.meta[INSERTED] = "shift_neurons"
        shifted.append(shift.name)
    return PassResult(tuple(shifted), "a neuron shift" if plan.register_neurons else "")
