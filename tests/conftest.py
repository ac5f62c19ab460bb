"""Shared fixtures: where the real models are, and every pico model with planted register neurons."""

from __future__ import annotations

import functools
import os
import pickle
import sys
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# For the processes that tests start, too: with a thread a core in each of several, threads wait for one another, and
# what takes 28 s with one thread takes 165 s.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from filelock import FileLock

import regsurgery
from regsurgery.cli.app import main
from regsurgery.commands.patch import PatchResult
from regsurgery.compiler import trace
from regsurgery.compiler.located import Located, OfLocated
from regsurgery.compiler.planting import plant
from regsurgery.compiler.trace import tensor_inputs
from regsurgery.demo import write_demo
from regsurgery.frontends.load import load
from regsurgery.images.image_set import image_set
from regsurgery.models import locate
from regsurgery.progress import Progress
from regsurgery.search import division
from regsurgery.verification import size_drift
from tests.commands import Done
from tests.exported import exported_once
from tests.picos import PICOS, WHOLES, Pico

SHARED = Path(__file__).resolve().parents[2] / "shared"
PLANTED = {1: 2, 2: 1}
IDS = {pico.id for pico in (*PICOS, *WHOLES)}

torch.set_num_threads(1)
# Drift at three image sizes, on 8 photos, takes long for a real model; tests of it set their own number.
size_drift.MAX_IMAGES = 2
# Native mode and bias of small models need no more to fit on.
division.GENERATED_TO_FIT = 32
# What a test writes need not outlast a power failure; waiting for the disk takes a seventh of a small model's `patch`.
os.fsync = lambda _: None
# torch.export takes half of a small model's `patch`, and tests patch the same models again and again.
trace.exported = exported_once(trace.exported)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """What `--dist loadgroup` groups by. Marks would do, but xdist 3.8 does not see them with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return Groups(config, log) if config.getvalue("dist") == "loadgroup" else None  # type: ignore[arg-type]


# What runs by default has these: between them every library, a gated MLP, a text tower beside, no prefix, registers
# inside the prefix, a prefix that modules count, a bias, a mask, a collector of hidden states, no pre-norm.
CHOSEN = ("hf-vit-classes", "hf-dinov2-swiglu", "hf-clip", "timm-vit-mean", "timm-eva02", "open-clip-no-ln-pre",
          "hf-beit-relative", "hf-idefics3", "hf-dinov2-backbone", "hf-dinov3-gated")  # fmt: skip
# Whole models, of which only the gate runs by default: hidden states that a language model reads, a Q-Former, a mask,
# a tower in a tower, an encoder of a decoder, several inputs, a head on every block, blocks in parts, timm, videos.
GATED = ("whole-llava-next", "whole-paligemma", "whole-blip2", "whole-idefics2", "whole-kosmos2", "whole-trocr",
         "whole-clipseg", "whole-depth-anything", "whole-dpt", "whole-timm-wrapper", "whole-videomae")  # fmt: skip
GATE = "test_parity.py::test_graph_equals_module_form_equals_hooked_reference"


def tiered(values: Iterable[Any], default: Container[Any]) -> list[Any]:
    """Values of a parameter, or tuples for several; tests of those not in `default` are of the tier `slow`."""

    def param(value: Any) -> Any:
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)

    return [value if value in default else param(value) for value in values]


def pico_of(nodeid: str) -> str | None:
    """The id of the pico that a test is about, or None."""
    _, _, parameters = nodeid.partition("::")[2].removesuffix("]").partition("[")
    ids = [name for name in IDS if f"-{parameters}-".startswith(f"-{name}-") or parameters.endswith(f"-{name}")]
    return max(ids, key=len) if ids else None


def group(nodeid: str) -> str:
    """Tests that run in one process: a pico's, which plant it once; of all others those of a file."""
    file, pico = nodeid.partition("::")[0], pico_of(nodeid)
    return file if pico is None else pico


