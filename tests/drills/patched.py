"""A patched demo, for drills that need one to begin with: written once in a process."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import regsurgery
from regsurgery.checkpoints.sums import sha256, write_sums
from regsurgery.demo import write_demo
from regsurgery.reporting.live import LIVE_FILES


@functools.cache
def _demo() -> tuple[Path, Path]:
    """The demo as a folder, and what `patch` wrote from it."""
    place = Path(tempfile.mkdtemp(prefix="drill-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    write_demo(place / "model")
    regsurgery.patch(str(place / "model"), place / "patched", recipe="demo", num_images=2)
    return place / "model", place / "patched"


def demo(target: Path) -> Path:
    """The demo as the new folder `target`."""
    return shutil.copytree(_demo()[0], target)


def patched_demo(target: Path) -> Path:
    """The patched demo as the new folder `target`."""
    return shutil.copytree(_demo()[1], target)


def another(patched: Path, target: Path) -> Path:
    """A patched folder of which every file that is pushed as it is differs from that of `patched`."""
    shutil.copytree(patched, target)
    for path in target.iterdir():
        if path.suffix in (".safetensors", ".md", ".png", ".txt"):
            content = path.read_bytes()
            path.write_bytes(content + b" " if path.suffix == ".md" else content[:-1] + bytes([content[-1] ^ 1]))
    write_sums(target)
    return target


def with_report(patched: Path) -> Path:
    """`patched`, beside which a report and a live page lie; of them only what a push looks at."""
    report = patched.with_name(f"{patched.name}-report.html")
    live = patched.with_name(f"{patched.name}-report-live")
    live.mkdir(exist_ok=True)
    for name in LIVE_FILES:
        (live / name).write_bytes(f"{name} of {patched.name}".encode())
    (live / "index.html").write_text(f'<a href="../{report.name}">Back</a>')
    meta = f'<meta name="regsurgery-folder" content="{sha256(patched / "SHA256SUMS")}">'
    report.write_text(f'{meta}<a href="{live.name}/index.html">Try it</a>')
    return patched
