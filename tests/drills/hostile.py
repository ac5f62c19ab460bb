"""Folders that are meant to do harm, given to every command that opens one."""

from __future__ import annotations

import base64
import json
import os
import resource
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from regsurgery.checkpoints.sums import SUMS_NAME, write_sums
from tests.drills import Row, drill
from tests.drills.command import in_process, refused
from tests.drills.patched import demo, patched_demo

MARKER = "it ran"
GROWTH_MB = 1500  # of address space, in a command
OF_PATCHED = ("verify {} --num-images 2", "report {} --num-images 2", "eval fidelity {} --num-images 2",
              "unpatch {} -o {}-restored", "push {} user/name --dry-run", "reproduce {}",
              "check {} --num-images 2")  # fmt: skip
OF_MODEL = ("doctor {} --num-images 2", "find {} --num-images 2 -o {}.yaml", "patch {} -o {}-out --num-images 2")


def loader(folder: Path) -> None:
    with (folder / "modeling_regsurgery.py").open("a") as file:
        file.write(f"\nopen({str(folder.parent / MARKER)!r}, 'w').close()\n")
    write_sums(folder)


def bomb(folder: Path) -> None:
    path = folder / "regsurgery_original.json"
    record = json.loads(path.read_text())
    zeros = base64.b64encode(zlib.compress(bytes(16_000_000), 9)).decode()
    record["files"] |= {f"zeros{n}": {"sha256": "0", "content": zeros} for n in range(600)}
    path.write_text(json.dumps(record))
    write_sums(folder)


def name(folder: Path) -> None:
    (folder / os.fsdecode(b"\xff")).touch()


def link(folder: Path) -> None:
    (folder / "labels.txt").symlink_to("/etc/hostname")


def sums(folder: Path) -> None:
    (folder / SUMS_NAME).write_text("0" * 64 + "  ../outside\n")


def settings(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vit", "auto_map": {"AutoModel": "x.Y"}, "hidden_size": 1e99}')


# Each with the commands that must refuse it; the others may accept what they do not use.
PATCHED: dict[Callable[[Path], None], tuple[str, ...]] = {
    loader: (*OF_PATCHED[:3], OF_PATCHED[-1]), bomb: OF_PATCHED[:4], name: OF_PATCHED, link: OF_PATCHED,
    sums: OF_PATCHED[:3] + OF_PATCHED[4:6],
}  # fmt: skip
MODELS: dict[Callable[[Path], None], tuple[str, ...]] = {name: OF_MODEL, link: OF_MODEL, settings: OF_MODEL}


@drill
def hostile_folders(place: Path) -> Row:
    """A hostile folder is refused in one line by every command that uses it: no code, nothing left, little memory."""
    demo(place / "model")
    patched_demo(place / "patched")
    tries = 0
    for source, kinds in (("patched", PATCHED), ("model", MODELS)):
        for damage, commands in kinds.items():
            target = place / "target" / "folder"
            shutil.copytree(place / source, target)
            damage(target)
            for line in commands:
                with little_memory():
                    refused(in_process(line.replace("{}", str(target))))
                assert [path.name for path in target.parent.iterdir()] == ["folder"], (damage.__name__, line)
                tries += 1
            shutil.rmtree(target.parent)
    return Row(tries, f"all refused, in {GROWTH_MB} MB more than torch takes")


@contextmanager
def little_memory() -> Iterator[None]:
    """An allocation in the block that takes this process `GROWTH_MB` further ends with another exit code."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (GROWTH_MB << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
