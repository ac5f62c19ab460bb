"""Written folders, loaded in a fresh process without regsurgery, reproduce the graph and keep every output's shape."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from regsurgery.backends.formats import backend
from regsurgery.backends.transformers import auto_class
from regsurgery.compiler.surgery import perform
from regsurgery.compiler.trace import tensor_inputs
from tests.conftest import Planted
from tests.e2e.test_parity import pictures, recipe_for
from tests.picos import PICOS, Pico

OTHER_PYTHON = "REGSURGERY_TRANSFORMERS4_PYTHON"  # a Python with transformers 4.57 and torch
TOLERANCE = 1e-5
# Outputs over pairs of the batch; what transformers 4 and 5 themselves define differently in CLIPModel.
INCOMPARABLE = ("logits_per_", "text_model_output.pooler_output", "vision_model_output.pooler_output")
# What transformers 4.57 does otherwise: its own SiglipModel gives no hidden states, its InternVLVisionModel raises when
# asked for them, and its Idefics 3 rounds fractional positions to other entries of the position embedding.
COLLECTS_NOT_IN_4 = ("hf-siglip", "hf-internvl")
OTHER_VALUES_IN_4 = ("hf-idefics3",)
EVERYTHING = {"output_hidden_states": True, "output_attentions": True}


SCRIPT = Path(__file__).with_name("fresh_process.py")


def run_fresh(jobs: list[dict[str, Any]], manifest: Path, python: str = sys.executable) -> list[dict[str, Any]]:
    """Run `fresh_process.py` on `jobs`; the results in their order."""
    torch.save(jobs, manifest)
    done = subprocess.run(
        [python, str(SCRIPT), str(manifest)],
        capture_output=True,
        text=True,
        env=environment(manifest.parent),
        cwd=manifest.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(f"{manifest}.results")


def environment(folder: Path) -> dict[str, str]:
    found = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "hf-modules")}
    found.pop("PYTHONPATH", None)
    return found


class Fresh:
    """`fresh_process.py` in one process of `python`, which runs a job after another."""

    def __init__(self, python: str, folder: Path) -> None:
        self.folder, self.stderr = folder, folder / "stderr"
        self.process = subprocess.Popen(
            [python, str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr.open("w"),
            text=True,
            env=environment(folder),
            cwd=folder,
        )

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        manifest = self.folder / "manifest"
        torch.save([job], manifest)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{manifest}\n")
        self.process.stdin.flush()
        assert f"done {manifest}\n" in iter(self.process.stdout.readline, ""), self.stderr.read_text()[-3000:]
        return torch.load(f"{manifest}.results")[0]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


@functools.cache
def job_for(planted: Planted) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Write the patched folder; the job for the fresh process, and what the graph gives for its inputs."""
    surgery = perform(planted.located, recipe_for(planted, 1))
    folder = planted.folder.with_name("reloaded")
    folder.mkdir()
    backend(planted.loaded.library).emit(surgery, folder, folder)
    inputs = tensor_inputs(planted.loaded, pictures(7, planted.loaded.image_size))
    names = [node.name for node in planted.traced.graph_module.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        expected = surgery.graph_module(*inputs)
    auto = auto_class(planted.loaded) if planted.loaded.library == "transformers" else ""
    if planted.loaded.entry == "model.vision_tower":  # the hidden state that LLaVA reads, by its own name
        expected["hidden_states.3"] = expected.pop("image_features")
    job = {
        "collects": EVERYTHING,
        "entry": planted.loaded.entry,
        "library": planted.loaded.library,
        "folder": str(folder),
        "source": str(planted.folder),
        "architecture": planted.loaded.architecture,
        "auto_class": auto,
        "output": planted.traced.output_names[0],
        "inputs": dict(zip(names, inputs, strict=True)),
    }
    return job, expected


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Fresh]]:
    """Python -> a process of it where regsurgery cannot be imported, the same for all picos."""
    processes: dict[str, Fresh] = {}

    def process(python: str) -> Fresh:
        if python not in processes:
            processes[python] = Fresh(python, tmp_path_factory.mktemp("fresh"))
        return processes[python]

    yield process
    for each in processes.values():
        each.close()


def check(result: dict[str, Any], expected: dict[str, torch.Tensor], *, same_values: bool = True) -> None:
    assert result["problems"] == []
    for size, outputs in result["outputs"].items():
        compared = [name for name, value in expected.items() if value.ndim and not name.startswith(INCOMPARABLE)]
        for name in compared:
            if same_values:
                torch.testing.assert_close(outputs[name], expected[name][:size], rtol=0, atol=TOLERANCE)
            else:  # the day they are the same, the exception is to go
                assert outputs[name].shape == expected[name][:size].shape and outputs[name].isfinite().all()
                assert float((outputs[name] - expected[name][:size]).abs().max()) > TOLERANCE
        assert compared


@pytest.mark.parametrize("pico", PICOS, ids=lambda pico: pico.id)
def test_a_fresh_process_reproduces_the_graph(
    pico: Pico, planted_picos: Callable[[Pico], Planted], fresh: Callable[[str], Fresh]
) -> None:
    job, expected = job_for(planted_picos(pico))
    check(fresh(sys.executable).run(job), expected)


@pytest.mark.parametrize("pico", [p for p in PICOS if p.id.startswith("hf-")], ids=lambda pico: pico.id)
def test_transformers_4_reproduces_the_graph(
    pico: Pico, planted_picos: Callable[[Pico], Planted], fresh: Callable[[str], Fresh]
) -> None:
    job, expected = job_for(planted_picos(pico))
    job = {**job, **({"collects": {}} if pico.id in COLLECTS_NOT_IN_4 else {})}
    check(fresh(transformers_4_python()).run(job), expected, same_values=pico.id not in OTHER_VALUES_IN_4)


def transformers_4_python() -> str:
    python = os.environ.get(OTHER_PYTHON)
    if not python:
        message = f"needs {OTHER_PYTHON}, a Python with transformers 4.57"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return str(python)
