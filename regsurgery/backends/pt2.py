"""`.pt2`: the patched graph as a `torch.export` program, loadable with torch alone; dynamic batch, fixed image size."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regsurgery.backends.modeling import UNKNOWN_CODE
from regsurgery.backends.pt2_archive import foreign_part
from regsurgery.checkpoints.writing import write_json
from regsurgery.compiler.passes.spec import CALLABLES
from regsurgery.compiler.trace import EXAMPLE_BATCH
from regsurgery.errors import CheckpointError, PassError, library_fails
from regsurgery.formats import PROGRAM_CONFIG

if TYPE_CHECKING:
    from regsurgery.compiler.surgery import Surgery
    from regsurgery.formats import Snippets

PROGRAM_NAME = "model.pt2"
CONFIG_NAME = PROGRAM_CONFIG
LOCAL_META = ("from_node", "stack_trace")  # memory addresses and local paths, which differ in every run
SNIPPET = """\
import torch

model = torch.export.load("{folder}/model.pt2").module()
{examples}
outputs = model({inputs})  # a dict: {outputs}
"""
ON_GPU = """\
import torch
from torch.export.passes import move_to_device_pass

device = "cuda" if torch.cuda.is_available() else "cpu"
model = move_to_device_pass(torch.export.load("{folder}/model.pt2"), device).module()
"""


def lower(surgery: Surgery) -> torch.export.ExportedProgram:
    """The patched graph with everything lowered to ATen: the fused nodes are traced through."""
    return lowered(surgery.graph_module, surgery.traced.example)


def lowered(module: nn.Module, inputs: Sequence[Tensor]) -> torch.export.ExportedProgram:
    """A module that runs graphs of ours, with everything lowered to ATen; `inputs`: an example, of any batch size."""
    example = tuple(value[:1].expand(EXAMPLE_BATCH, *value.shape[1:]).clone() for value in inputs)
    dynamic = tuple({0: torch.export.Dim.AUTO} for _ in example)
    with torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=dynamic)
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in CALLABLES:
            raise PassError(f"lowering left the function {node.target} in the graph")
        for name in LOCAL_META:
            node.meta.pop(name, None)
    return program


def emit(surgery: Surgery, folder: Path, target: Path) -> None:
    """Write `model.pt2` and `regsurgery.json`, which describes it."""
    archive = io.BytesIO()  # torch's own writer aborts the process if the disk is full
    torch.export.save(lower(surgery), archive)
    (folder / PROGRAM_NAME).write_bytes(archive.getbuffer())
    write_config(surgery, folder, "pt2")


def input_names(surgery: Surgery) -> list[str]:
    """The names of the program's inputs, in order."""
    return [node.name for node in surgery.traced.graph_module.graph.find_nodes(op="placeholder")]


def write_config(surgery: Surgery, folder: Path, fmt: str) -> None:
    """Write `regsurgery.json`, which describes the program in the folder and how to call it."""
    traced = surgery.traced
    fixed = {} if surgery.plan.constant_blocks else {"num_registers": surgery.plan.num_registers}
    write_json(
        folder / CONFIG_NAME,
        {
            "regsurgery": {**surgery.config_block, "num_patches": None, **fixed},
            "format": fmt,
            "image_size": list(traced.image_size),
            "inputs": input_names(surgery),
            "outputs": list(traced.output_names),
            "dtype": str(traced.example[0].dtype).removeprefix("torch."),
        },
    )


def snippets(surgery: Surgery, folder: str) -> Snippets:
    inputs, outputs = input_names(surgery), surgery.traced.output_names
    examples = [
        f"{name} = torch.zeros(2, {', '.join(map(str, value.shape[1:]))}, dtype={value.dtype})"
        for name, value in zip(inputs, surgery.traced.example, strict=True)
    ]
    examples[0] += "  # preprocessed photos, as many as you like"
    filled = SNIPPET.format(
        folder=folder, examples="\n".join(examples), inputs=", ".join(inputs), outputs=", ".join(outputs)
    )
    return ("torch alone", filled), ("On a GPU, if there is one", ON_GPU.format(folder=folder))


def state(folder: Path) -> dict[str, Any]:
    """The program's tensors by their names in the graph."""
    return dict(_load(folder).state_dict)


def reload(folder: Path, config: dict[str, Any], *, trusted: bool = False) -> nn.Module:
    """The program as a module: positional tensors in, a dict of tensors out."""
    if not trusted and (foreign := foreign_code(folder)) is not None:
        raise CheckpointError(f"{folder / foreign}: {UNKNOWN_CODE}")
    return _load(folder).module()


def _load(folder: Path) -> torch.export.ExportedProgram:
    try:
        return torch.export.load(folder / PROGRAM_NAME)
    except (RuntimeError, ValueError, OSError) as error:
        raise library_fails("torch", folder / PROGRAM_NAME, error) from error


def foreign_code(folder: Path) -> str | None:
    """The program, if loading it would run more than operators; see `pt2_archive.py`."""
    path = folder / PROGRAM_NAME
    part = foreign_part(path) if path.is_file() else None
    return None if part is None else f"{PROGRAM_NAME} ({part})"
