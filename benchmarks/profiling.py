"""What the time of a patched model goes into: its operators beside those of the original."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

RUNS = 3
TOP = 8


@torch.no_grad()
def where_the_time_goes(original: Callable[[], Any], patched: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of one run of each by operator, those that differ most first; and of all operators together.

    The profiler's own cost is in them: they say where the time goes, not how much it is.
    """
    before, after = {}, {}
    for _ in range(RUNS):  # in turns, as they are timed
        for run, sums in ((original, before), (patched, after)):
            for name, (milliseconds, calls) in _operators(run).items():
                known = sums.get(name, (0.0, 0.0))
                sums[name] = (known[0] + milliseconds / RUNS, known[1] + calls / RUNS)
    nothing = (0.0, 0.0)
    rows = [
        {
            "operator": name,
            "original_ms": before.get(name, nothing)[0],
            "patched_ms": after.get(name, nothing)[0],
            "original_calls": round(before.get(name, nothing)[1]),
            "patched_calls": round(after.get(name, nothing)[1]),
        }
        for name in {**before, **after}
    ]
    rows.sort(key=lambda row: -abs(row["patched_ms"] - row["original_ms"]))
    totals = [sum(milliseconds for milliseconds, _ in sums.values()) for sums in (before, after)]
    return {"operators": rows[:TOP], "original_ms": totals[0], "patched_ms": totals[1]}


def _operators(run: Callable[[], Any]) -> dict[str, tuple[float, int]]:
    """Name -> milliseconds of its own, calls."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        run()
    found: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        name, own = _name(event.key), event.self_device_time_total if on_gpu else event.self_cpu_time_total
        milliseconds, calls = found.get(name, (0.0, 0))
        found[name] = milliseconds + own / 1000, calls + event.count
    return found


def _name(key: str) -> str:
    """Every compiled graph is called by its hash; what it does itself are the kernels that inductor made."""
    return "kernels that torch.compile made" if "CompiledFxGraph" in key else key
