"""Folders that one run owns: other runs can tell whether it is alive, and remove what a dead one left.

An owned folder is named with random digits (`.out.partial-3f9a0c52`), so no two runs share one, whatever their process
ids. While the run lives it holds a lock (`flock`) on the folder's file `owner.json`, which the kernel drops with the
process, however that ends. The file says who it is:

    {"boot": the start of the kernel it runs on, "machine": of its host, "pids": its namespace of process ids,
     "pid": its process id there, "started": when that process began}

A folder is removed as abandoned only where its run is provably dead:

- its lock is free, and it ran on this kernel (in any container), or on this machine before that was last started;
- or its file system has no locks, it ran on this kernel among the process ids seen here, and no process has its id
  and start;
- or it holds nothing but a lock that is free, or nothing at all: whoever made it looks again and makes another.

What another machine left stays, even if its lock is free, for on some shared file systems a lock is seen by one machine
only. It is in nobody's way, and a run on that machine, or its user, can remove it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import weakref
from pathlib import Path
from typing import Any

OWNER = "owner.json"
RANDOM = "[0-9a-f]{8}"
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


class OwnedFolder:
    """A new folder in `parent` named `prefix` and random digits; what dead runs left there by that prefix is removed.

    It is removed with all it holds at the end of a `with` block, which has its path, or else with the object, or with
    the process. Nobody else may read it.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        remove_abandoned(parent, prefix)
        self.path, lock = _made(parent, prefix)
        self._removed = weakref.finalize(self, _end, self.path, lock, os.getpid())

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        self._removed()


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the owned folders in `parent` by that prefix whose runs are provably dead, see above."""
    named = re.compile(re.escape(prefix) + RANDOM)
    with os.scandir(parent) as entries:
        left = [Path(entry.path) for entry in entries if named.fullmatch(entry.name) and entry.is_dir()]
    for path in left:
        _remove_if_abandoned(path)


def _made(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder and its locked file; made again if another run has taken it for an abandoned one meanwhile."""
    while True:
        path = parent / f"{prefix}{secrets.token_hex(4)}"
        try:
            path.mkdir(0o700)
            lock = os.open(path / OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            continue
        except FileNotFoundError:
            if not parent.is_dir():
                raise
            continue
        except BaseException:  # a signal: nobody has the folder yet who would remove it
            _remove(path)
            raise
        try:
            if locked(lock) is not False and os.path.samestat(os.fstat(lock), os.stat(path / OWNER)):
                os.write(lock, json.dumps(_this_run()).encode())
                return path, lock
        except FileNotFoundError:
            pass  # removed between the two calls
        except BaseException:
            _end(path, lock, os.getpid())
            raise
        os.close(lock)


def _end(path: Path, lock: int, pid: int) -> None:
    """Remove an owned folder; a forked process, which is not `pid`, lets it be."""
    if os.getpid() == pid:
        try:
            _remove(path)
        except BaseException:  # a signal, which must not cut it off
            _remove(path)
            raise
        os.close(lock)


def _remove(path: Path) -> None:
    """The lock goes last, so that a folder that is half removed can still be told to be abandoned."""
    with contextlib.suppress(OSError):  # the next run tries again
        for entry in os.scandir(path):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.name != OWNER:
                os.unlink(entry.path)
        (path / OWNER).unlink(missing_ok=True)
        path.rmdir()


def _remove_if_abandoned(path: Path) -> None:
    try:
        lock = os.open(path / OWNER, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        with contextlib.suppress(OSError):  # not empty: not ours, or just begun
            path.rmdir()
        return
    except OSError:  # another user's
        return
    try:
        if _is_dead(path, lock):
            _remove(path)
    finally:
        os.close(lock)


def _is_dead(path: Path, lock: int) -> bool:
    free = locked(lock)
    if free is False:
        return False
    try:
        owner = json.loads(os.pread(lock, 4096, 0))
        boot, machine, pids, pid, started = (owner[key] for key in _this_run())
    except (ValueError, KeyError, TypeError):  # killed before it had written that
        return free is True and os.listdir(path) == [OWNER]
    here = _this_run()
    if boot != here["boot"]:
        return free is True and machine is not None and machine == here["machine"]
    return free is True or (pids == here["pids"] and not _runs(pid, started))


def locked(lock: int) -> bool | None:
    """Lock an open file: whether that worked; None if its file system has no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def _this_run() -> dict[str, Any]:
    import psutil

    boot = _line("/proc/sys/kernel/random/boot_id") or f"{psutil.boot_time():.0f}"
    machine = _line("/etc/machine-id")
    try:
        pids = os.readlink("/proc/self/ns/pid")
    except OSError:
        pids = ""
    return {
        "boot": boot,
        "machine": machine and f"{socket.gethostname()} {machine}",
        "pids": pids,
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _line(path: str) -> str | None:
    try:
        return Path(path).read_text("utf-8").strip() or None
    except OSError:
        return None


def _runs(pid: int, started: float) -> bool:
    """Whether the process `pid` runs that began at `started`, in seconds."""
    import psutil

    try:
        return abs(psutil.Process(pid).create_time() - started) < 1
    except psutil.NoSuchProcess:
        return False
