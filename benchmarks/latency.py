"""Part `latency`: the forward of patched models over that of the original, in time and memory.

A group is one shape, back end, batch and dtype; the original and all modes of a group run in the same rounds. All
factors times each other would take hours, so the groups cover every value of every factor, and what the goals are about
comes first. A group ends when its time is used up, or when the interval of every mode is as narrow as it should be.

`shift`, `native` and `bias` are the folders that `regsurgery patch` writes, as their users load them; `hooks` does what
`shift` does by forward hooks (`hooks.py`), and must give the same outputs. Programs (`.pt2`, ONNX) of the original are
made by the same exporter, with nothing operated on. Modules share the original's weights where they have equal ones,
and the original takes one more turn in every round, as if it were another model: nothing is known better than that its
ratio is 1.
"""

from __future__ import annotations

import gc
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.goals import AGAIN, LATENCY_GOALS
from benchmarks.models import DTYPES, HOOKS, ORIGINAL, SHAPES, Workshop, on_device, runner, share_weights
from benchmarks.profiling import where_the_time_goes
from regsurgery.errors import RegsurgeryError
from regsurgery.evaluation.latency import peak
from regsurgery.evaluation.timing import MIN_ROUNDS, ratio, turns
from regsurgery.interval import Estimate

# A group that fails is told, and the others still run.
FAILURES = (RegsurgeryError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, OSError)
FORMATS = {"eager": "timm", "compile": "timm", "pt2": "pt2", "onnx": "onnx"}
ALL = ("shift", "native", "bias", HOOKS)
WRITTEN = ALL[:3]
EQUAL = 1e-5  # of the largest output: hooks and the written module, in float32
FIRST_LOOK = 12  # rounds after which intervals are looked at for the first time


@dataclass(frozen=True)
class Group:
    """What is timed together.

    Attributes:
        seconds: how long it may take to measure.
        half_width: of the intervals of the ratios; narrower is not needed.
    """

    shape: str
    backend: str
    batch: int
    dtype: str
    modes: tuple[str, ...]
    seconds: float
    half_width: float = 0.01

    @property
    def name(self) -> str:
        return f"{SHAPES[self.shape].name} {self.backend} batch {self.batch} {self.dtype}"


