"""Where output and temporary files cannot be written, or others write at the same time."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from regsurgery.checkpoints.owned import OwnedFolder
from regsurgery.checkpoints.sums import check_sums
from tests.drills import Row, drill, tries
from tests.drills.running import ended, heard_signals, patch, wait

SIZES = (64, 256, 512, 1024)  # KiB of room; a patched demo has about 1,100


def refused(code: int, said: str) -> None:
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, (code, said)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[bool]:
    """A tmpfs on the new `folder`; False where this user may not mount."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def limit(kibibytes: int) -> None:
    """In the new process, no file gets larger; writing more is an error."""
    heard_signals()
    sys.dont_write_bytecode = True  # or each later import of a module would read the start of a .pyc
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kibibytes << 10, kibibytes << 10))


@drill
def a_full_disk(place: Path) -> Row:
    """Without room for the output or for temporary files, one line says so, and nothing is left."""
    tried, how = 0, "tmpfs"
    for size in SIZES[:: tries(3, 1)]:
        for full in ("target", "tmp"):
            target, tmp = place / "target", place / "tmp"
            with mounted(place / full, f"size={size}k") as is_mounted:
                (place / ("tmp" if full == "target" else "target")).mkdir()
                how = how if is_mounted else "RLIMIT_FSIZE"
                prepare = heard_signals if is_mounted else partial(limit, size)
                process = patch("demo", target / "out", env={"TMPDIR": str(tmp)}, prepare=prepare)
                code, said = ended(process)
                if code == 0:
                    assert full == "tmp" or size == max(SIZES)
                    check_sums(target / "out")
                    shutil.rmtree(target / "out")
                else:
                    refused(code, said)
                left = [*target.iterdir(), *tmp.iterdir()]
                assert not left, left
                (place / ("tmp" if full == "target" else "target")).rmdir()
            tried += 1
    return Row(tried, f"an error of one line, nothing left ({how})")


@drill
def a_place_that_is_read_only(place: Path) -> Row:
    """Output and temporary files in a place that cannot be written to: one line says so."""
    with mounted(place / "locked", "ro") as is_mounted:
        (place / "free").mkdir()
        how = "tmpfs" if is_mounted else "permissions"
        if not is_mounted:
            (place / "locked").chmod(0o500)
        for target, tmp in (("locked", "free"), ("free", "locked")):
            process = patch("demo", place / target / "out", env={"TMPDIR": str(place / tmp)}, cwd=place / "locked")
            code, said = ended(process)
            if target == "locked":
                refused(code, said)
                assert "not writable" in said
            elif code == 0:  # Python finds another folder for temporary files
                check_sums(place / target / "out")
                shutil.rmtree(place / target / "out")
            else:
                refused(code, said)
        assert not list((place / "free").iterdir())
    return Row(2, f"refused before anything is read, or written whole ({how})")


@drill
def one_output_twice(place: Path) -> Row:
    """Two runs with one output: one has it, whole, and the other says so; neither removes the other's work."""
    seen, count = Counter[str](), tries(2, 5)
    for _ in range(count):
        processes = [patch("demo", place / "out") for _ in range(2)]
        ends = [ended(process) for process in processes]
        assert sorted(code for code, _ in ends) == [0, 2], ends
        (said,) = (said for code, said in ends if code)
        refused(2, said)
        assert "already exists" in said or "another run has written it meanwhile" in said, said
        seen["another run has written it" if "meanwhile" in said else "already exists"] += 1
        check_sums(place / "out")
        assert [path.name for path in place.iterdir()] == ["out"]
        shutil.rmtree(place / "out")
    return Row(count, "; ".join(f"the second was told '{what}' {often} times" for what, often in seen.items()))


@drill
def process_ids_that_repeat(place: Path) -> Row:
    """What a run killed as process 1 of a container left is removed by the next process 1, a living one's is not."""
    before = ["unshare", "--pid", "--fork", "--kill-child"]
    allowed = subprocess.run([*before, "true"], capture_output=True).returncode == 0
    if not allowed:
        before = []  # then process ids do not repeat, and the lock alone decides
    target, tmp, count = place / "target", place / "tmp", tries(1, 3)
    target.mkdir()
    tmp.mkdir()
    with OwnedFolder(target, ".out.partial-") as living:
        for _ in range(count):
            process = patch("demo", target / "out", before=before, env={"TMPDIR": str(tmp)})
            assert wait(lambda: len(os.listdir(target)) == 2, process), process.communicate()
            process.send_signal(signal.SIGKILL)  # `unshare` takes its child with it
            process.communicate()
            assert len(os.listdir(target)) == 2, "the killed run left its folder"
            assert ended(patch("demo", target / "out", before=before, env={"TMPDIR": str(tmp)}))[0] == 0
            check_sums(target / "out")
            assert sorted(os.listdir(target)) == [living.name, "out"] and not os.listdir(tmp)
            shutil.rmtree(target / "out")
    how = "pid namespaces" if allowed else "no namespaces allowed here"
    return Row(count, f"removed; the living run's was kept ({how})")
