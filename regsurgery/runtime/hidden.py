"""Where an MLP makes its hidden activation: which module returns it, or else which module's forward makes it.

Checkpoints name only the down projection, so this is found while the model is built: the forward that calls the down
projection is traced with `torch.fx`, its submodules as leaves, which computes nothing and needs no weights.

This file is the first part of `modeling_regsurgery.py` in every patched folder, so it imports torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import fx, nn
from torch.fx.proxy import TraceError

# What tracing raises at a forward that it cannot follow: one that branches on values, or computes sizes in Python.
UNTRACEABLE = (TraceError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError)
PASSING = (nn.Identity, nn.Dropout)  # in eval mode they return their input itself


class HiddenSite(NamedTuple):
    """Where a shift can be put, so that whatever reads the hidden activation reads it shifted.

    Attributes:
        module: returns the hidden activation, or if `inline`, makes it in its own forward.
        inline: name of the down projection in `module`, on whose input the shift is a step of its own; "" if `module`
            returns the activation.
    """

    module: nn.Module
    inline: str = ""


def hidden_site(root: nn.Module, down: str, attention: str) -> HiddenSite | None:
    """The site of the MLP whose down projection is at path `down` in `root`; `attention` is its block's attention.

    Returns:
        None if the forward that calls the down projection cannot be traced; then only its input can be shifted.
    """
    holder, _, name = down.rpartition(".")
    module = root.get_submodule(holder)
    graph = traced(module)
    call = None if graph is None else _only_call(graph, name)
    if call is None:
        return None
    hidden = call.args[0]
    assert isinstance(hidden, fx.Node)
    if hidden.op == "placeholder":  # like BERT's: a module makes it, and another one projects it down
        return _beside(root, holder, down, attention)
    site = _returned_by(module, hidden, root)
    if site is None and _takes_one_tensor(module):
        site = HiddenSite(module, inline=name)
    return site


def traced(module: nn.Module) -> fx.Graph | None:
    """The forward of `module` with its submodules as leaves, or None if it cannot be followed."""
    try:
        return _Leaves().trace(module)
    except UNTRACEABLE:
        return None


def forward_with(module: nn.Module, down: str, step: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward of `module`, for evaluation and for training, with `self.step(...)` on what `self.down` reads."""

    def made(training: bool) -> Callable[..., Any]:
        mode, module.training = module.training, training
        try:
            graph = _Leaves().trace(module)
        finally:
            module.training = mode
        call = _only_call(graph, down)
        assert call is not None
        hidden = call.args[0]
        assert isinstance(hidden, fx.Node)
        with graph.inserting_before(call):
            shifted = graph.create_node("call_module", step, (hidden,))
        call.replace_input_with(hidden, shifted)
        return type(fx.GraphModule(module, graph)).forward

    return made(False), made(True)


class _Leaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _only_call(graph: fx.Graph, path: str) -> fx.Node | None:
    calls = graph.find_nodes(op="call_module", target=path)
    return calls[0] if len(calls) == 1 else None


def _returned_by(module: nn.Module, hidden: fx.Node, root: nn.Module) -> HiddenSite | None:
    """The innermost module that returns `hidden`: the first one, if others only pass it on."""
    found = None
    for node in _chain(module, hidden):
        child = module.get_submodule(str(node.target))
        if _only_call(node.graph, str(node.target)) is None or _is_shared(root, child):
            break
        found = child
    return None if found is None else HiddenSite(found)


def _chain(module: nn.Module, hidden: fx.Node) -> Iterator[fx.Node]:
    """`hidden` and the calls of modules before it, as long as they pass on what only the next one reads."""
    node = hidden
    while node.op == "call_module" and len(node.users) == 1:
        yield node
        before = node.args[0] if node.args else None
        if not isinstance(module.get_submodule(str(node.target)), PASSING) or not isinstance(before, fx.Node):
            return
        node = before


def _is_shared(root: nn.Module, child: nn.Module) -> bool:
    """Whether `child` has several places in `root`: a shift on it would act at all of them."""
    return sum(module is child for _, module in root.named_modules(remove_duplicate=False)) > 1


def _beside(root: nn.Module, holder: str, down: str, attention: str) -> HiddenSite | None:
    """The module next to `holder` that makes what is given to it: the one with a linear to the hidden width."""
    around, _, _ = holder.rpartition(".")
    prefix = f"{around}." if around else ""
    size: Any = root.get_submodule(down).in_features
    makers = [
        child
        for name, child in root.get_submodule(around).named_children()
        if prefix + name != holder
        and not f"{attention}.".startswith(f"{prefix}{name}.")
        and any(isinstance(inner, nn.Linear) and inner.out_features == size for inner in child.modules())
    ]
    if len(makers) != 1:
        return None
    (maker,) = makers
    graph = traced(maker)
    result = None if graph is None else graph.output_node().args[0]
    inner = _returned_by(maker, result, root) if isinstance(result, fx.Node) else None
    return inner or HiddenSite(maker)


def _takes_one_tensor(module: nn.Module) -> bool:
    """Whether nothing but the tokens is given to `module`: what tracing decided about other arguments may not hold."""
    graph = traced(module)
    return graph is not None and len(graph.find_nodes(op="placeholder")) == 1
