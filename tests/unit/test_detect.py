"""The search for the smallest set, on made-up models whose every outlier is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from regsurgery.search.decide import second_size
from regsurgery.search.scores import Candidate, Sums
from regsurgery.search.selection import PATIENCE, select
from regsurgery.search.trials import Glance

HIDDEN = 64
NORM = 40.0


@dataclass
class MadeUp:
    """A model of one block in which the outlier `i` goes when the neurons `outliers[i]` are shifted, all of them.

    Stands for `Trials`. The register has the outliers' norm as far as they went, unless one of `starving` is shifted.
    """

    outliers: Sequence[set[int]]
    starving: set[int] = field(default_factory=set)
    masked: dict[int, int] = field(default_factory=dict)  # neuron -> outlier, of neurons that fire only after others
    outlier_norm: float = NORM
    glances: int = 0

    @property
    def original(self) -> Glance:
        return self._glance(set())

    def glance(self, neurons: Sequence[tuple[int, int]]) -> Glance:
        self.glances += 1
        return self._glance({neuron for _, neuron in neurons})

    def _glance(self, shifted: set[int]) -> Glance:
        left = sum(len(causes - shifted) / len(causes) for causes in self.outliers)
        count = sum(bool(causes - shifted) for causes in self.outliers)
        gone = 1 - count / len(self.outliers)
        register = 1.0 if shifted & self.starving else gone * NORM
        return Glance(float(count), 1 + 39 * left / len(self.outliers), register)

    def scores(self, neurons: Sequence[tuple[int, int]], images: Any) -> tuple[Any, Sums]:
        shifted = {neuron for _, neuron in neurons}
        sums = Sums([HIDDEN])
        active = [causes - shifted for causes in self.outliers if causes - shifted]
        sums.counts[:] = torch.tensor([8, 8 * 64, len(active), 8.0])
        for causes in active:
            for neuron in causes:
                if len(causes) == 1 and (neuron not in self.masked or self.masked[neuron] in shifted):
                    sums.alone_H[0][neuron] += 1
                    sums.outliers_H[0][neuron] += 1
        scorer = type("Scorer", (), {"columns_H": [torch.ones(HIDDEN)]})
        return scorer, sums

    def activations(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.eye(HIDDEN), torch.ones(HIDDEN)


def ranked(*neurons: int, alone: Sequence[int] = ()) -> list[Candidate]:
    return [Candidate(0, neuron, 1.0, 100.0 - place, int(neuron in alone)) for place, neuron in enumerate(neurons)]


def chosen(model: MadeUp, candidates: list[Candidate], idle: Sequence[int] = ()) -> list[int]:
    seen = Sums([HIDDEN])
    for candidate in candidates:
        seen.alone_H[0][candidate.neuron] = float(candidate.alone and candidate.neuron not in idle)
    selection = select(model, candidates, seen, [])  # type: ignore[arg-type]
    return [neuron for _, neuron in selection.neurons]


def test_a_maker_that_brings_nothing_back_is_dropped_unless_it_was_idle() -> None:
    model = MadeUp([{1}, {2}])
    assert chosen(model, ranked(1, 2, 3, alone=(1, 2, 3))) == [1, 2]
    assert chosen(model, ranked(1, 2, 3, alone=(1, 2, 3)), idle=[3]) == [1, 2, 3]


def test_neurons_that_make_outliers_only_together_join_by_their_contribution() -> None:
    assert chosen(MadeUp([{1, 2, 3}, {1, 2, 4}]), ranked(9, 1, 8, 2, 3, 7, 4)) == [1, 2, 3, 4]


def test_masked_neurons_are_found_once_the_others_are_shifted() -> None:
    model = MadeUp([{1}, {2}, {3}], masked={2: 1, 3: 2})
    assert chosen(model, ranked(1, alone=(1,))) == [1, 2, 3]


def test_a_set_that_starves_the_register_is_never_chosen() -> None:
    model = MadeUp([{1}, {2}], starving={5})
    assert chosen(model, ranked(5, 1, 2, alone=(5, 1, 2))) == [1, 2]
    hopeless = MadeUp([{1}], starving={1})
    assert chosen(hopeless, ranked(1, alone=(1,))) == []


def test_the_search_gives_up_after_candidates_that_bring_nothing() -> None:
    model = MadeUp([{60}])
    assert chosen(model, ranked(*range(50))) == []
    assert model.glances == PATIENCE


@pytest.mark.parametrize(
    ("size", "num_patches", "second"),
    [((224, 224), 196, (336, 336)), ((518, 518), 1369, (350, 350)), ((64, 96), 96, (96, 144))],
)
def test_the_second_size_has_whole_patches(size: tuple, num_patches: int, second: tuple) -> None:
    assert second_size(size, num_patches) == second
