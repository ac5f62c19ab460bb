from __future__ import annotations

from collections.abc import Iterator

import torch

from regsurgery.search.prefetch import one_ahead, prefetched


def test_without_a_gpu_batches_are_handed_through_one_by_one() -> None:
    given: list[int] = []

    def batches() -> Iterator[tuple[int, torch.Tensor]]:
        for number in range(3):
            given.append(number)
            yield number, torch.full((2,), number)

    for number, batch in prefetched(batches(), torch.device("cpu")):
        assert given == list(range(number + 1)), "nothing is read ahead, and memory stays what it was"
        assert batch.tolist() == [number, number] and not batch.is_pinned()


def test_the_next_is_started_before_one_is_handed_out() -> None:
    events: list[str] = []

    def start(number: int) -> int:
        events.append(f"start {number}")
        return 10 * number

    for value in one_ahead(range(3), start):
        events.append(f"take {value}")
    assert events == ["start 0", "start 1", "take 0", "start 2", "take 10", "take 20"]
    assert list(one_ahead([], start)) == []
