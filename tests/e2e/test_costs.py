"""What the surgery costs, in counts: they hold on any machine, however busy, so the suite can guard them.

Each number follows from what the surgery must do, and is written as that; one more is a cost that nobody asked for.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import regsurgery
from regsurgery.compiler.located import Located
from regsurgery.compiler.mlp import mlp_of
from regsurgery.compiler.modes import bias, native
from regsurgery.compiler.modes.operation import Operation
from regsurgery.compiler.passes.pipeline import apply_passes
from regsurgery.compiler.passes.plan import plan_surgery
from regsurgery.compiler.surgery import Surgery, perform
from regsurgery.compiler.trace import tensor_inputs
from regsurgery.frontends.load import load
from regsurgery.images.image_set import image_set
from regsurgery.models import locate
from regsurgery.options import SearchOptions
from regsurgery.progress import Progress
from regsurgery.recipe import Recipe, find_recipe
from regsurgery.runtime.surgery import insert_constant, insert_registers, neuron_shift, operate, strip_registers
from regsurgery.search.find import Task, find
from regsurgery.search.shares import Share
from tests.picos import _transformers

IMAGES = 16
BATCH = 3  # divides no size of the model
RECIPE = find_recipe("demo")
MODES = ("shift", "native", "bias")


@pytest.fixture(scope="module")
def demo(demo_folder: Path) -> Located:
    loaded = load(str(demo_folder))
    return locate(loaded, Progress())


@pytest.fixture(scope="module")
def surgeries(demo: Located) -> dict[str, Surgery]:
    images = image_set(None, IMAGES)
    return {
        "shift": perform(demo, RECIPE),
        "native": native.operate(Operation(demo, RECIPE.with_mode("native"), images)),
        "bias": bias.operate(Operation(demo, RECIPE.with_mode("bias"), images)),
    }


# --- nodes ----------------------------------------------------------------------------------------------------------


def added_nodes(original: fx.Graph, patched: fx.Graph) -> Counter[Any]:
    """What was added: functions by themselves, parameters and buffers by the last part of their name."""
    before = {node.name for node in original.nodes}
    return Counter(
        str(node.target).rpartition(".")[2] if node.op == "get_attr" else node.target
        for node in patched.nodes
        if node.name not in before
    )


@pytest.mark.parametrize("mode", MODES)
def test_the_graph_grows_by_what_the_mode_is_made_of(mode: str, surgeries: dict[str, Surgery]) -> None:
    surgery = surgeries[mode]
    exits = 1  # the demo's only output is made of the last block's tokens, and no other edge leaves the region
    stream = {"register_tokens": 1, insert_registers: 1, strip_registers: exits}
    blocks = RECIPE.register_neurons
    shifts = {neuron_shift: len(blocks), **{f"register_neurons_{block}": 1 for block in blocks}}
    # From the block after the first neuron on a register has something to say: one concatenation before each of those
    # attentions, one strip behind it.
    attentions = len(surgery.sites.blocks) - min(blocks) - 1
    constants = dict.fromkeys(("attention_constants", insert_constant, strip_registers), attentions)
    expected = {"shift": stream | shifts, "native": stream, "bias": shifts | constants}[mode]
    assert added_nodes(surgery.traced.graph_module.graph, surgery.graph_module.graph) == expected


@pytest.mark.usefixtures("exported_anew")
def test_shapes_are_propagated_through_one_block_for_all(tmp_path: Path) -> None:
    """All blocks ask the same of the same shapes, so twice the blocks take as many runs on fake tensors."""
    counts = []
    dispatch = FakeTensorMode.dispatch
    for blocks in (4, 4, 8):  # torch caches some of the first
        build = _transformers("ViTModel", "ViTConfig", hidden_size=32, num_hidden_layers=blocks, image_size=32)
        folder = tmp_path / str(len(counts))
        build(folder)
        located = locate(load(str(folder)), Progress())
        seen: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                FakeTensorMode, "dispatch", lambda *args, of=seen, **kw: (of.append(args[1]), dispatch(*args, **kw))[1]
            )
            perform(located, Recipe({1: (3,)}))
        counts.append(len(seen))
    assert counts[2] == counts[1] > 10


# --- tensors --------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Counts results in memory of their own that have at least `num_elements` elements."""

    def __init__(self, num_elements: int) -> None:
        super().__init__()
        self.num_elements, self.count = num_elements, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.numel() >= self.num_elements and id_of(leaf) not in given:
                self.count += 1
        return result


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@torch.no_grad()
def allocations(num_elements: int, run: Callable[[], Any]) -> int:
    with Allocations(num_elements) as counter:
        run()
    return counter.count


