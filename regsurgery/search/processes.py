"""Several processes on one search: `torchrun` or `accelerate launch` around `regsurgery find`.

The processes share the batches; their sums are added up. Decisions that need few images are made by the first process
and sent to the others, so that all continue alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from regsurgery.errors import RegsurgeryError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(hours=6)  # the other processes wait this long while the first one searches


@dataclass(frozen=True)
class Processes:
    """How many processes there are, and the number of the running one, from 0."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def add_up(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace each tensor, in place, by its sum over the processes."""
        if self.count == 1:
            return
        import torch.distributed as dist

        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        for name in sorted(tensors):
            total = tensors[name].to(device)
            dist.all_reduce(total)
            tensors[name].copy_(total)

    def gathered(self, value: T) -> list[T]:
        """The `value` of every process, by rank; plain data."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[T | None] = [None] * self.count
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def decided_by_first(self, decide: Callable[[], T]) -> T:
        """The first process's `decide()`, in all of them; one of our own errors is raised in all of them as well."""
        if self.count == 1:
            return decide()
        import torch.distributed as dist

        outcome: list[tuple[T | None, RegsurgeryError | None]] = [(None, None)]
        if self.is_first:
            try:
                outcome = [(decide(), None)]
            except RegsurgeryError as error:
                outcome = [(None, error)]
        dist.broadcast_object_list(outcome, src=0)
        result, error = outcome[0]
        if error is not None:
            raise error
        return result  # type: ignore[return-value]


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes that a launcher started (by the environment variables RANK and WORLD_SIZE), or this one alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    import torch
    import torch.distributed as dist

    started_here = not dist.is_initialized()
    if started_here:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        if started_here:
            dist.destroy_process_group()


def is_first_process() -> bool:
    """Whether this process is the one that shows and writes results."""
    return os.environ.get("RANK", "0") == "0"
