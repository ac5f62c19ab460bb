"""`.onnx`: the patched graph as an ONNX model for onnxruntime; float32, dynamic batch, fixed image size.

Exported without optimisation, so that parameters keep their names and values as initializers (`regsurgery verify` reads
native mode's edited ones there, and users find `register_tokens`); runtimes fold constants when they load the file.
Tools that quantise do not: they look for products with an initializer. So the weights of linears, which the exporter
leaves as `Transpose(NAME)`, are written transposed, as `NAME.T`.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from regsurgery.backends.pt2 import CONFIG_NAME, input_names, lowered, write_config
from regsurgery.errors import UnsupportedModelError, library_fails
from regsurgery.formats import require

if TYPE_CHECKING:
    from regsurgery.compiler.surgery import Surgery
    from regsurgery.formats import Snippets
    from regsurgery.frontends.loaded import Loaded

__all__ = ["CONFIG_NAME"]

aten = torch.ops.aten

PROGRAM_NAME = "model.onnx"
WEIGHTS_NAME = "model.onnx.data"
MAX_ONE_FILE_BYTES = 3 << 29  # protobuf's limit is 2 GiB; beyond this, weights go into a file of their own
BATCH = "batch"
TRANSPOSED = ".T"  # after the name of a parameter that is written transposed

# Times rounding (`measure.PARITY`), so 1e-4 of the largest output in float32. onnxruntime has its own kernels and
# fuses operators: over all models of the tests at most 2e-6 of the largest output, and 1e-6 on the real ViT-Ti (1.7e-5
# of a logit of 17.5). That leaves a factor of 50 for deeper and wider models and for other CPUs; a wrong graph differs
# by orders of magnitude more (the tests check that on planted models).
INEXACT = 10.0

SNIPPET = """\
import numpy as np
import onnxruntime

model = onnxruntime.InferenceSession("{folder}/model.onnx")
{examples}
outputs = model.run(None, {{{feed}}})  # a list: {outputs}
"""
PROVIDERS = """\
import onnxruntime

providers = onnxruntime.get_available_providers()  # a GPU's first, where onnxruntime was built for it
model = onnxruntime.InferenceSession("{folder}/model.onnx", providers=providers)
"""


def check(loaded: Loaded) -> None:
    """Raise if onnxruntime cannot run a model of this dtype.

    bfloat16 and float64: its CPU provider has no Conv and no matrix product for them. float16: onnxruntime 1.31
    crashes (a segmentation fault) in its default optimisations when it loads such a file.

    Raises:
        UnsupportedModelError: the model is not in float32.
    """
    dtype = next(loaded.model.parameters()).dtype
    if dtype == torch.float32:
        return
    name = str(dtype).removeprefix("torch.")
    reason = "crashes when it loads float16" if dtype == torch.float16 else f"has no Conv for {name} on the CPU"
    raise UnsupportedModelError(
        f"format onnx: {loaded.source.id} is in {name}, and onnxruntime {reason}; save it in float32 first, or "
        "choose another --format"
    )


def emit(surgery: Surgery, folder: Path, target: Path) -> None:
    """Write `model.onnx`, `model.onnx.data` next to it for more than 1.5 GB of weights, and `regsurgery.json`.

    Raises:
        UnsupportedModelError: the exporter cannot translate a node of the graph to ONNX.
    """
    from onnxscript import ir

    traced = surgery.traced
    module, called = with_reshapes(surgery.graph_module), f"format onnx: {surgery.loaded.source.id}"
    model = exported(module, traced.example, input_names(surgery), traced.output_names, called)
    num_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    ir.save(model, folder / PROGRAM_NAME, external_data=WEIGHTS_NAME if num_bytes > MAX_ONE_FILE_BYTES else None)
    write_config(surgery, folder, "onnx")


def snippets(surgery: Surgery, folder: str) -> Snippets:
    inputs = input_names(surgery)
    examples = [
        f"{name} = np.zeros((2, {', '.join(map(str, value.shape[1:]))}), np.{str(value.dtype).removeprefix('torch.')})"
        for name, value in zip(inputs, surgery.traced.example, strict=True)
    ]
    examples[0] += "  # preprocessed photos, as many as you like"
    feed = ", ".join(f'"{name}": {name}' for name in inputs)
    outputs = ", ".join(surgery.traced.output_names)
    filled = SNIPPET.format(folder=folder, examples="\n".join(examples), feed=feed, outputs=outputs)
    return ("onnxruntime alone", filled), ("On any available device", PROVIDERS.format(folder=folder))


def state(folder: Path) -> dict[str, Tensor]:
    """The program's tensors by their names in the graph, and those that are written transposed by their own names."""
    require("onnx")
    from onnxscript import ir

    initializers = ir.load(folder / PROGRAM_NAME).graph.initializers
    arrays = {name: value.const_value.numpy() for name, value in initializers.items() if value.const_value is not None}
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    transposed = {
        name.removesuffix(TRANSPOSED): value.T for name, value in tensors.items() if name.endswith(TRANSPOSED)
    }
    return {**tensors, **transposed}