def mark_tiers(items: list[pytest.Item]) -> None:
    """Tests of a pico that is not chosen are of the tier `families`; pyproject.toml says what runs by default.

    With `-k` nothing is: who names a pico wants its tests.
    """
    if items and items[0].config.getoption("keyword"):
        return
    for item in items:
        pico = pico_of(item.nodeid)
        gates = pico in GATED and GATE in item.nodeid and item.nodeid.endswith("-1]")
        if pico is not None and pico not in CHOSEN and not gates:
            item.add_marker(pytest.mark.families)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Where CI would be stopped for its time, what is left of the tier `families` gives way to the other tiers."""
    if item.get_closest_marker("families") and time.time() > float(os.environ.get("REGSURGERY_FAMILIES_UNTIL", "inf")):
        pytest.skip("no time left for the tier families")


@pytest.hookimpl(tryfirst=True)  # before pytest picks by mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long groups first, so that none is left at the end: files with real models, other files, picos, units."""
    mark_tiers(items)
    real = {group(item.nodeid) for item in items if item.get_closest_marker("real")}

    def rank(item: pytest.Item) -> int:
        if group(item.nodeid) in real:
            return 0
        if group(item.nodeid) in IDS:
            return 2
        return 3 if item.path.parent.name == "unit" else 1

    items.sort(key=rank)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`regsurgery ARGS`, in this process."""

    def in_process(*args: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["regsurgery", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Done(int(ended.value.code or 0), captured.out, captured.err)

    return in_process


def shared(*parts: str) -> Path:
    """A path below the real data, or a skip; in CI, where the data must be, a failure."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        message = f"needs the real data: {path.relative_to(SHARED.parent)} is absent"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


@dataclass(frozen=True, eq=False)
class Planted(OfLocated):
    """A pico checkpoint on disk with planted register neurons."""

    pico: Pico
    folder: Path
    located: Located
    neurons: dict[int, list[int]]


@pytest.fixture(scope="session")
def planted_picos(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Pico], Planted]:
    """Builds each planted pico once a session, when first asked for."""
    return functools.cache(lambda pico: build_planted(pico, tmp_path_factory.mktemp(pico.id) / "model"))


@pytest.fixture(scope="session", params=(*PICOS, *WHOLES), ids=lambda pico: pico.id)
def planted(request: pytest.FixtureRequest, planted_picos: Callable[[Pico], Planted]) -> Planted:
    return planted_picos(request.param)


def build_planted(pico: Pico, folder: Path) -> Planted:
    from safetensors.torch import save_file

    pico.build(folder)
    pico.publish(folder)
    located = locate(load(str(folder)), Progress())
    loaded = located.loaded
    inputs = tensor_inputs(loaded, next(image_set(None, 8).batches(8, loaded.preprocess)))
    neurons = plant(located.traced, located.sites, inputs, PLANTED)
    (path,) = loaded.weights
    if loaded.library == "transformers":
        loaded.model.save_pretrained(folder)
        pico.publish(folder)
    else:
        save_file({name: value.clone() for name, value in loaded.model.state_dict().items()}, path)
    return Planted(pico, folder, located, neurons)


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    write_demo(folder)
    return folder


@dataclass(frozen=True)
class Job:
    """A `patch` of the real ViT-Ti with its bundled recipe, native mode not calibrated, verified on labelled photos."""

    library: str
    mode: str

    NUM_IMAGES = 12

    @property
    def source(self) -> Path:
        return shared("models", f"vit-tiny-{self.library.replace('_', '')}")

    def run(self, folder: Path) -> PatchResult:
        return regsurgery.patch(
            str(self.source), folder, recipe="vit-tiny", mode=self.mode, calibrate=False, format=self.library,
            images=shared("images", "labelled"), num_images=self.NUM_IMAGES,
        )  # fmt: skip


@pytest.fixture
def exported_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trace is a `torch.export` of its own, as it is for users."""
    monkeypatch.setattr(trace, "exported", trace.exported.__wrapped__)  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def patched_real(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, PatchResult]]:
    """(library, mode) -> what a `Job` wrote and returned: made once for all workers, so not to be changed."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "real"
    root.mkdir(exist_ok=True)

    def patched(library: str, mode: str) -> tuple[Path, PatchResult]:
        folder, result = root / f"{library}-{mode}", root / f"{library}-{mode}.pickle"
        with FileLock(root / f"{folder.name}.lock"):
            if not result.exists():
                result.write_bytes(pickle.dumps(Job(library, mode).run(folder)))
        return folder, pickle.loads(result.read_bytes())

    return patched
