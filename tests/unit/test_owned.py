"""Folders that one run owns: which of them another run removes."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from regsurgery.checkpoints import owned
from regsurgery.checkpoints.owned import OWNER, OwnedFolder, remove_abandoned

PREFIX = ".out.partial-"
DIES = """
import os, sys
from pathlib import Path
from regsurgery.checkpoints.owned import OwnedFolder
folder = OwnedFolder(Path(sys.argv[1]), sys.argv[2])
(folder.path / "model.safetensors").write_bytes(b"half")
os._exit(9)
"""


@pytest.fixture
def dead(tmp_path: Path) -> Path:
    """What a killed run left, with half a file in it."""
    subprocess.run([sys.executable, "-c", DIES, str(tmp_path), PREFIX], check=False)
    (left,) = tmp_path.iterdir()
    return left


def change_owner(folder: Path, **changes: Any) -> None:
    path = folder / OWNER
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("called", ["open", "unlink", "rmdir"])
def test_a_signal_at_any_moment_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called: str) -> None:
    """It raises between two calls, while the folder is made, or removed."""
    real = getattr(os, called)

    def interrupted(*arguments: Any, **how: Any) -> Any:
        monkeypatch.setattr(os, called, real)
        raise SystemExit(143)

    monkeypatch.setattr(os, called, interrupted)
    with pytest.raises(SystemExit), OwnedFolder(tmp_path, PREFIX) as folder:
        (folder / "file").write_text("half")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_there_for_its_block_alone(tmp_path: Path) -> None:
    with OwnedFolder(tmp_path, PREFIX) as folder:
        assert re.fullmatch(r"\.out\.partial-[0-9a-f]{8}", folder.name) and folder.stat().st_mode & 0o777 == 0o700
        (folder / "a").mkdir()
        (folder / "a" / "b").write_text("b")
        (folder / "c").symlink_to(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_goes_with_its_object(tmp_path: Path) -> None:
    folder = OwnedFolder(tmp_path, PREFIX)
    assert folder.path.is_dir()
    del folder
    assert not list(tmp_path.iterdir())


def test_what_a_dead_run_left_is_removed_and_a_living_ones_is_not(dead: Path, tmp_path: Path) -> None:
    with OwnedFolder(tmp_path, PREFIX) as first, OwnedFolder(tmp_path, PREFIX) as second:
        assert first.is_dir() and second.is_dir() and not dead.exists()


def test_a_living_run_in_another_process_keeps_its_folder(tmp_path: Path) -> None:
    with OwnedFolder(tmp_path, PREFIX) as living:
        subprocess.run([sys.executable, "-c", DIES, str(tmp_path), PREFIX], check=False)
        assert living.is_dir() and len(list(tmp_path.iterdir())) == 2


def test_a_process_id_that_is_in_use_again_protects_nothing(dead: Path, tmp_path: Path) -> None:
    """As in containers, where the first process is always 1; its start is another one."""
    change_owner(dead, pid=os.getpid())
    remove_abandoned(tmp_path, PREFIX)
    assert not dead.exists()


def test_what_another_machine_left_stays(dead: Path, tmp_path: Path) -> None:
    change_owner(dead, boot="another", machine="another")
    remove_abandoned(tmp_path, PREFIX)
    assert dead.is_dir()


@pytest.mark.parametrize("machine", ["this one", None])
def test_what_was_left_before_the_machine_was_started_again_is_removed_where_the_machine_is_known(
    machine: str | None, dead: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = owned._this_run()
    monkeypatch.setattr(owned, "_this_run", lambda: here | {"machine": machine})
    change_owner(dead, boot="an earlier one", machine=machine)
    remove_abandoned(tmp_path, PREFIX)
    assert dead.exists() == (machine is None)


@pytest.mark.parametrize(
    ("changes", "stays"),
    [({}, False), ({"pids": "another container's"}, True), ({"boot": "another"}, True)],
    ids=["dead", "another container", "another machine"],
)
@pytest.mark.usefixtures("no_locks")
def test_without_locks_process_and_start_decide(
    changes: dict[str, Any], stays: bool, dead: Path, tmp_path: Path
) -> None:
    change_owner(dead, **changes)
    with OwnedFolder(tmp_path, PREFIX) as living:
        remove_abandoned(tmp_path, PREFIX)
        assert living.is_dir() and dead.exists() == stays
        change_owner(living, started=time.time() - 1000)  # another process that had its id
        remove_abandoned(tmp_path, PREFIX)
        assert not living.exists()


def test_a_run_killed_while_it_began_leaves_nothing_for_good(tmp_path: Path) -> None:
    for name in ("00000000", "11111111", "22222222"):
        (tmp_path / f"{PREFIX}{name}").mkdir()
    (tmp_path / f"{PREFIX}11111111" / OWNER).touch()
    (tmp_path / f"{PREFIX}22222222" / OWNER).touch()
    (tmp_path / f"{PREFIX}22222222" / "a file").touch()  # nothing says whose that is
    remove_abandoned(tmp_path, PREFIX)
    assert [path.name for path in tmp_path.iterdir()] == [f"{PREFIX}22222222"]


def test_other_names_are_nobodys_business(tmp_path: Path) -> None:
    names = [".out.partial-1234", ".out2.partial-12345678", "out", ".out.partial-copies-12345678"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.partial-12345678").symlink_to(tmp_path / "out")
    remove_abandoned(tmp_path, PREFIX)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, ".out.partial-12345678"])


def test_a_folder_that_is_taken_for_an_abandoned_one_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run looks between any two steps of its making."""
    for name in ("open", "fstat"):
        plain, looked = getattr(os, name), []

        def look(*args: Any, plain: Any = plain, looked: list[Any] = looked) -> Any:
            if not looked:
                looked.append(None)
                for path in tmp_path.iterdir():
                    (path / OWNER).unlink(missing_ok=True)
                    path.rmdir()
            return plain(*args)

        monkeypatch.setattr(os, name, look)
        with OwnedFolder(tmp_path, PREFIX) as folder:
            assert looked and list(tmp_path.iterdir()) == [folder]
        monkeypatch.undo()


def test_a_forked_process_leaves_its_parents_folder(tmp_path: Path) -> None:
    with OwnedFolder(tmp_path, PREFIX) as folder:
        process = multiprocessing.get_context("fork").Process(target=exec, args=("import gc; gc.collect()",))
        process.start()
        process.join()
        assert folder.is_dir()


def test_no_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        OwnedFolder(tmp_path, PREFIX)
    assert not list(tmp_path.iterdir())
