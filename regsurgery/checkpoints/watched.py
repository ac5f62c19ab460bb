"""Files that must stay as they are while they are read: a change is noticed, and refused.

A file is read several times: hashed, loaded, copied. So its state is taken before the first of these, and looked at
again after the last: size and time of the last change (mtime), device, inode, and the time that no program can set
(ctime). Where size and mtime differ, it changed. Where only the others do, its bytes decide, for ctime also changes
with permissions, and some network file systems number files anew: the bytes are hashed again where their digest is
known, which costs nothing otherwise. A link that was made or removed is no change.

Two writes within one tick of a file system's clock have one time. A file that was changed less than a tick ago is
therefore looked at a tick later.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from regsurgery.checkpoints.limits import MAX_JSON_BYTES
from regsurgery.checkpoints.reading import WEIGHT_SUFFIXES
from regsurgery.checkpoints.sums import sha256
from regsurgery.errors import CheckpointError, RegsurgeryError

TICK_NS = 50_000_000  # of the kernel's clock, with room
WHOLE_SECONDS_TICK_NS = 2_000_000_000  # of file systems without fractions of a second


class FileState(NamedTuple):
    """What `fstat` says of a file."""

    size: int
    mtime_ns: int
    device: int
    inode: int
    ctime_ns: int
    links: int


@dataclass(frozen=True)
class Watched:
    """Files and their states before anything of them was read.

    Attributes:
        digests: the sha256 of those that are known.
    """

    states: Mapping[Path, FileState]
    digests: Mapping[Path, str] = field(default_factory=dict)

    @classmethod
    def of(cls, paths: Iterable[Path]) -> Watched:
        """Those of `paths` that are files; small ones that are no weights are hashed.

        Raises:
            CheckpointError: one cannot be opened.
        """
        files = [path for path in paths if path.is_file()]
        _wait_a_tick(max((_state(path).ctime_ns for path in files), default=0))
        states = {path: _state(path) for path in files}
        small = {
            path: sha256(path)
            for path, state in states.items()
            if path.suffix not in WEIGHT_SUFFIXES and state.size <= MAX_JSON_BYTES
        }
        return cls(states, small)

    @classmethod
    def folder(cls, folder: Path) -> Watched:
        """The files of a checkpoint folder, without hidden ones."""
        return cls.of(sorted(path for path in folder.iterdir() if not path.name.startswith(".")))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(path.name for path in self.states)

    def beside(self, others: Watched) -> Watched:
        """These files and `others`; of those in both, as they were here."""
        return Watched({**others.states, **self.states}, {**others.digests, **self.digests})

    def knowing(self, digests: Mapping[Path, str]) -> Watched:
        """The same files, with the sha256 of some more."""
        return replace(self, digests={**self.digests, **digests})

    def check(self) -> None:
        """Raise `CheckpointError` for the first file that changed, or is not there any more."""
        for path, before in self.states.items():
            if not path.is_file():
                raise CheckpointError(
                    f"{path}: the source changed while it was read (the file is gone); put it back and run the same "
                    "command again"
                )
            now = _state(path)
            if now == before or (now[:4] == before[:4] and now.links != before.links):
                continue
            if now[:2] != before[:2] or self.digests.get(path) != sha256(path):
                raise CheckpointError(
                    f"{path}: the source changed while it was read; run the same command again when nothing writes to "
                    "it, or on a copy"
                )

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """`blamed`, and `check` at the end of the block."""
        with self.blamed():
            yield
        self.check()

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Of an error in the block, a change of the files is the cause if there was one."""
        try:
            yield
        except (RegsurgeryError, OSError):
            self.check()
            raise


def _state(path: Path) -> FileState:
    """Opening a file makes network file systems ask their server."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); correct its permissions") from error
    try:
        found = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return FileState(found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino, found.st_ctime_ns, found.st_nlink)


def _wait_a_tick(changed_ns: int) -> None:
    """Wait until a file that is changed now gets another time than `changed_ns`."""
    tick = TICK_NS if changed_ns % 1_000_000_000 else WHOLE_SECONDS_TICK_NS
    left = tick - (time.time_ns() - changed_ns)
    if 0 < left <= tick:
        time.sleep(left / 1e9)
