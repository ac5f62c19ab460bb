"""Batches on the device before they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Given = TypeVar("Given")
Started = TypeVar("Started")


def prefetched(batches: Iterable[tuple[int, Tensor]], device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Numbered batches, on the GPU if `device` is one; otherwise they pass through unchanged.

    Each is copied from pinned memory, on its own stream, while the previous one is computed.
    """
    if device.type != "cuda":
        yield from batches
        return
    copying = torch.cuda.Stream(device)

    def start(numbered: tuple[int, Tensor]) -> tuple[int, Tensor]:
        with torch.cuda.stream(copying):
            return numbered[0], numbered[1].pin_memory().to(device, non_blocking=True)

    for number, batch in one_ahead(batches, start):
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        batch.record_stream(computing)
        yield number, batch


def one_ahead(given: Iterable[Given], start: Callable[[Given], Started]) -> Iterator[Started]:
    """Yield `start` of each; `start` of the next one is called before the current one is yielded."""
    waiting: list[Started] = []
    for each in given:
        waiting.append(start(each))
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
