"""Scores -> the smallest set of neurons that suppresses the outliers, shifted onto one register.

This is the paper's setting, and where the search for the most faithful one begins (`faithful.py`).

The search needs no number set by hand. It starts with the neurons that have made outliers by themselves, and with those
that do so once the first are shifted, since outliers can mask others. While outliers remain, further candidates join in
the order of their contribution, in growing groups, as long as the outliers shrink and the register takes over their
norm. Then every member must prove itself: it stays if without it an outlier comes back or the former outliers grow, or
if it was idle on the trial images, which then say nothing about it. Finally, the parts of a neuron that is spread over
several are put together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from regsurgery.search.scores import Candidate, Sums, candidates
from regsurgery.search.trials import Glance, Neurons, Trials

MAX_CANDIDATES = 256
GONE = 0.05  # outliers per image that may remain; the limit of verification
GAIN = 0.01  # share of the original excess that a group must take away to join
MAX_ROUNDS = 8  # of looking for masked neurons
PATIENCE = 16  # the search ends after this many useless candidates in a row
STARVED = 0.5  # of the removed outliers' norm; a register with a smaller share does not do their work
NEEDED = 0.05  # relative growth of the former outliers by which a member proves itself
SAME = 0.99  # two neurons are parts of one if the cosine of their activations over patches is at least this
PART = 0.01  # share of what its other part writes that a part must write


@dataclass(frozen=True)
class Selection:
    """The chosen neurons, `(block, neuron)` ascending.

    Attributes:
        glance: what they do, up to the last block that can be a cause.
        starved: whether the register fails to take over the norm of the outliers.
    """

    neurons: tuple[tuple[int, int], ...]
    glance: Glance
    starved: bool

    @property
    def suppressed(self) -> bool:
        return self.glance.outliers <= GONE and not self.starved


def select(
    trials: Trials,
    ranked: Sequence[Candidate],
    seen: Sums,
    pilot: Sequence[Tensor],
    progress: Callable[[int], None] = lambda done: None,
) -> Selection:
    """Search among `ranked`, best first.

    Args:
        seen: the sums over only the trial images.
        pilot: batches of images, more than those of the trials, on which to look for masked neurons.
        progress: called with 1 after every trial.
    """

    def glance(neurons: Neurons) -> Glance:
        found = trials.glance(neurons)
        progress(1)
        return found

    def starved(found: Glance) -> bool:
        gone = 1 - found.outliers / trials.original.outliers
        return found.register_norm < STARVED * gone * trials.outlier_norm

    makers = _makers(trials, ranked, pilot)
    chosen, current = _grow(trials, ranked, makers, glance, starved)
    idle = {
        (block, neuron) for block, neuron in makers if block >= len(seen.alone_H) or not seen.alone_H[block][neuron]
    }
    chosen, current = _prune(chosen, idle, current, glance, starved)
    whole = _with_parts(trials, chosen, idle)
    if len(whole) > len(chosen):
        chosen, current = whole, glance(whole)
    return Selection(tuple(sorted(chosen)), current, bool(chosen) and starved(current))


def _makers(trials: Trials, ranked: Sequence[Candidate], pilot: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The candidates that have made outliers by themselves; then those that do so once all found so far are shifted."""
    makers = [(candidate.block, candidate.neuron) for candidate in ranked if candidate.alone]
    for _ in range(MAX_ROUNDS):
        scorer, sums = trials.scores(makers, pilot)
        if not makers or sums.num_outliers <= GONE * sums.num_images:
            break
        unmasked = [
            (candidate.block, candidate.neuron)
            for candidate in candidates(sums, scorer.columns_H, MAX_CANDIDATES)
            if candidate.alone and (candidate.block, candidate.neuron) not in makers
        ]
        if not unmasked:
            break
        makers += unmasked
    return makers


def _grow(
    trials: Trials,
    ranked: Sequence[Candidate],
    makers: Neurons,
    glance: Callable[[Neurons], Glance],
    starved: Callable[[Glance], bool],
) -> tuple[list[tuple[int, int]], Glance]:
    chosen: list[tuple[int, int]] = []
    current = trials.original
    enough = GAIN * (current.excess - 1)
    if makers and not starved(found := glance(makers)):
        chosen, current = list(makers), found
    queue = [at for candidate in ranked if (at := (candidate.block, candidate.neuron)) not in chosen]
    size, idle = 1, 0
    while queue and idle < PATIENCE and (current.outliers > GONE or not chosen):
        group = queue[:size]
        found = glance(chosen + group)
        gains = found.outliers <= current.outliers and current.excess - found.excess >= enough and not starved(found)
        if gains:
            chosen, current, idle = chosen + group, found, 0
            queue, size = queue[size:], 2 * size
        elif size > 1:
            size = 1  # one of the group may still be useful
        else:
            queue, idle = queue[1:], idle + 1
    return chosen, current


def _prune(
    chosen: list[tuple[int, int]],
    idle: Collection[tuple[int, int]],
    current: Glance,
    glance: Callable[[Neurons], Glance],
    starved: Callable[[Glance], bool],
) -> tuple[list[tuple[int, int]], Glance]:
    for member in [member for member in reversed(chosen) if member not in idle]:
        if len(chosen) == 1:
            break
        rest = [neuron for neuron in chosen if neuron != member]
        found = glance(rest)
        same = found.outliers <= current.outliers and found.excess <= (1 + NEEDED) * current.excess
        if same and not starved(found):
            chosen, current = rest, found
    return chosen, current


def _with_parts(
    trials: Trials, chosen: Sequence[tuple[int, int]], idle: Collection[tuple[int, int]]
) -> list[tuple[int, int]]:
    """`chosen` and the neurons that fire exactly as one of them does: a neuron may be spread over several."""
    whole = list(chosen)
    for block in sorted({block for block, _ in chosen}):
        members = [neuron for at, neuron in chosen if at == block and (at, neuron) not in idle]
        activation_PH, column_H = trials.activations(block)
        norm_H = activation_PH.norm(dim=0)
        written_H = norm_H * column_H
        for member in members:
            cosine_H = (activation_PH.T @ activation_PH[:, member]) / (norm_H * norm_H[member])
            parts = (cosine_H >= SAME) & (written_H >= PART * written_H[member])
            whole += [at for part in parts.nonzero().flatten().tolist() if (at := (block, part)) not in whole]
    return whole