GOAL = 0.003
PLANS: dict[tuple[str, str], tuple[Group, ...]] = {
    ("full", "cpu"): (
        Group("L", "eager", 1, "fp32", ("shift", "native", HOOKS), 100, GOAL),
        Group("L", "compile", 1, "fp32", ("shift", "native"), 80, GOAL),
        Group("B", "eager", 1, "fp32", ALL, 45, GOAL),
        Group("B", "compile", 1, "fp32", ("shift", "native"), 35, GOAL),
        Group("Ti", "eager", 1, "fp32", ALL, 10),
        Group("B4", "eager", 1, "fp32", ("shift", "native"), 25, GOAL),
        Group("Ti4", "eager", 1, "fp32", ("shift", "native"), 10),
        Group("Ti", "eager", 8, "fp32", ALL, 15),
        Group("Ti", "eager", 32, "fp32", ALL, 25),
        Group("Ti", "eager", 8, "bf16", ALL, 15),
        Group("Ti", "compile", 8, "fp32", WRITTEN, 12),
        Group("Ti", "pt2", 8, "fp32", WRITTEN, 12),
        Group("Ti", "onnx", 8, "fp32", WRITTEN, 12),
        Group("Ti", "compile", 32, "bf16", ("shift",), 12),
        Group("B", "pt2", 1, "fp32", ("shift",), 15),
        Group("B", "onnx", 1, "fp32", ("shift",), 15),
        Group("B", "eager", 8, "fp32", ("shift", "native", HOOKS), 25),
        Group("B", "eager", 1, "bf16", ("shift", "native"), 15),
        Group("L", "eager", 1, "bf16", ("shift", "native"), 25),
        Group("L", "eager", 1, "fp32", ("bias",), 25),
    ),
    ("short", "cpu"): (
        Group("B", "eager", 1, "fp32", ("shift", HOOKS), 20, GOAL),
        Group("Ti", "eager", 1, "fp32", ALL, 5),
        Group("Ti", "eager", 8, "fp32", ALL, 8),
        Group("Ti", "compile", 1, "fp32", ("shift",), 4),
        Group("Ti", "pt2", 1, "fp32", ("shift",), 4),
        Group("Ti", "onnx", 1, "fp32", ("shift",), 4),
        Group("Ti", "eager", 8, "bf16", ("shift",), 4),
    ),
    ("smoke", "cpu"): (
        Group("smoke", "eager", 2, "fp32", ALL, 2),
        Group("smoke", "eager", 2, "bf16", ("shift",), 1),
        Group("smoke", "compile", 2, "fp32", ("shift",), 1),
        Group("smoke", "pt2", 2, "fp32", ("shift",), 1),
        Group("smoke", "onnx", 2, "fp32", ("shift",), 1),
    ),
    ("full", "cuda"): tuple(
        Group(shape, backend, batch, dtype, ALL if backend == "eager" else WRITTEN, 15, GOAL)
        for batch, dtype in ((32, "bf16"), (1, "bf16"), (8, "fp32"))
        for shape in ("L", "B", "Ti")
        for backend in ("eager", "compile")
    ),
    ("short", "cuda"): tuple(
        Group(shape, backend, 32, "bf16", ("shift", "native"), 8, GOAL)
        for shape in ("L", "B")
        for backend in ("eager", "compile")
    ),
    ("smoke", "cuda"): (Group("smoke", "eager", 2, "fp32", ALL, 2),),
}


