"""What the surgery may cost: limits, and whether what was measured keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from regsurgery.interval import Estimate

Figures = Mapping[str, Any]
AGAIN = "original again"  # the original as if it were another model: a goal that is closer to 1 than this says little


@dataclass(frozen=True)
class Verdict:
    """One goal and what was measured; `found` is None where it was not."""

    goal: str
    limit: float
    unit: str
    found: Estimate | None

    @property
    def word(self) -> str:
        """`met`, `missed` or `not measured`; where the interval holds the limit, it says so."""
        if self.found is None:
            return "not measured"
        word = "met" if self.found.value <= self.limit else "missed"
        low, high = self.found.low, self.found.high
        if low is not None and high is not None and low <= self.limit < high:
            return f"{word}, but the interval includes the limit"
        return word


@dataclass(frozen=True)
class LatencyGoal:
    """Of every batch of one size and dtype: patched over original at most `limit`."""

    shape: str
    backend: str
    mode: str
    limit: float

    def is_about(self, group: Any, mode: str, device: str) -> bool:
        """Whether `group`, which has the fields of `latency.Group`, is what the goal is about on that device."""
        batch, dtype = (1, "fp32") if device == "cpu" else (32, "bf16")
        wanted = (self.shape, self.backend, self.mode, batch, dtype)
        return (group.shape, group.backend, mode, group.batch, group.dtype) == wanted


LATENCY_GOALS = (
    LatencyGoal("L", "eager", "shift", 1.008),
    LatencyGoal("L", "compile", "shift", 1.008),
    LatencyGoal("B", "eager", "shift", 1.015),
    LatencyGoal("B", "compile", "shift", 1.015),
    LatencyGoal("Ti", "eager", "shift", 1.02),
    LatencyGoal("L", "eager", "native", 1.006),
    LatencyGoal("L", "compile", "native", 1.006),
)


@dataclass(frozen=True)
class _Row:
    shape: str
    backend: str
    batch: int
    dtype: str


def latency_verdicts(figures: Figures) -> Iterator[Verdict]:
    for goal in LATENCY_GOALS:
        found = None
        for group in figures["groups"]:
            row = _Row(*(group[key] for key in ("shape", "backend", "batch", "dtype")))
            device = group["device"].partition(":")[0]
            if goal.mode in group["modes"] and goal.is_about(row, goal.mode, device):
                found = estimate(group["modes"][goal.mode]["ratio"])
        size = {"L": "ViT-L/14, T = 257", "B": "ViT-B/16, T = 197", "Ti": "ViT-Ti/16, T = 197"}[goal.shape]
        yield Verdict(f"{goal.mode} over original, {size}, {goal.backend}", goal.limit, "", found)


FIND_MODEL, FIND_BLOCK = "vit_base_patch16_224", 5


def find_verdicts(figures: Figures) -> Iterator[Verdict]:
    speed = figures.get("speed")
    about = speed is not None and speed["model"] == FIND_MODEL and speed["settled_block"] == FIND_BLOCK
    for name, way in (("scoring pass of `find`", "b"), ("stage of `find` that sees every image", "scores")):
        found = estimate(speed["ratios"][way]) if speed is not None and about else None
        yield Verdict(f"{name} over a plain forward, ViT-B/16, emergence at block {FIND_BLOCK}", 0.8, "", found)
    memory = figures.get("memory")
    found = None if not memory else Estimate(memory[1]["peak"] / memory[0]["peak"], None, None, 1)
    yield Verdict("peak memory of many images over that of few", 1.05, "", found)
    processes = figures.get("processes")
    found = None if processes is None else estimate(processes["two_over_half"])
    yield Verdict("time of two gloo processes over half the time of one", 1.15, "", found)


def startup_verdicts(figures: Figures) -> Iterator[Verdict]:
    for name, limit in (("regsurgery --help", 0.5), ("import regsurgery", 0.3)):
        row = figures["runs"].get(name)
        yield Verdict(f"`{name}`", limit, "s", None if row is None else estimate(row["seconds"]))


READS = {"verify": 2.0}  # readings of weights that stay on disk: for their checksums, and for all models
SPARE = 0.05  # of one reading, for other files


def patch_verdicts(figures: Figures) -> Iterator[Verdict]:
    largest = max(figures["sizes"], key=lambda size: size["gigabytes"])
    for name, limit in READS.items():
        found = None if name not in largest else Estimate(largest[name]["reads"], None, None, 1)
        yield Verdict(f"readings of weights on disk, `{name}`", limit + SPARE, "", found)


RESIDENT = 8.0  # GB, of any command on any published shape


def rehearsal_verdicts(figures: Figures) -> Iterator[Verdict]:
    for record in figures["models"].values():
        peaks = [cost["peak_mb"] for cost in record["steps"].values()]
        found = None if record["problems"] else Estimate(max(peaks) * 2**20 / 1e9, None, None, 1)
        yield Verdict(f"resident memory of every command, {record['name']}", RESIDENT, "GB", found)


VERDICTS: dict[str, Callable[[Figures], Iterator[Verdict]]] = {
    "latency": latency_verdicts,
    "find": find_verdicts,
    "patch": patch_verdicts,
    "rehearsal": rehearsal_verdicts,
    "startup": startup_verdicts,
}


def estimate(written: Mapping[str, Any]) -> Estimate:
    """What `Estimate.as_dict` wrote."""
    return Estimate(written["value"], written["low"], written["high"], written["n"])