@pytest.mark.parametrize(
    ("mode", "form"),  # the module form of native mode is the stock library's
    [("shift", "graph"), ("shift", "module"), ("native", "graph"), ("bias", "graph"), ("bias", "module")],
)
def test_a_forward_makes_no_more_tensors_of_hidden_size(mode: str, form: str, surgeries: dict[str, Surgery]) -> None:
    surgery = surgeries[mode]
    loaded, sites = surgery.loaded, surgery.sites
    images = torch.rand(BATCH, 3, *surgery.traced.image_size)
    inputs = tensor_inputs(loaded, images)
    hidden = BATCH * sites.num_tokens * sites.blocks[0].hidden_size
    width = BATCH * sites.num_tokens * sites.width

    def both(num_elements: int) -> tuple[int, int]:
        if form == "graph":
            models: tuple[Callable[[], Any], ...] = (
                lambda: surgery.traced.graph_module(*inputs),
                lambda: surgery.graph_module(*inputs),
            )
        else:
            module = operate(copy.deepcopy(loaded.model), surgery.config_block)
            models = (lambda: loaded.call(loaded.model, images), lambda: loaded.call(module, images))
        before, after = (allocations(num_elements, model) for model in models)
        return before, after

    before, after = both(hidden)
    assert after == before >= len(sites.blocks), "the shift writes in place"
    before, after = both(width)
    concatenations = len(sites.blocks) - min(RECIPE.register_neurons) - 1 if mode == "bias" else 1
    assert after - before == concatenations, "of the stream's size: each concatenation makes one, and nothing else does"


def test_a_shift_that_copies_would_be_seen(demo: Located) -> None:
    loaded, traced, sites = demo.loaded, demo.traced, demo.sites
    copying = replace(sites, blocks=tuple(replace(block, in_place=False) for block in sites.blocks))
    patched, _ = apply_passes(traced, plan_surgery(copying, RECIPE))
    inputs = tensor_inputs(loaded, torch.rand(BATCH, 3, *traced.image_size))
    hidden = BATCH * sites.num_tokens * sites.blocks[0].hidden_size
    before, after = (
        allocations(hidden, lambda module=module: module(*inputs)) for module in (traced.graph_module, patched)
    )
    assert after - before == len(RECIPE.register_neurons)


# --- forwards -------------------------------------------------------------------------------------------------------


