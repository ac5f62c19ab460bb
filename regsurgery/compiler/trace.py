"""`Loaded` -> `Traced`: non-strict `torch.export`, brought to one plain form for every library.

The plain form: positional tensor placeholders, an output node that is a dict of named tensors, parameters by their
names in the model. Everything after this step works on it, independent of the library. Weights are not read: the model
is traced with parameters that have only shapes.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._dynamo.exc import UserError
from torch.fx import config as fx_config
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from regsurgery.checkpoints.limits import BROKEN
from regsurgery.checkpoints.stored import as_shapes, fill_shapes
from regsurgery.compiler.comparison import has_classes
from regsurgery.compiler.graph import drop_unused, is_fixed
from regsurgery.errors import UnsupportedModelError
from regsurgery.families import LOGIT_OUTPUTS
from regsurgery.garbage import objects_stay
from regsurgery.settings import replaced

if TYPE_CHECKING:
    from regsurgery.frontends.loaded import Loaded

UNTRACEABLE = (*BROKEN, UserError)  # what torch.export raises, or a model that is given inputs that it does not take
EXAMPLE_BATCH = 11  # not 1, which export would specialise; a prime, so no token count is taken for a batch


@dataclass(frozen=True)
class Traced:
    """A model as an fx graph of ATen operators.

    Attributes:
        graph_module: plain form (see above); shares its parameters with the model.
        image: name of the placeholder that takes the images `[B, C, H, W]`, or videos of them; only B is dynamic.
        image_size: (H, W).
        example: example inputs, one tensor per placeholder.
        output_names: names of the outputs, in order.
    """

    graph_module: fx.GraphModule
    image: str
    image_size: tuple[int, int]
    example: tuple[Tensor, ...]
    output_names: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, int] | None:
        """The output `[B, C]` that is logits of classes, and C; those of MAE, `[B, N, pixels]`, are none."""
        (output,) = self.graph_module.graph.find_nodes(op="output")
        for name in LOGIT_OUTPUTS:
            if name in self.output_names and has_classes(name, value := output.args[0][name].meta["val"]):
                return name, int(value.shape[1])
        return None


def tensor_inputs(loaded: Loaded, images: Tensor) -> list[Tensor]:
    """The positional inputs of a graph traced from `loaded` for `images` `[B, C, H, W]`, on the model's device."""
    images = images.to(next(loaded.model.parameters()).device)
    return [leaf for leaf in pytree.tree_leaves(loaded.inputs(images)) if isinstance(leaf, Tensor)]


def trace(loaded: Loaded, image_size: tuple[int, int] | None = None) -> Traced:
    """Trace `loaded.model` at `image_size` (height, width), by default the size it was made for.

    Raises:
        UnsupportedModelError: torch.export cannot trace the model; the message has its reason.
    """
    height, width = image_size or loaded.image_size
    parameter = next(loaded.model.parameters())
    images = torch.zeros(EXAMPLE_BATCH, loaded.channels, height, width, dtype=parameter.dtype, device=parameter.device)
    args, kwargs = loaded.inputs(images)
    with objects_stay():
        program = exported(loaded, args, kwargs)
    names = _output_names(loaded, program)
    graph_module = _plain(program, names)
    fill_shapes(graph_module, loaded.model)
    leaves = pytree.tree_leaves((args, kwargs))
    example = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    assert len(placeholders) == len(example), "one placeholder for every tensor input"
    fixed = next((node.name for node in placeholders if is_fixed(node.meta["val"].shape[0])), None)
    if fixed is not None:
        raise UnsupportedModelError(
            f"a graph of {_traced_module(loaded)} would take one batch size only: its forward turns that of '{fixed}' "
            "into a number, as len() and int() do"
        )
    image = next(
        node.name
        for node, leaf in zip(placeholders, example, strict=True)
        if leaf is images or leaf._base is images  # a video is a view of its only frame
    )
    return Traced(graph_module, image, (height, width), example, names)


def exported(loaded: Loaded, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    """`loaded.model` as torch.export sees it, its parameters without data, the first axis of all tensors dynamic.

    Raises:
        UnsupportedModelError: torch.export cannot trace the model; the message has its reason.
    """
    dynamic = pytree.tree_map(
        lambda leaf: {0: torch.export.Dim.AUTO} if isinstance(leaf, Tensor) else None, (args, kwargs)
    )
    try:
        with torch.no_grad(), _export_settings(), _entered(loaded), as_shapes(loaded.model) as mode:
            empty_args, empty_kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
            return torch.export.export(
                loaded.model, empty_args, empty_kwargs, dynamic_shapes=_by_signature(*dynamic), strict=False
            )
    except UNTRACEABLE as error:
        raise UnsupportedModelError(f"torch.export cannot trace {_traced_module(loaded)}: {_reason(error)}") from error


def _traced_module(loaded: Loaded) -> str:
    return f"{loaded.architecture}, module {loaded.entry}" if loaded.entry else loaded.architecture


def _reason(error: Exception) -> str:
    """The first line of what torch.export or the model says, without advice to programmers."""
    if isinstance(error, GuardOnDataDependentSymNode):
        return "its forward decides by the values in a tensor, and a graph cannot"
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return line.split(" If this type holds tensors")[0][:300]


@contextlib.contextmanager
def _entered(loaded: Loaded) -> Iterator[None]:
    """Replace the model's forward by that of its entry; parameters and modules keep their names in the whole model."""
    if not loaded.entry:
        yield
        return
    entry = loaded.model.get_submodule(loaded.entry)

    @functools.wraps(entry.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return entry(*args, **kwargs)

    with replaced(loaded.model, "forward", forward):
        yield


def _by_signature(args: tuple, kwargs: dict) -> dict | tuple | list:
    return kwargs if not args else args if not kwargs else (*args, *kwargs.values())


@contextlib.contextmanager
def _export_settings() -> Iterator[None]:
    """Keep transformers from building an all-true `[B, 1, T, T]` mask while exporting; BEiT adds it to its biases.

    Also, record no stack traces for nodes: nobody reads them, and they take a tenth of the time.
    """
    import sys

    masking = sys.modules.get("transformers.masking_utils")
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        stack.enter_context(replaced(fx_config, "do_not_emit_stack_traces", True))
        if masking is not None and hasattr(masking, "is_torchdynamo_exporting"):
            stack.enter_context(replaced(masking, "is_torchdynamo_exporting", lambda: False))
        yield


def _output_names(loaded: Loaded, program: torch.export.ExportedProgram) -> tuple[str, ...]:
    """The outputs' names: the spec of the outputs, filled with leaf numbers, and named as in the library."""
    spec = program.call_spec.out_spec
    assert spec is not None
    numbered = pytree.tree_unflatten([torch.tensor(i) for i in range(spec.num_leaves)], spec)
    by_number = {int(leaf): name for name, leaf in loaded.name_outputs(numbered).items()}
    return tuple(by_number[i] for i in range(spec.num_leaves))


def _plain(program: torch.export.ExportedProgram, output_names: tuple[str, ...]) -> fx.GraphModule:
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    graph = fx.Graph()
    output = graph.graph_copy(module.graph, val_map := {})
    del val_map
    values = pytree.tree_leaves(output)
    graph.output(dict(zip(output_names, values, strict=True)))
    for node in graph.find_nodes(op="placeholder"):
        if not isinstance(node.meta.get("val"), Tensor):
            assert not node.users, f"the input {node.name} is not a tensor and is used"
            graph.erase_node(node)
    drop_unused(graph)  # the blocks after the last one that a head reads
    return fx.GraphModule(module, graph)
