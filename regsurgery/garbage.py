"""Python's garbage collection, paused where it costs much and finds nothing."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

SELDOM = 200_000  # new objects between two collections

_usual: list[tuple[int, int, int]] = []  # the thresholds to return to


def collect_seldom() -> None:
    """Until the first block of `objects_stay` ends, collect seldom: what a command imports before it stays alive, and
    collecting takes a fifth of the time of these imports. For processes that are ours alone.
    """
    if not _usual:
        _usual.append(gc.get_threshold())
        gc.set_threshold(SELDOM, *gc.get_threshold()[1:])


@contextlib.contextmanager
def objects_stay() -> Iterator[None]:
    """Pause garbage collection: what imports and traces make stays alive; collecting took a sixth of the time.

    This applies to the whole process.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # existing objects become the oldest generation, uncollected
            gc.freeze()
            gc.unfreeze()
        if _usual:
            gc.set_threshold(*_usual.pop())
        if collects:
            gc.enable()
