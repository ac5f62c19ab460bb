"""Journals of a search, so that a killed one can continue: sums over images so far, and trials of settings.

Each is one file, replaced as a whole; it belongs to exactly one model, image set and division among processes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regsurgery.checkpoints.whole import replace_file
from regsurgery.search.scores import Sums

INTERVAL = 1.0  # seconds between two entries at first; later a hundredth of the time that has passed
MOST_INTERVALS = 60  # finally this many intervals; entries of large models are megabytes


class Journal:
    """Journal at `path`, or no journal if it is None.

    Args:
        key: identifies what is summed; entries with another key are ignored.
        say: is told what happens to an earlier journal.

    Attributes:
        broken: name -> reason, for the images of these sums that could not be read; written with them.
    """

    def __init__(self, path: Path | None, key: str, say: Callable[[str], None]) -> None:
        self.path, self.key, self.say = path, key, say
        self.started = self.written = time.monotonic()
        self.broken: dict[str, str] = {}

    def resume(self, sums: Sums) -> int:
        """Read the last entry into `sums` and `broken`; returns the number of its last batch, -1 without one."""
        if self.path is None or not self.path.is_file():
            return -1
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("journal", "{}"))
                if facts.get("key") != self.key:
                    self.say(f"{self.path.name}: belongs to another model or other images; starting from scratch")
                    return -1
                for name, tensor in sums.tensors().items():
                    tensor.copy_(file.get_tensor(name))
        except (SafetensorError, OSError, ValueError) as error:
            self.say(f"{self.path.name}: cannot be read ({error}); starting from scratch")
            for tensor in sums.tensors().values():
                tensor.zero_()
            return -1
        self.say(f"continuing {self.path.name}: {sums.num_images} images are done")
        self.broken = facts["broken"]
        return int(facts["batch"])

    def write(self, sums: Sums, batch: int, *, now: bool = False) -> None:
        """Write an entry if the last one is old enough, or if `now`."""
        if self.path is None:
            return
        time_now = time.monotonic()
        interval = INTERVAL * min(MOST_INTERVALS, max(1.0, 0.01 * (time_now - self.started)))
        if not now and time_now - self.written < interval:
            return
        from safetensors.torch import save

        facts = {"key": self.key, "batch": batch, "broken": self.broken}
        replace_file(self.path, save(sums.tensors(), metadata={"journal": json.dumps(facts)}))
        self.written = time_now

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class TrialJournal:
    """Results of trials of settings so far, in the JSON file `path`, or nowhere if it is None.

    Args:
        key: identifies what is tried; trials with another key are ignored.

    Attributes:
        trials: plain data; the search reads and writes it.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.key = path, key
        self.written = time.monotonic()
        self.trials: dict[str, Any] = {}
        if path is None or not path.is_file():
            return
        try:
            facts = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            return  # it is written as a whole, so this is not ours; trials are run again
        if isinstance(facts, dict) and facts.get("key") == key and isinstance(facts.get("trials"), dict):
            self.trials = facts["trials"]

    def write(self) -> None:
        """Write the trials if the last write is long enough ago."""
        if self.path is None or time.monotonic() - self.written < INTERVAL:
            return
        replace_file(self.path, json.dumps({"key": self.key, "trials": self.trials}).encode())
        self.written = time.monotonic()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
