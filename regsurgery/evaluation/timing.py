"""Timing in turns: everything that is compared runs in the same round, in an order that changes between rounds.

Warm-up and other load on the machine then affect all alike. The figure is the ratio of two runs in one round; its
interval, over the rounds, says how far it can be trusted.

Shape suffix: R rounds.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from regsurgery.interval import LEVEL, Estimate

WARM_UP = 2
MIN_ROUNDS = 4  # fewer give no interval


def turns(
    ways: Mapping[str, Callable[[], Any]],
    device: torch.device | None = None,
    *,
    warm_up: int = WARM_UP,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[dict[str, float]]:
    """Seconds of one run of every way, round after round, without end; warm-up runs are not reported.

    The order is drawn at random for every second round and reversed in the next (with two ways: AB BA or BA AB). A
    fixed order would not do: what a run leaves in caches and in the heap slows down, or speeds up, the next one.

    Args:
        device: is synchronised before and after every run, unless it is the CPU.
    """
    names, rng = list(ways), random.Random(0)
    order: list[str] = []
    for number in itertools.count(-warm_up):
        order = order[::-1] if number % 2 else rng.sample(names, len(names))
        taken = {name: timed(ways[name], device, clock) for name in order or names}
        if number >= 0:
            yield {name: taken[name] for name in names}


@torch.no_grad()
def timed(
    run: Callable[[], Any], device: torch.device | None = None, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of one run, without autograd."""
    _wait(device)
    started = clock()
    run()
    _wait(device)
    return clock() - started


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)


def median(values_R: np.ndarray | Sequence[float], seed: int = 0) -> Estimate:
    """The median with its bootstrapped interval (percentiles); takes at least two values."""
    from scipy import stats

    values_R = np.asarray(values_R, dtype=np.float64)
    found = stats.bootstrap(
        (values_R,), np.median, confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return Estimate(float(np.median(values_R)), float(found.low), float(found.high), len(values_R))


def ratio(rounds: Sequence[Mapping[str, float]], name: str, to: str, seed: int = 0) -> Estimate:
    """The median over the rounds of the time of `name` divided by the time of `to` in the same round."""
    return median([each[name] / each[to] for each in rounds], seed)
