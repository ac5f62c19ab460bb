"""Two gloo processes beside one: how long `find` takes for the stage that sees every image, each on a core of its own.

A process has one thread and stays on one core, its reader of images included: else the reader of the single process
would have the second core for itself. What the first process decides alone (pilot, search) comes before and after that
stage and is not in it; the sums, which are added up at its end, are.

`apart` is what the machine has to give: two searches that know nothing of each other, at once, over half of the images
each.
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
import os, sys
from pathlib import Path
if hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(sys.argv[3]) % len(cores)]})
import torch
from benchmarks.find import stages_until_search
torch.set_num_threads(1)
print(stages_until_search(Path(sys.argv[1]), int(sys.argv[2]))["scores"], flush=True)
"""
PATIENCE = 300  # seconds


def measure_processes(folder: Path, num_images: int, num_rounds: int) -> dict[str, Any]:
    """Seconds of one and of two processes, in turns.

    Returns:
        `two_over_half`, `apart_over_half`: over half of the time of one process; 1 where two do twice as much.
    """
    said: list[float] = []

    def stage_seconds() -> float:  # the clock of `turns`: it moves by what the processes said of their stage
        return sum(said)

    ways = {
        "one": lambda: said.append(scoring_seconds(folder, num_images, 1)),
        "two": lambda: said.append(scoring_seconds(folder, num_images, 2)),
        "apart": lambda: said.append(scoring_seconds(folder, num_images // 2, 2, together=False)),
    }
    rounds = list(islice(turns(ways, warm_up=0, clock=stage_seconds), num_rounds))
    return {
        "model": folder.name,
        "images": num_images,
        "rounds": rounds,
        "speed_up": median([each["one"] / each["two"] for each in rounds]).as_dict(),
        "two_over_half": median([2 * each["two"] / each["one"] for each in rounds]).as_dict(),
        "apart_over_half": median([2 * each["apart"] / each["one"] for each in rounds]).as_dict(),
    }


def scoring_seconds(folder: Path, num_images: int, count: int, *, together: bool = True) -> float:
    """Seconds of the stage, as the slowest of `count` processes has them; `together` they share the images."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"OMP_NUM_THREADS": 1}
    if together:
        shared |= {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    try:
        for rank in range(count):
            env = {**os.environ, **{name: str(value) for name, value in (shared | {"RANK": rank}).items()}}
            command = [sys.executable, "-c", WORKER, str(folder), str(num_images), str(rank)]
            started.append(
                subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        said = []
        # Together only the first one comes to the end: the others wait for a search that it does not begin.
        for number, process in enumerate(started[:1] if together else started):
            out, err = process.communicate(timeout=PATIENCE)
            if process.returncode:
                raise RegsurgeryError(f"process {number} of {count} failed: {err[-2000:]}")
            said.append(float(out.split()[-1]))
    finally:
        for process in started:
            process.kill()
            process.wait()
            assert process.stdout and process.stderr
            process.stdout.close()
            process.stderr.close()
    return max(said)
