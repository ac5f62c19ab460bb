"""Models that take turns, so that weights on disk are read once for all of them.

Each runs in a thread of its own, one of them at a time. A weight that one has read is held until all have taken it.
Whoever needs another one while much is held waits for the others to come as far. So all go through the weights side by
side, whatever they are made of: graphs, or modules of a library. What only some of them need does not stop the others:
once nobody asks for what is held, the oldest of it is given up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

HELD_BYTES = 1 << 26  # small weights held at a time; a larger one is held alone
Place = tuple[int, ...]  # of a weight: the file's device and inode, first byte and size
Result = TypeVar("Result")
_thread = threading.local()


class _Abandoned(BaseException):
    """Ends a call whose result nobody waits for."""


class _Held(NamedTuple):
    data: Tensor
    takers: set[int]


class _Turns:
    """Whose turn it is, and what is held. All but `go` and `abandon` is for the thread whose turn it is."""

    def __init__(self, count: int) -> None:
        self.running = list(range(count))
        self.stuck: set[int] = set()  # those that need what is not held, with no room for it
        self.held: dict[Place, _Held] = {}
        self.results: dict[int, object] = {}
        self.error: BaseException | None = None
        self.abandoned = False
        self._may_go = [threading.Semaphore(0) for _ in range(count)]

    def go(self, number: int) -> None:
        self._may_go[number].release()

    def abandon(self) -> None:
        self.abandoned = True
        for number in range(len(self._may_go)):
            self.go(number)

    def run(self, number: int, call: Callable[[], object], gradients: bool) -> None:
        """The thread of one call."""
        _thread.turns, _thread.number = self, number
        try:
            self._wait(number)
            with torch.set_grad_enabled(gradients):
                self.results[number] = call()
        except _Abandoned:
            return
        except BaseException as error:  # raised again by `in_turns`
            self.error = self.error or error
            self.abandon()
            return
        self.running.remove(number)
        self._let_go()
        if self.running:
            self.go(self._next(number))

    def take(self, number: int, place: Place, load: Callable[[], Tensor]) -> Tensor:
        """The weight at `place`, held or read now."""
        if self.abandoned:
            raise _Abandoned
        while place not in self.held and self.held and self._size() + place[-1] > HELD_BYTES:
            self.stuck.add(number)
            if self.stuck.issuperset(self.running):
                self.held.pop(next(iter(self.held)))
                self.stuck.clear()
            else:
                self.go(self._next(number))
                self._wait(number)
        if place not in self.held:
            self.held[place] = _Held(load(), set())
        data, takers = self.held[place]
        takers.add(number)
        self._let_go()
        return data

    def _let_go(self) -> None:
        """After a change of what is held or who runs: give up what all have, and everybody may try again."""
        self.held = {place: held for place, held in self.held.items() if not held.takers.issuperset(self.running)}
        self.stuck.clear()

    def _size(self) -> int:
        return sum(place[-1] for place in self.held)

    def _next(self, number: int) -> int:
        """The next after `number` that is not stuck."""
        able = [other for other in self.running if other not in self.stuck]
        return next((other for other in able if other > number), able[0])

    def _wait(self, number: int) -> None:
        self._may_go[number].acquire()
        if self.abandoned:
            raise _Abandoned


def in_turns(calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """What each of `calls` returns. None of them may wait for another.

    Raises:
        BaseException: the first that one of them raises; the others end at the next weight that they read.
    """
    if len(calls) < 2:
        return [call() for call in calls]
    turns, gradients = _Turns(len(calls)), torch.is_grad_enabled()
    threads = [
        threading.Thread(target=turns.run, args=(number, call, gradients), daemon=True)
        for number, call in enumerate(calls)
    ]
    for thread in threads:
        thread.start()
    try:
        turns.go(0)
        for thread in threads:
            thread.join()
    except BaseException:  # an interrupt
        turns.abandon()
        for thread in threads:
            thread.join()
        raise
    if turns.error is not None:
        raise turns.error
    return [turns.results[number] for number in range(len(calls))]  # type: ignore[misc]


def taken(place: Place, load: Callable[[], Tensor]) -> Tensor:
    """The weight at `place`: read by `load`, or shortly before by another call of the same `in_turns`."""
    turns: _Turns | None = getattr(_thread, "turns", None)
    return load() if turns is None else turns.take(_thread.number, place, load)