class Rows(TorchDispatchMode):
    """Counts the rows that go through linears: by the weight's memory, and by its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            rows_MD, weight = args[-2:]
            if not isinstance(rows_MD, FakeTensor) and not rows_MD.is_meta:
                self.of[id_of(weight)] += len(rows_MD)
                self.of[tuple(weight.shape)] += len(rows_MD)
        return func(*args, **(kwargs or {}))


class CountsIn(Progress):
    """Counts rows while the stage of that name runs."""

    def __init__(self, stage: str) -> None:
        self.wanted, self.rows, self.running = stage, Rows(), False

    def stage(self, name: str, total: int | None = None, *, in_bytes: bool = False) -> None:
        if self.running:
            self.rows.__exit__(None, None, None)
        self.running = name == self.wanted
        if self.running:
            self.rows.__enter__()


def test_find_runs_every_image_once_and_stops_where_no_cause_can_be(
    demo: Located,
) -> None:
    traced, sites = demo.traced, demo.sites
    counted = CountsIn("scores")
    found = find(Task(demo, Share.of(image_set(None, IMAGES)), SearchOptions(progress=counted)))
    settled = found.diagnosis.settled_block
    assert settled is not None and settled < sites.probe_block, "so that an early exit saves something"
    tokens = IMAGES * sites.num_tokens
    # The pilot had the same images; it says how many outlier patches there are where the pass stops.
    num_outliers = round(IMAGES * found.diagnosis.blocks[settled].outliers)
    for block in sites.blocks:
        mlp = mlp_of(traced, block)
        runs = block.index <= settled
        expected = dict.fromkeys((*block.attention_weights, mlp.down), tokens if runs else 0)
        expected[mlp.gate.weight] = tokens + num_outliers if runs else 0  # once more at the outliers alone
        rows = {name: counted.rows.of[id_of(traced.graph_module.get_parameter(name))] for name in expected}
        assert rows == expected


@pytest.mark.parametrize("verification", [True, False])
def test_patch_runs_every_model_once(verification: bool, demo: Located, demo_folder: Path, tmp_path: Path) -> None:
    """Loading, tracing, surgery and writing run nothing; with `--no-verify` one picture is run."""
    traced, sites = demo.traced, demo.sites
    with Rows() as rows:
        result = regsurgery.patch(
            str(demo_folder), tmp_path / "out", recipe=RECIPE, num_images=IMAGES, verification=verification
        )
    own, registers = sites.num_tokens, RECIPE.num_registers
    with_registers = own + registers
    # Original, patched graph, written module; for the verdict unused registers, too.
    tokens = IMAGES * (own + 3 * with_registers) if verification else own + 2 * with_registers
    for row in result.sizes.rows if result.sizes else ():
        there = sites.num_prefix + (own - sites.num_prefix) * math.prod(row.image_size) // math.prod(traced.image_size)
        tokens += row.num_images * (there + there + row.num_registers)
    up = tuple(traced.graph_module.get_parameter(mlp_of(traced, sites.blocks[0]).gate.weight).T.shape)
    assert rows.of[up] == len(sites.blocks) * tokens
    assert (result.sizes is not None and len(result.sizes.rows) == 3) == verification


# --- bytes ----------------------------------------------------------------------------------------------------------

ELSE = 2 << 20  # bytes of all that is no weight: configs, sources of the loader, the card, the record


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of 25 MB, in one file and in shards, so that a second look at the weights would stand out."""
    from transformers import ViTModel

    root = tmp_path_factory.mktemp("checkpoints")
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 4}
    _transformers("ViTModel", "ViTConfig", **shape, image_size=32, patch_size=16)(root / "one")
    ViTModel.from_pretrained(root / "one").save_pretrained(root / "shards", max_shard_size="10MB")
    for path in (root / "one").glob("preprocessor*"):
        (root / "shards" / path.name).write_bytes(path.read_bytes())
    return {path.name: path for path in root.iterdir()}


@contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """What this process reads and writes by system calls, those of copying inside the kernel included."""

    def now() -> dict[str, int]:
        lines = Path("/proc/self/io").read_text().splitlines()
        return {name: int(value) for name, _, value in (line.partition(": ") for line in lines)}

    before, moved = now(), dict[str, int]()
    yield moved
    moved.update({name: value - before[name] for name, value in now().items()})


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="bytes are counted by Linux")
@pytest.mark.parametrize(
    ("kind", "link", "reads", "writes"),
    [
        # Read once for its sha256 and to look for NaN; copied once (what the kernel copies counts as read and written).
        ("shards", False, 2, 1),
        ("shards", True, 1, 0),
        # The registers go into the file, so that its sha256 is a new one: read once more.
        ("one", False, 3, 1),
    ],
)
def test_patch_reads_and_writes_weights_no_more_often_than_it_must(
    kind: str, link: bool, reads: int, writes: int, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = checkpoints[kind]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size > 8 * ELSE and (len(list(folder.glob("*.safetensors"))) > 1) == (kind == "shards")
    how: dict[str, Any] = {"recipe": Recipe({1: (5,)}), "link": link, "verification": False}
    regsurgery.patch(str(folder), tmp_path / "first", **how)  # whatever it imports has been read then
    with counted_bytes() as moved:
        regsurgery.patch(str(folder), tmp_path / "out", **how)
    assert moved["rchar"] <= reads * size + ELSE
    assert moved["wchar"] <= writes * size + ELSE
    assert moved["rchar"] >= size, "the weights were looked at"
