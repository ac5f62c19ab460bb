"""The run: every input under an alarm, in one process with bounded memory, and nothing may be left behind."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.fuzz.bases import Bases, build
from tests.fuzz.kinds import KINDS, Kind

SECONDS = 5.0  # for one input
GROWTH_MB = 500  # of the process's peak over its start
TOLD_EVERY = 1000
LIMIT_MB = 4000  # of address space over its start: an absurd allocation is an error, not a machine without memory


class HangError(BaseException):
    """Not an `Exception`, so that no library swallows it."""


@dataclass
class Outcome:
    """How many inputs ended where, and what went wrong."""

    inputs: int = 0
    seconds: float = 0.0
    ended: dict[str, Counter[str]] = field(default_factory=dict)
    spent: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    growth_mb: float = 0.0
    slowest: tuple[float, str] = (0.0, "")
    largest: tuple[float, str] = (0.0, "")

    def table(self) -> str:
        columns = sorted({name for counter in self.ended.values() for name in counter})
        rows = [["", *columns, "all", "ms each"]]
        for kind, counter in self.ended.items():
            rows.append([kind, *(str(counter[name] or "-") for name in columns), str(counter.total()),
                         f"{1000 * self.spent[kind] / max(counter.total(), 1):.0f}"])  # fmt: skip
        total = sum(self.ended.values(), Counter())
        rows.append(["all", *(str(total[name]) for name in columns), str(total.total()), ""])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = []
        for first, *others in rows:
            cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *cells]))
        lines.append(
            f"{self.inputs} inputs in {self.seconds:.0f} s, {self.inputs / max(self.seconds, 1e-9):.0f} a second; peak "
            f"RSS grew by {self.growth_mb:.0f} MB, at most by {self.largest[0]:.0f} MB at once ({self.largest[1]}); "
            f"slowest {self.slowest[0]:.2f} s ({self.slowest[1]}); {len(self.failures)} failures"
        )
        return "\n".join(lines)


def fuzz(
    inputs: int, seed: int, *, only: str = "", first: int = 0, keep: Path | None = None, stop_after: int = 50
) -> Outcome:
    """Run inputs `first`, ... of `seed`; input n of a seed is the same one in every run.

    Args:
        only: kinds whose name contains it.
        keep: where the folder of an input that fails is copied.
        stop_after: failures.
    """
    kinds = {name: kind for name, kind in KINDS.items() if only in name}
    outcome = Outcome(ended={name: Counter() for name in kinds})
    with _workplace() as place:
        bases = build(place / "bases")
        for warm in ("vit", "timm", "open_clip", "adapter"):  # what the libraries import and cache is no growth
            _warm(bases.folders[warm])
        before = _peak_mb()
        with _limited():
            started = time.monotonic()
            for number in range(first, first + inputs):
                rng = Random(f"{seed}/{number}")
                name = rng.choices(list(kinds), [kind.weight for kind in kinds.values()])[0]
                _one(rng, f"{seed}/{number} {name}", kinds[name], bases, place, outcome, outcome.ended[name], keep)
                if outcome.inputs % TOLD_EVERY == 0:
                    outcome.seconds, outcome.growth_mb = time.monotonic() - started, _peak_mb() - before
                    print(outcome.table(), file=sys.stderr, flush=True)
                if len(outcome.failures) >= stop_after:
                    break
            outcome.seconds = time.monotonic() - started
        outcome.growth_mb = _peak_mb() - before
    if outcome.growth_mb > GROWTH_MB:
        outcome.failures.append(f"memory: the peak grew by {outcome.growth_mb:.0f} MB, at most by {outcome.largest}")
    return outcome


def _one(
    rng: Random,
    label: str,
    kind: Kind,
    bases: Bases,
    place: Path,
    outcome: Outcome,
    ended: Counter[str],
    keep: Path | None,
) -> None:
    from regsurgery.errors import RegsurgeryError

    case = place / "case"
    base = rng.choice(kind.bases)
    shutil.copytree(bases.folders[base], case / "model")
    kind.damage(rng, case / "model")
    expected = {path.name for path in case.iterdir()} | {"restored"}
    label += f" ({base})"
    peak, started, problem = _peak_mb(), time.monotonic(), ""
    try:
        with _alarm(SECONDS), contextlib.redirect_stdout(io.StringIO()):
            kind.run(rng, case / "model", bases)
        end = "accepted"
    except RegsurgeryError as error:
        end = type(error).__name__
        if not str(error).strip() or len(str(error)) > 2000:
            problem = f"a message of {len(str(error))} characters: {str(error)[:300]!r}"
    except HangError:
        end, problem = "HANG", f"no end after {SECONDS} s\n{traceback.format_exc()}"
    except Exception as error:  # every other one is what this looks for
        end, problem = f"{type(error).__name__}!", traceback.format_exc()
    seconds, grown = time.monotonic() - started, _peak_mb() - peak
    outcome.inputs += 1
    outcome.spent[label.split(" ", 1)[1].rpartition(" (")[0]] += seconds
    ended[end] += 1
    outcome.slowest = max(outcome.slowest, (seconds, label))
    outcome.largest = max(outcome.largest, (grown, label))
    if seconds > SECONDS and not problem:
        problem = f"took {seconds:.1f} s"
    stray = sorted(str(path) for path in case.iterdir() if path.name not in expected)
    stray += [str(path) for path in (place / "cwd").iterdir()]
    gc.collect(0)
    if stray:
        problem = problem or f"left behind: {stray}"
    if problem:
        outcome.failures.append(f"{label}: {problem}")
        print(outcome.failures[-1], file=sys.stderr, flush=True)
        if keep is not None:
            _keep(case, keep / label.replace("/", "-").replace(" ", "_"))
    for path in (case, *(place / "cwd").iterdir(), *(place / "tmp").iterdir()):
        shutil.rmtree(path, ignore_errors=True)


def _keep(case: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(case, target, symlinks=True, ignore=_pipes)


def _pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_fifo()]


def _warm(folder: Path) -> None:
    from regsurgery.frontends.load import load

    load(str(folder))


@contextlib.contextmanager
def _workplace() -> Iterator[Path]:
    """A folder with `cwd`, `tmp` and `bases` in it; the process works in `cwd`, temporary files go to `tmp`."""
    here, old = Path.cwd(), tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        place = Path(root)
        for name in ("cwd", "tmp", "bases"):
            (place / name).mkdir()
        os.chdir(place / "cwd")
        tempfile.tempdir = str(place / "tmp")
        try:
            yield place
        finally:
            os.chdir(here)
            tempfile.tempdir = old


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def hang(*_: object) -> None:
        raise HangError

    old = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(20 * seconds, exit=True)  # C code that never comes back
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + LIMIT_MB * 2**20, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
