"""Images that change, and far too many of them."""

from __future__ import annotations

import random
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil

from tests.drills import Row, drill, tries
from tests.drills.command import in_process, refused
from tests.drills.running import Forked, ended, heard_signals
from tests.photos import write_photos


def disturb(folder: Path, stop: threading.Event, rng: random.Random) -> None:
    """Remove, empty, replace and add files of `folder` until told to stop."""
    names = sorted(path.name for path in folder.iterdir())
    while not stop.is_set():
        path = folder / rng.choice(names)
        match rng.randrange(4):
            case 0:
                path.unlink(missing_ok=True)
            case 1:
                path.write_bytes(b"")
            case 2:
                path.write_bytes(rng.randbytes(1000))
            case 3:
                (folder / f"new{rng.randrange(99)}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + rng.randbytes(100))
        time.sleep(0.02)


@drill
def images_that_change_meanwhile(place: Path) -> Row:
    """A run on images that change ends with a result or one line, never with a traceback or half a folder."""
    codes, runs = [], tries(2, 4)
    for run in range(runs):
        photos, out, stop = place / "photos", place / "out", threading.Event()
        write_photos(photos, 40)
        thread = threading.Thread(target=disturb, args=(photos, stop, random.Random(run)))
        thread.start()
        try:
            code, _ = ended(Forked(["patch", "demo", "--recipe", "demo", "--images", str(photos), "-o", str(out)]))
        finally:
            stop.set()
            thread.join()
        assert code in (0, 1, 2), code
        assert out.exists() == (code == 0)
        shutil.rmtree(photos)
        shutil.rmtree(out, ignore_errors=True)
        assert list(place.iterdir()) == []
        codes.append(str(code))
    return Row(runs, f"exit codes {', '.join(codes)}")


@drill
def millions_of_pictures(place: Path) -> Row:
    """`--num-images` in the millions: refused, or a run in bounded memory that Ctrl-C ends with 130."""
    for words in ("doctor demo", f"find demo -o {place}/x.yaml", f"patch demo -o {place}/out"):
        refused(in_process(f"{words} --num-images 50000000"))
    process = Forked(["doctor", "demo", "--num-images", "1000000", "-q"], prepare=heard_signals)
    try:
        time.sleep(tries(6, 30))
        own = psutil.Process(process.pid)
        peak_mb = sum(one.memory_info().rss for one in (own, *own.children())) >> 20
        process.send_signal(signal.SIGINT)
        code, _ = ended(process)
    finally:
        process.send_signal(signal.SIGKILL)
    assert code == 130, code
    assert peak_mb < 4000 and list(place.iterdir()) == [], peak_mb
    return Row(4, f"3 refused; a million: {peak_mb} MB, interrupted with 130")
