"""Standard streams that are closed or full, and little memory."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from regsurgery.checkpoints.sums import check_sums
from tests.drills import Row, drill, tries
from tests.drills.command import command

STREAMS = {">&-": 0, "<&- >&- 2>&-": 0, ">/dev/full": 2, "2>/dev/full": 2, "| head -0; exit ${PIPESTATUS[0]}": 141}
LIMITS_MB = (500, 1500, 2500, 3500)


@drill
def closed_and_full_streams(place: Path) -> Row:
    """A closed or full stream ends a run with its exit code, no traceback, and a whole folder or none."""
    out, ended = place / "out", Counter()
    for stream, code in list(STREAMS.items())[tries(1, 0) :: tries(2, 1)]:
        for form in ("", "--json")[: tries(1, 2)]:
            done = command(f"patch demo --recipe demo --num-images 2 -o {out} {form}", after=stream)
            # With --json nothing is written to stderr, so that it does not matter.
            wanted = 0 if stream.startswith("2>") and form else code
            assert done.code == wanted and "Traceback" not in done.err, (stream, done)
            if out.exists():
                check_sums(out)
                shutil.rmtree(out)
            assert list(place.iterdir()) == []
            ended[done.code] += 1
    return Row(ended.total(), ", ".join(f"exit code {code} {count} times" for code, count in sorted(ended.items())))


@drill
def little_memory(place: Path) -> Row:
    """Under any limit of memory a run is whole, or says in one line that memory is short (C++ of torch may abort)."""
    out, ended = place / "out", Counter()
    for limit in LIMITS_MB[:: tries(2, 1)]:
        done = command(f"patch demo --recipe demo --num-images 2 -o {out}", before=f"ulimit -v {limit * 1000};")
        short = any(line.startswith("error: memory is short") for line in done.err.splitlines())
        assert (done.code == 71 and short and "Traceback" not in done.err) or done.code in (0, 134), done
        if out.exists():
            check_sums(out)
            shutil.rmtree(out)
        assert list(place.iterdir()) == []
        ended[{0: "whole", 71: "memory is short", 134: "torch aborted"}[done.code]] += 1
    return Row(ended.total(), ", ".join(f"{what} {count} times" for what, count in ended.items()))
