"""A source that changes while it is read is refused by every command that reads it, and nothing is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import regsurgery
from regsurgery.checkpoints import watched
from regsurgery.checkpoints.watched import Watched
from regsurgery.errors import CheckpointError
from regsurgery.frontends.load import load
from regsurgery.progress import Progress
from tests.conftest import tiered
from tests.drills.kills import sharded_demo

CHANGED = r"^\S*{}: the source changed while it was read"
WEIGHTS = "model.safetensors"


def other_bytes(path: Path) -> bytes:
    """A file of the same size whose tensors are all others, and as good."""
    tensors = {name: torch.flip(value, [0]) * 0.5 for name, value in load_file(path).items()}
    other = path.with_name("other")
    save_file(tensors, other, metadata={"format": "pt"})
    content = other.read_bytes()
    other.unlink()
    assert len(content) == path.stat().st_size
    return content


def move_another_there(path: Path, content: bytes) -> None:
    times = path.stat()
    other = path.with_name(".other")
    other.write_bytes(content)
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(path)


def write_into_it(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.write(content)


def write_into_it_and_set_its_time_back(path: Path, content: bytes) -> None:
    times = path.stat()
    write_into_it(path, content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def cut_it(path: Path, content: bytes) -> None:
    os.truncate(path, len(content) // 2)


def remove_it(path: Path, content: bytes) -> None:
    path.unlink()


WAYS = (move_another_there, write_into_it, write_into_it_and_set_its_time_back, cut_it, remove_it)


class At(Progress):
    """Calls `change` when a stage begins, once."""

    def __init__(self, name: str, change: Callable[[], object]) -> None:
        self.name, self.change, self.done = name, change, False

    def stage(self, name: str, total: int | None = None, *, in_bytes: bool = False) -> None:
        if name == self.name and not self.done:
            self.done = True
            self.change()


@pytest.fixture
def source(demo_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(demo_folder, tmp_path / "source")


def refused(file: str, stage: str, change: Callable[[], object], command: Callable[..., object]) -> None:
    progress = At(stage, change)
    with pytest.raises(CheckpointError, match=CHANGED.format(file)):
        command(progress=progress)
    assert progress.done


def patch(source: Path, **options: Any) -> Callable[..., object]:
    return partial(regsurgery.patch, str(source), source.parent / "out", recipe="demo", num_images=4, **options)


@pytest.mark.parametrize("way", WAYS)
def test_weights_that_change_during_a_patch(way: Any, source: Path, tmp_path: Path) -> None:
    path = source / WEIGHTS
    refused(WEIGHTS, "surgery", partial(way, path, other_bytes(path)), patch(source))
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("stage", tiered(("trace", "match", "verify", "other image sizes"), ("trace", "verify")))
def test_weights_that_change_at_another_time(stage: str, source: Path, tmp_path: Path) -> None:
    path = source / WEIGHTS
    refused(WEIGHTS, stage, partial(write_into_it, path, other_bytes(path)), patch(source))
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "bias"},
        {"mode": "native", "calibrate": False},
        pytest.param({"mode": "native", "calibrate": False, "max_memory": 0}, marks=pytest.mark.slow),
        {"max_memory": 0},
        pytest.param({"format": "pt2"}, marks=pytest.mark.slow),
        {"verification": False},
    ],
    ids=str,
)
def test_weights_that_change_in_every_mode(options: dict[str, Any], source: Path, tmp_path: Path) -> None:
    path = source / WEIGHTS
    refused(WEIGHTS, "surgery", partial(move_another_there, path, other_bytes(path)), patch(source, **options))
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("links", [False, True])
def test_shards_that_change_while_copies_are_made_ahead(links: bool, tmp_path: Path) -> None:
    source = sharded_demo(tmp_path / "source")
    path = sorted(source.glob("*.safetensors"))[1]
    refused(path.name, "trace", partial(move_another_there, path, other_bytes(path)), patch(source, link=links))
    assert list(tmp_path.iterdir()) == [source]


def test_links_to_the_shards_are_no_change_of_them(tmp_path: Path) -> None:
    source = sharded_demo(tmp_path / "source")
    patch(source, link=True)()
    assert regsurgery.verify(tmp_path / "out", num_images=4).passed


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "vocab.txt"])
def test_side_files_that_change(name: str, source: Path, tmp_path: Path) -> None:
    path = source / name
    if not path.exists():
        path.write_text("copied along")

    def change() -> None:
        path.write_bytes(path.read_bytes() + b" ")

    refused(name, "verify", change, patch(source))
    assert list(tmp_path.iterdir()) == [source]


def test_files_that_appear_meanwhile_are_no_part_of_the_source(source: Path, tmp_path: Path) -> None:
    progress = At("surgery", lambda: (source / "vocab.txt").write_text("half of"))
    patch(source)(progress=progress)
    assert progress.done and not (tmp_path / "out" / "vocab.txt").exists()
    restored = regsurgery.unpatch(tmp_path / "out", tmp_path / "restored")
    assert "vocab.txt" not in restored.files and not restored.changed


def test_new_permissions_are_no_change_of_the_bytes(source: Path, tmp_path: Path) -> None:
    def change() -> None:
        for path in source.iterdir():
            path.chmod(0o600)

    progress = At("surgery", change)
    patch(source)(progress=progress)
    assert progress.done and regsurgery.verify(tmp_path / "out", num_images=4).passed


def test_weights_that_change_while_they_are_searched(source: Path, tmp_path: Path) -> None:
    path = source / WEIGHTS
    change = partial(write_into_it, path, other_bytes(path))
    refused(WEIGHTS, "norms", change, partial(regsurgery.doctor, str(source), num_images=8))
    path.write_bytes(other_bytes(path))
    find = partial(regsurgery.find, str(source), tmp_path / "recipe.yaml", num_images=8, force=True)
    refused(WEIGHTS, "pilot", partial(remove_it, path, b""), find)
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.fixture(scope="module")
def patched_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("patched") / "out"
    regsurgery.patch("demo", out, recipe="demo", num_images=4)
    return out


@pytest.fixture
def patched(patched_demo: Path, tmp_path: Path) -> Path:
    return shutil.copytree(patched_demo, tmp_path / "patched")


@pytest.mark.parametrize("way", [move_another_there, write_into_it])
def test_a_patched_folder_that_changes(way: Any, patched: Path, tmp_path: Path) -> None:
    path = patched / WEIGHTS
    change = partial(way, path, other_bytes(path))
    refused(WEIGHTS, "restore", change, partial(regsurgery.unpatch, patched, tmp_path / "restored"))
    assert list(tmp_path.iterdir()) == [patched]


@pytest.mark.parametrize("stage", ["load", "surgery", "verify"])
def test_a_patched_folder_that_changes_while_it_is_verified(stage: str, patched: Path) -> None:
    path = patched / WEIGHTS
    change = partial(move_another_there, path, other_bytes(path))
    refused(WEIGHTS, stage, change, partial(regsurgery.verify, patched, num_images=4))


def test_a_checkpoint_that_changes_while_it_is_compared(source: Path, patched: Path) -> None:
    path = source / WEIGHTS
    change = partial(write_into_it, path, other_bytes(path))
    refused(WEIGHTS, "compare", change, partial(regsurgery.diff, source, patched))


def test_a_loaded_model_is_not_the_file(source: Path) -> None:
    """The loader of transformers maps it, so writing into it would write into the model."""
    loaded = load(str(source))
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    write_into_it(source / WEIGHTS, other_bytes(source / WEIGHTS))
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


# --- how it is noticed ------------------------------------------------------------------------------------------------


def test_a_file_written_a_moment_ago_is_looked_at_a_tick_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(watched.time, "sleep", slept.append)
    path = tmp_path / "a"
    path.write_text("a")
    Watched.of([path])
    assert len(slept) == 1 and 0 < slept[0] <= 0.05
    slept.clear()
    monkeypatch.setattr(watched.time, "time_ns", lambda: path.stat().st_ctime_ns + 60_000_000)
    Watched.of([path])
    assert not slept


def test_every_write_is_seen(tmp_path: Path) -> None:
    """However soon after the file was last written, and after it was looked at."""
    path = tmp_path / "model.safetensors"
    for number in range(50):
        path.write_text(f"{number:03}")
        files = Watched.of([path])
        path.write_text(f"{number + 500:03}")
        with pytest.raises(CheckpointError, match="the source changed"):
            files.check()


def test_a_file_that_is_numbered_anew_is_judged_by_its_bytes(tmp_path: Path) -> None:
    """As some network file systems do it; here, a copy with the same times takes its place."""
    path = tmp_path / "model.safetensors"
    path.write_text("weights")
    files = Watched.of([path])
    known = files.knowing({path: watched.sha256(path)})
    move_another_there(path, b"weights")
    known.check()
    with pytest.raises(CheckpointError, match="the source changed"):
        files.check()
