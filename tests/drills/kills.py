"""`kill -9` at any moment of `patch`."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

from regsurgery.checkpoints.sums import check_sums
from regsurgery.demo import write_demo
from tests.drills import Row, drill, tries
from tests.drills.running import PARTIAL, Process, ended, patch, wait

KILLS = int(os.environ.get("REGSURGERY_KILLS", tries(6, 12)))


def wait_for_partial(process: Process, folder: Path, left: set[Path]) -> None:
    """Wait until `process` begins to write, which is not what earlier ones `left`."""
    wait(lambda: set(folder.glob(PARTIAL)) - left, process)


def sharded_demo(folder: Path) -> Path:
    """The demo in shards, whose copies begin before the model is built."""
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file

    write_demo(folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_torch_state_dict(state, folder, max_shard_size=sum(t.nbytes for t in state.values()) // 4)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def seconds_of_writing(source: Path, out: Path) -> float:
    """From the first byte written to the end of a run."""
    assert ended(patch(source, out))[0] == 0  # what it is forked from imports
    shutil.rmtree(out)
    process = patch(source, out)
    wait_for_partial(process, out.parent, set())
    began = time.monotonic()
    assert ended(process)[0] == 0
    check_sums(out)
    shutil.rmtree(out)
    return time.monotonic() - began


@drill
def killed_while_writing(place: Path) -> Row:
    """`kill -9` leaves the whole folder, or none and a partial one that the next run removes."""
    source, target = sharded_demo(place / "sharded"), place / "target"
    target.mkdir()
    out, rng, left = target / "out", random.Random(0), Counter()
    writing = seconds_of_writing(source, out)
    for _ in range(KILLS):
        process = patch(source, out)
        wait_for_partial(process, target, set(target.iterdir()))
        wait(lambda: False, process, rng.uniform(0, 1.1 * writing))
        process.send_signal(signal.SIGKILL)
        ended(process)
        partial = list(target.glob(PARTIAL))
        assert len(partial) <= 2, partial  # copies, and the folder; what the last run left is gone
        left["a partial folder"] += bool(partial)
        if out.exists():
            check_sums(out)
            shutil.rmtree(out)
            left["a whole folder"] += 1
        assert sorted(target.iterdir()) == sorted(partial)
    assert left["a partial folder"] >= KILLS // 2, left
    assert ended(patch(source, out))[0] == 0
    check_sums(out)
    assert list(target.iterdir()) == [out]
    outcome = ", ".join(f"{what} {count} times" for what, count in left.items())
    return Row(KILLS, f"left {outcome}; the next run removed what was left and wrote its folder")
