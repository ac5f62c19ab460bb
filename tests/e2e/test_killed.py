"""`kill -9` at any moment of `patch` leaves the whole folder, or none and a partial one that the next run removes."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from regsurgery.checkpoints.sums import check_sums

KILLS = int(os.environ.get("REGSURGERY_KILLS", "10"))
PARTIAL = ".out.partial-*"


def patch(folder: str, out: str) -> None:
    import torch

    import regsurgery

    torch.set_num_threads(1)
    regsurgery.patch(folder, out, recipe="demo", num_images=8)


def start(folder: Path, out: Path) -> BaseProcess:
    """A process of its own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "transformers", "regsurgery.commands.patch", "regsurgery.compiler.surgery"]
    )
    process = context.Process(target=patch, args=(str(folder), str(out)))
    process.start()
    return process


def wait_for_partial(process: BaseProcess, folder: Path) -> None:
    while process.is_alive() and not list(folder.glob(PARTIAL)):
        time.sleep(0.002)


@pytest.fixture
def sharded(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in shards, whose copies begin before the model is built."""
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("sharded") / "demo"
    shutil.copytree(demo_folder, folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_torch_state_dict(state, folder, max_shard_size=sum(t.nbytes for t in state.values()) // 4)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def durations(sharded: Path, tmp_path: Path) -> tuple[float, float]:
    """Seconds of a whole run, and of the part from the first byte written."""
    start(sharded, tmp_path / "out").join(120)  # the server imports
    shutil.rmtree(tmp_path / "out")
    began = time.monotonic()
    process = start(sharded, tmp_path / "out")
    wait_for_partial(process, tmp_path)
    writing = time.monotonic()
    process.join(120)
    check_sums(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    return time.monotonic() - began, time.monotonic() - writing


@pytest.mark.slow
def test_no_half_folder_is_taken_for_a_whole_one(sharded: Path, durations: tuple[float, float], tmp_path: Path) -> None:
    whole, writing = durations
    out, rng, left = tmp_path / "out", random.Random(0), Counter()
    for kill in range(KILLS):
        process = start(sharded, out)
        if kill % 2:  # half of the kills fall while something is written
            wait_for_partial(process, tmp_path)
        process.join(rng.uniform(0, writing if kill % 2 else whole))
        process.kill()
        process.join(30)
        if out.exists():
            check_sums(out)
            shutil.rmtree(out)
            left["a whole folder"] += 1
        partial = list(tmp_path.iterdir())
        assert sorted(partial) == sorted(tmp_path.glob(PARTIAL)) and len(partial) <= 2  # copies, and the folder
        left["a partial folder"] += bool(partial)
    assert left["a partial folder"] >= KILLS // 4, left
    process = start(sharded, out)
    process.join(120)
    assert process.exitcode == 0
    check_sums(out)
    assert list(tmp_path.iterdir()) == [out]
    print(f"{KILLS} kills: {dict(left)}")
