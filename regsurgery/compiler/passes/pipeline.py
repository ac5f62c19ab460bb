"""Graph, sites -> graph: the surgery on the fx graph, one file per pass.

A pass is a function `(graph_module, plan) -> PassResult`. It edits the graph in place and reports what it changed;
changing nothing where something was due is an error. The graph spec (`spec.py`) is checked after every pass.
"""

from __future__ import annotations

import copy

from torch import fx

from regsurgery.compiler.graph import module_path
from regsurgery.compiler.ops import ADDS
from regsurgery.compiler.passes.insert_constants import insert_constants
from regsurgery.compiler.passes.insert_registers import insert_registers
from regsurgery.compiler.passes.plan import PassResult, Plan
from regsurgery.compiler.passes.resize_tokens import resize_tokens
from regsurgery.compiler.passes.shift_neurons import shift_neurons
from regsurgery.compiler.passes.spec import check_spec
from regsurgery.compiler.passes.strip_registers import strip_registers
from regsurgery.compiler.trace import Traced
from regsurgery.errors import PassError
from regsurgery.runtime.surgery import pad_registers

# Registers (or constants) come first, since the regions of longer tensors begin at them. Next, the token counts that
# export wrote as literals into a region, so that every node in it has its true shape. The shift needs those shapes and
# does not change them. Strips come last: they sit on the edges that leave a region, which only then have a value of the
# wrong length.
PIPELINE = (insert_registers, insert_constants, resize_tokens, shift_neurons, strip_registers)

__all__ = ["PIPELINE", "PassResult", "Plan", "apply_passes", "padded_modules"]


def apply_passes(traced: Traced, plan: Plan) -> tuple[fx.GraphModule, tuple[PassResult, ...]]:
    """The patched graph module of `traced`, and what each pass did. Parameters are shared, the graph is a copy.

    The patched module has one more parameter, `plan.register_name` `[1, R, D]`, zero, if the plan has registers.

    Raises:
        UnsupportedModelError: the token axis reaches an operator that cannot take a register.
        PassError: a pass broke the graph spec; a bug.
    """
    patched = fx.GraphModule(traced.graph_module, copy.deepcopy(traced.graph_module.graph))
    results = []
    for step in PIPELINE:
        result = step(patched, plan)
        if result.due and not result.changed:
            raise PassError(f"pass {step.__name__}: changed nothing, but {result.due} was due")
        check_spec(patched, plan, step.__name__, final=step is PIPELINE[-1])
        results.append(result)
    patched.graph.eliminate_dead_code()
    patched.recompile()
    return patched, tuple(results)


def padded_modules(graph_module: fx.GraphModule) -> list[str]:
    """Paths of the modules whose biases or masks `resize_tokens` padded."""
    work = [node.args[0] for node in graph_module.graph.find_nodes(op="call_function", target=pad_registers)]
    paths: dict[str, None] = {}
    for node in work:
        assert isinstance(node, fx.Node)
        if node.target in ADDS:  # the sum of a block's own bias and a shared one
            work.extend(node.all_input_nodes)
        else:
            paths[module_path(node)] = None
    return list(paths)
