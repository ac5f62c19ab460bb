"""Two runs in two folders write the same bytes: other processes, other hash seeds, other folder names."""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import regsurgery
from tests.conftest import Planted, tiered
from tests.picos import DINOV2_VITS14, PICOS, Pico

# pico, mode, format. Native mode without calibration; test_native.py has the calibrated one.
JOBS = {
    "shift": ("hf-vit-classes", "shift", None),
    "bias": ("hf-vit-classes", "bias", None),
    "native": ("hf-vit-classes", "native", "transformers"),
    "pt2": ("hf-vit-classes", "shift", "pt2"),
    "timm": ("timm-vit", "shift", None),
    "timm native": ("timm-vit", "native", "timm"),
    "open_clip": ("open-clip", "shift", None),
    "open_clip native": ("open-clip", "native", "open_clip"),
    "open_clip pt2": ("open-clip", "native", "pt2"),
    "dinov2": ("dinov2-vits14", "native", "dinov2"),
}
DEFAULT = ("open_clip",)  # every library, mode and format is slow
PROGRAM = """
import json, sys
from pathlib import Path
import tests.conftest  # what makes tests fast: a thread, few pictures to fit on, one export a model
from tests.e2e.test_same_bytes import write
write(json.loads(sys.argv[1]), Path(sys.argv[2]))
"""
Jobs = dict[str, tuple[str, dict[int, list[int]], str, str | None]]


def write(jobs: Jobs, where: Path) -> None:
    for name, (folder, neurons, mode, fmt) in jobs.items():
        recipe = regsurgery.Recipe({int(block): tuple(listed) for block, listed in neurons.items()})
        regsurgery.patch(folder, folder_of(name, where), recipe=recipe, mode=mode, format=fmt, num_images=4,
                         calibrate=False)  # fmt: skip


def folder_of(name: str, where: Path) -> Path:
    return where / f"{name} {len(str(where))}"


@pytest.fixture(scope="module")
def twice(
    request: pytest.FixtureRequest,
    planted_picos: Callable[[Pico], Planted],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Path], dict[str, Path]]:
    """The folders of the jobs that this session tests: of this process, and of another with another hash seed."""
    picos = {pico.id: pico for pico in (*PICOS, DINOV2_VITS14)}
    wanted = {item.callspec.params["job"] for item in request.session.items if item.path == Path(__file__)}  # type: ignore[attr-defined]
    jobs: Jobs = {}
    for name, (pico, mode, fmt) in JOBS.items():
        if name in wanted:
            planted = planted_picos(picos[pico])
            jobs[name] = (str(planted.folder), planted.neurons, mode, fmt)
    here, there = (tmp_path_factory.mktemp(name) for name in ("one", "another"))
    write(jobs, here)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(jobs), str(there)],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: folder_of(name, here) for name in jobs}, {name: folder_of(name, there) for name in jobs}


@pytest.mark.parametrize("job", tiered((name for name in JOBS if name != "open_clip native"), DEFAULT))
def test_the_sums_are_the_same(job: str, twice: tuple[dict[str, Path], dict[str, Path]]) -> None:
    sums = [(run[job] / "SHA256SUMS").read_text().splitlines() for run in twice]
    assert len(sums[0]) >= 4
    assert list(difflib.unified_diff(sums[0], sums[1], lineterm="", n=0)) == []


@pytest.mark.parametrize("job", tiered(["open_clip native"], DEFAULT))
def test_the_folders_path_alone_differs(job: str, twice: tuple[dict[str, Path], dict[str, Path]]) -> None:
    """open_clip knows the tower by the path of the folder itself."""
    folders = [run[job] for run in twice]
    differ = [path.name for path in folders[0].iterdir() if path.read_bytes() != (folders[1] / path.name).read_bytes()]
    assert sorted(differ) == ["SHA256SUMS", "open_clip_config.json"]
    configs = [(folder / "open_clip_config.json").read_text().replace(str(folder), "") for folder in folders]
    assert configs[0] == configs[1]
