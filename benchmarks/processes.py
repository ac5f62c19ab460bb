"""Two gloo processes beside one: how long `find` takes for the stage that sees every image, each with one thread.

What the first process decides alone (pilot, search) comes before and after that stage and is not in it; the sums, which
are added up at its end, are.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from regsurgery.errors import RegsurgeryError
from regsurgery.evaluation.timing import median, turns

WORKER = """
import sys
from pathlib import Path
import torch
from benchmarks.find import stages_until_search
torch.set_num_threads(1)
print(stages_until_search(Path(sys.argv[1]), int(sys.argv[2]))["scores"], flush=True)
"""
PATIENCE = 300  # seconds


def measure_processes(folder: Path, num_images: int, num_rounds: int) -> dict[str, Any]:
    """Seconds of one and of two processes, in turns; `two_over_half` is 1 where two take half as long as one."""
    said: list[float] = []

    def stage_seconds() -> float:  # the clock of `turns`: it moves by what the processes said of their stage
        return sum(said)

    ways = {str(count): lambda count=count: said.append(scoring_seconds(folder, num_images, count)) for count in (1, 2)}
    rounds = list(islice(turns(ways, warm_up=0, clock=stage_seconds), num_rounds))
    return {
        "model": folder.name,
        "images": num_images,
        "rounds": rounds,
        "speed_up": median([one["1"] / one["2"] for one in rounds]).as_dict(),
        "two_over_half": median([2 * one["2"] / one["1"] for one in rounds]).as_dict(),
    }


def scoring_seconds(folder: Path, num_images: int, count: int) -> float:
    """Seconds of the stage, as the first of `count` processes has them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    command = [sys.executable, "-c", WORKER, str(folder), str(num_images)]
    others = []
    try:
        for rank in range(1, count):
            env = {**os.environ, **{name: str(value) for name, value in (together | {"RANK": rank}).items()}}
            others.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        env = {**os.environ, **{name: str(value) for name, value in (together | {"RANK": 0}).items()}}
        first = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    finally:
        for other in others:  # it waits for a search that the first one does not begin
            other.kill()
            other.wait()
    if first.returncode:
        raise RegsurgeryError(f"{count} processes: the first one failed: {first.stderr[-2000:]}")
    return float(first.stdout.split()[-1])