def reload(folder: Path, config: dict[str, Any], *, trusted: bool = False) -> nn.Module:
    """The program in onnxruntime on the CPU, as a module: positional tensors in, a dict of tensors out."""
    require("onnx")
    return Session(folder / PROGRAM_NAME).eval()


class Session(nn.Module):
    """An onnxruntime session that takes and returns tensors."""

    def __init__(self, path: Path) -> None:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as errors  # type: ignore[attr-defined]

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # only errors; it warns about every initializer that it folds away
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except (errors.NotImplemented, errors.InvalidGraph) as error:
            raise UnsupportedModelError(f"format onnx: onnxruntime cannot run the graph: {_reason(error)}") from error
        except (errors.Fail, errors.InvalidProtobuf, errors.NoSuchFile, errors.RuntimeException) as error:
            raise library_fails("onnxruntime", path, error) from error

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        names = (node.name for node in self.session.get_inputs())
        feed = {name: value.numpy(force=True) for name, value in zip(names, inputs, strict=True)}
        outputs = zip(self.session.get_outputs(), self.session.run(None, feed), strict=True)
        return {node.name: torch.from_numpy(value) for node, value in outputs}


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0].removeprefix("[ONNXRuntimeError] : ")


def exported(
    module: nn.Module, inputs: Sequence[Tensor], input_names: Sequence[str], output_names: Sequence[str], called: str
) -> Any:
    """A module that runs graphs of ours as an `onnxscript.ir.Model`, the same on every machine; its batch is dynamic.

    Args:
        module: returns a dict; its graphs went through `with_reshapes`.
        inputs: an example, of any batch size.
        called: the model, for the message.

    Raises:
        UnsupportedModelError: the exporter cannot translate a node of the graph to ONNX.
    """
    names = list(output_names)
    try:
        # The exporter decomposes attention, and the result has other strides than the fused kernel's output: a view of
        # it that was traced for the kernel fails (BEiT's relative biases). So it is traced with the parts' strides.
        with _quiet(), sdpa_kernel(SDPBackend.MATH):
            program = torch.onnx.export(
                lowered(module, inputs),
                dynamo=True,
                custom_translation_table={aten.index_copy.default: _index_copy},
                optimize=False,
                input_names=list(input_names),
                output_names=names,
            )
    except torch.onnx.OnnxExporterError as error:
        raise UnsupportedModelError(f"{called}: torch cannot export it to ONNX: {_cause(error)}") from error
    assert program is not None
    _name_outputs(program.model.graph, names)
    _transpose_weights(program.model.graph)
    _strip(program.model)
    return program.model


def _index_copy(x: Any, dim: int, index: Any, source: Any) -> Any:
    """Along the last dimension, by element.

    The exporter scatters rows of a transposed tensor: two copies of the whole hidden activation, and in float16
    onnxruntime 1.32 crashes (a segmentation fault in `NchwcTransformer`) where a product follows.
    """
    from onnxscript.onnx_opset import opset18

    op: Any = opset18  # its types are those of constants
    assert dim == -1 or dim == len(x.shape) - 1
    return op.ScatterElements(x, op.Expand(index, op.Shape(source)), source, axis=-1)