def measure(form: str, device: str, seconds: float, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yields the figures so far after every group; the last ones are the result."""
    deadline = time.monotonic() + seconds
    figures: dict[str, Any] = {"groups": [], "not_run": [], "failed": {}}
    shapes = dict.fromkeys(group.shape for group in PLANS[form, device])
    figures["floors"] = {SHAPES[shape].name: SHAPES[shape].floor for shape in shapes}
    with tempfile.TemporaryDirectory(prefix="regsurgery-") as scratch:
        workshops = {shape: Workshop(SHAPES[shape], Path(scratch) / shape) for shape in shapes}
        for group in PLANS[form, device]:
            if time.monotonic() + group.seconds > deadline:
                figures["not_run"].append(group.name)
                continue
            try:
                found = _measure_group(group, workshops[group.shape], torch.device(device), deadline)
            except FAILURES as error:
                traceback.print_exc()
                figures["failed"][group.name] = f"{type(error).__name__}: {error}".splitlines()[0]
                say(f"{group.name}: failed")
                continue
            figures["groups"].append(found)
            ratios = ", ".join(f"{mode} {each['ratio']['value']:.4f}" for mode, each in found["modes"].items())
            say(f"{group.name}: {found['rounds']} rounds, {ratios}")
            yield figures
    yield figures


def _measure_group(group: Group, workshop: Workshop, device: torch.device, deadline: float) -> dict[str, Any]:
    shape, dtype, fmt = SHAPES[group.shape], DTYPES[group.dtype], FORMATS[group.backend]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(group.batch, 3, shape.side, shape.side, generator=generator).to(device, dtype)
    modules = {mode: on_device(workshop.module(mode, fmt), fmt, dtype, device) for mode in (ORIGINAL, *group.modes)}
    if fmt == "timm":
        for mode in group.modes:
            share_weights(modules[ORIGINAL], modules[mode])
    unequal = None
    if HOOKS in modules and dtype == torch.float32:
        unequal = check_equal(modules, pixels)
    began = time.monotonic()
    with _ready(group.backend, modules, pixels) as runs:
        ready_after = time.monotonic() - began
        runs[AGAIN] = runs[ORIGINAL]
        modes = (AGAIN, *group.modes)
        until = min(time.monotonic() + group.seconds, max(deadline, time.monotonic() + 1))
        rounds = timed_rounds(turns(runs, device, warm_up=1), modes, until, group.half_width)
        ratios = {mode: ratio(rounds, mode, ORIGINAL) for mode in modes}
        peaks = {mode: peak(run) for mode, run in runs.items()} if group.backend in ("eager", "pt2") else {}
        profiles = {
            mode: where_the_time_goes(runs[ORIGINAL], runs[mode])
            for mode in group.modes
            if _misses_a_goal(group, mode, device, ratios[mode])
        }
    medians = {mode: sorted(each[mode] for each in rounds)[len(rounds) // 2] for mode in runs}
    return {
        **{key: getattr(group, key) for key in ("shape", "backend", "batch", "dtype")},
        "name": group.name,
        "device": str(device),
        "rounds": len(rounds),
        "seconds_to_first_run": ready_after,
        "original": {"ms": 1000 * medians[ORIGINAL], "peak_mb": peaks.get(ORIGINAL)},
        "modes": {
            mode: {"ratio": ratios[mode].as_dict(), "ms": 1000 * medians[mode], "peak_mb": peaks.get(mode)}
            for mode in modes
        },
        "hooks_differ_by": unequal,
        "profiles": profiles,
    }


def timed_rounds(
    rounds: Iterator[dict[str, float]], modes: tuple[str, ...], until: float, half_width: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, float]]:  # fmt: skip
    """Rounds until the clock says `until` or all ratios are known to within `half_width`; never less than an interval
    needs.
    """
    taken: list[dict[str, float]] = []
    look_at = FIRST_LOOK
    for each in rounds:
        taken.append(each)
        if len(taken) < MIN_ROUNDS:
            continue
        if clock() >= until:
            break
        if len(taken) >= look_at:
            look_at += look_at // 4
            found = [ratio(taken, mode, ORIGINAL) for mode in modes]
            if all(_half_width(one) <= half_width for one in found):
                break
    return taken


def _half_width(estimate: Estimate) -> float:
    assert estimate.low is not None and estimate.high is not None
    return (estimate.high - estimate.low) / 2


def _misses_a_goal(group: Group, mode: str, device: torch.device, found: Estimate) -> bool:
    goals = [goal for goal in LATENCY_GOALS if goal.is_about(group, mode, device.type)]
    return any(found.value > goal.limit for goal in goals)


@torch.no_grad()
def check_equal(modules: Mapping[str, nn.Module], pixels: Tensor) -> float:
    """The largest difference of hooks and the written module, as a share of the largest output.

    Raises:
        RuntimeError: it is more than rounding, or the surgery changes no more than rounding does.
    """
    shift, hooks, original = (modules[mode](pixels) for mode in ("shift", HOOKS, ORIGINAL))
    size = float(original.abs().max())
    differ, moved = (float((shift - other).abs().max()) / size for other in (hooks, original))
    if differ > EQUAL or moved < 10 * EQUAL:
        raise RuntimeError(
            f"hooks and the written module differ by {differ:.1e} of the largest output, and the surgery moves it by "
            f"{moved:.1e}: their times cannot be compared"
        )
    return differ


@contextmanager
def _ready(backend: str, modules: Mapping[str, nn.Module], pixels: Tensor) -> Iterator[dict[str, Callable[[], Any]]]:
    """What runs each of `modules`, run once; compiled ones are forgotten afterwards."""
    runs = {}
    with torch.no_grad():
        for mode, module in modules.items():
            callable_: Any = torch.compile(module, dynamic=False) if backend == "compile" else module
            runs[mode] = runner(callable_, pixels)
            runs[mode]()
    yield runs
    if backend == "compile":
        torch.compiler.reset()
    gc.collect()
