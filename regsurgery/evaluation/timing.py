"""Timing in turns: what is compared runs in the same round, in an order that changes from round to round.

A machine that warms up, or that others use, then weighs on all alike. The figure is the ratio of two runs of one round;
its interval, over the rounds, says how far it can be trusted.

Shape suffix: R rounds.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from regsurgery.evaluation.interval import LEVEL, Estimate

WARM_UP = 2
MIN_ROUNDS = 4  # fewer give no interval


def turns(
    ways: Mapping[str, Callable[[], Any]],
    device: torch.device | None = None,
    *,
    warm_up: int = WARM_UP,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[dict[str, float]]:
    """Seconds of one run of every way, round after round, without end; runs that warm up are not told.

    The order is turned round in every round and begins with another way in every second one (of two ways: ABBA BAAB).

    Args:
        device: is waited for before and after every run, unless it is the CPU.
    """
    names = list(ways)
    for number in itertools.count(-warm_up):
        order = names if number % 2 == 0 else names[::-1]
        first = number // 2 % len(names)
        taken = {name: timed(ways[name], device, clock) for name in order[first:] + order[:first]}
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
    """The median with its bootstrapped interval (percentiles); there are at least two values."""
    from scipy import stats

    values_R = np.asarray(values_R, dtype=np.float64)
    found = stats.bootstrap(
        (values_R,), np.median, confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return Estimate(float(np.median(values_R)), float(found.low), float(found.high), len(values_R))


def ratio(rounds: Sequence[Mapping[str, float]], name: str, to: str, seed: int = 0) -> Estimate:
    """The median over the rounds of what way `name` took over what `to` took in the same round."""
    return median([each[name] / each[to] for each in rounds], seed)
