"""Calls that take turns read what they share once, and hold little of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from regsurgery.checkpoints.turns import HELD_BYTES, Place, in_turns, taken

SMALL, LARGE = HELD_BYTES // 4, HELD_BYTES + 1
Call = Callable[[Sequence[Place]], Callable[[], list[int]]]


def places(file: int, size: int = LARGE) -> list[Place]:
    return [(0, file, start, size) for start in range(12)]


@pytest.fixture
def loads() -> Counter[Place]:
    return Counter()


@pytest.fixture
def taking(loads: Counter[Place]) -> Call:
    """Places -> a call that takes the weights there, one after the other, and returns their values."""

    def load(place: Place) -> Tensor:
        loads[place] += 1
        return torch.tensor(place[2])

    return lambda wanted: lambda: [int(taken(place, lambda place=place: load(place))) for place in wanted]


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_every_weight_is_read_once(taking: Call, loads: Counter[Place], size: int) -> None:
    wanted = places(1, size)
    found = in_turns([taking(wanted), taking(wanted), taking(wanted[3:])])
    assert found == [list(range(12)), list(range(12)), list(range(3, 12))]
    assert set(loads.values()) == {1} and len(loads) == 12
    assert taking(wanted)() == list(range(12)) and set(loads.values()) == {2}  # nothing is held afterwards


def test_neighbours_in_another_order_are_read_once(taking: Call, loads: Counter[Place]) -> None:
    wanted = places(1, SMALL)
    swapped = [wanted[number ^ 1] for number in range(12)]
    assert in_turns([taking(wanted), taking(swapped)])[1] == [number ^ 1 for number in range(12)]
    assert set(loads.values()) == {1}


def test_what_only_some_need_stops_nobody(taking: Call, loads: Counter[Place]) -> None:
    """As where native mode's stock model has a file of its own, and one of two has a further weight."""
    one, other = places(1), places(2)
    found = in_turns([taking(one), taking(other), taking([*one[:5], (0, 3, 0, SMALL), *one[5:]]), taking(other)])
    assert list(map(len, found)) == [12, 12, 13, 12]
    assert set(loads.values()) == {1} and len(loads) == 25


def test_little_is_held(taking: Call) -> None:
    """Nobody is more than one large weight ahead of another."""
    ahead, steps = [0], [0, 0]

    def walking(number: int) -> Callable[[], None]:
        def walk() -> None:
            for place in places(1):
                taking([place])()
                steps[number] += 1
                ahead.append(abs(steps[0] - steps[1]))

        return walk

    in_turns([walking(0), walking(1)])
    assert steps == [12, 12] and max(ahead) == 1


def test_an_error_ends_all(taking: Call) -> None:
    done: list[int] = []

    def failing() -> list[int]:
        taking(places(1)[:3])()
        raise ValueError("in the second")

    def whole() -> list[int]:
        found = taking(places(1))()
        done.append(1)
        return found

    with pytest.raises(ValueError, match="in the second"):
        in_turns([whole, failing, whole])
    assert not done


def test_gradients_are_recorded_as_outside(taking: Call) -> None:
    with torch.no_grad():
        assert in_turns([torch.is_grad_enabled] * 2) == [False, False]
    assert in_turns([torch.is_grad_enabled] * 2) == [True, True]