def with_reshapes(graph_module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The graph with reshapes in place of views, which the model's own trace made for the fused kernel's strides."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    for node in graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
    return torch.fx.GraphModule(graph_module, graph)


def _name_outputs(graph: Any, names: list[str]) -> None:
    """Give every output its own name: one value may be returned under two names (LLaVA), and a parameter may have the
    name of an output (open_clip's `logit_scale`, which is the exponential of one).
    """
    from onnxscript import ir

    for index, name in enumerate(names):
        value = graph.outputs[index]
        namesake = graph.initializers.get(name)
        if namesake is not None and namesake is not value:
            del graph.initializers[name]
            namesake.name = f"{name}.parameter"
            graph.initializers[namesake.name] = namesake
        if value.name != name:
            node = ir.node("Identity", [value])
            (copy,) = node.outputs
            copy.name, copy.shape, copy.type = name, value.shape, value.type
            graph.append(node)
            graph.outputs[index] = copy


def _transpose_weights(graph: Any) -> None:
    """Write each parameter that only a `Transpose` reads transposed, and drop that node."""
    from onnxscript import ir

    for node in [node for node in graph if node.op_type == "Transpose"]:
        (weight,), (read,) = node.inputs, node.outputs
        if not weight.is_initializer() or weight.const_value is None or read.is_graph_output():
            continue
        name = f"{weight.name}{TRANSPOSED}"
        if name not in graph.initializers:
            array = weight.const_value.numpy().transpose(node.attributes.get_ints("perm"))
            graph.register_initializer(ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name)))
        read.replace_all_uses_with(graph.initializers[name])
        graph.remove(node, safe=True)
        if not weight.uses():
            del graph.initializers[weight.name]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which prints its steps, and warns and logs about things that users cannot change."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _cause(error: BaseException) -> str:
    """The innermost reason in one line, and the node or operator, which an outer message may name."""
    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    texts = [str(link) for link in chain]
    reason = next((text.strip() for text in reversed(texts) if text.strip()), type(error).__name__).splitlines()[0]
    node = re.search(r"%(\w+) [^\n]*?target=([\w.]+)", "\n".join(texts))
    return reason if node is None else f"{reason} (node '{node[1]}', {node[2].removeprefix('torch.ops.')})"


def _strip(model: Any) -> None:
    """Remove what differs between machines or runs, and name the batch size.

    The exporter records stack traces with paths at every node, and names dynamic sizes like `s77`.
    """
    from onnxscript import ir

    graph = model.graph
    model.metadata_props.clear()
    graph.metadata_props.clear()
    nodes = list(ir.traversal.RecursiveGraphIterator(graph))
    for node in nodes:
        node.metadata_props.clear()
        node.doc_string = None
    sizes: dict[str, str] = {}
    for value in graph.inputs:
        for size in value.shape:
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                sizes.setdefault(str(size.value), BATCH if not sizes else f"{BATCH}_{value.name}")
    own = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for value in (*graph.inputs, *graph.initializers.values(), *(out for node in nodes for out in node.outputs)):
        value.metadata_props.clear()
        value.doc_string = None
        if value.shape is None:
            continue
        if id(value) in own:
            value.shape = ir.Shape([_renamed(size, sizes) for size in value.shape])
        elif any(isinstance(size, ir.SymbolicDim) for size in value.shape):
            value.shape = None  # runtimes infer it; the exporter's shape holds its own names of sizes


def _renamed(size: Any, names: dict[str, str]) -> Any:
    if isinstance(size, int):
        return size
    return re.sub(r"\bs\d+\b", lambda found: names.get(found[0], found[0]), str(size))


def foreign_code(folder: Path) -> str | None:
    """Nothing: onnxruntime runs its own operators only."""
    return None
