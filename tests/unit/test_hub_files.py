"""The sha256 of what the Hub's client left on disk, taken without reading the file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import regsurgery
from regsurgery.checkpoints.download import published_sha256
from regsurgery.checkpoints.safetensors_file import read_header
from regsurgery.checkpoints.sums import check_sums, sha256
from regsurgery.checkpoints.weights_check import finite_digest
from regsurgery.errors import CheckpointError

NAME = "model.safetensors"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / NAME
    path.write_bytes(b"weights")
    return path


def record(path: Path, etag: str, *, seconds: float = 0.0) -> None:
    """Metadata as `hf download --local-dir` leaves them, written `seconds` after the file."""
    metadata = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    metadata.write_text(f"{'c' * 40}\n{etag}\n{path.stat().st_mtime + seconds}\n")


def test_of_a_blob_in_the_cache(weights: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    digest = sha256(weights)
    weights.rename(blobs / digest)
    (snapshot / NAME).symlink_to(f"../../blobs/{digest}")
    assert published_sha256(snapshot / NAME) == digest
    (blobs / digest).rename(blobs / ("a" * 40))  # a small file: its git hash
    (snapshot / "config.json").symlink_to(f"../../blobs/{'a' * 40}")
    assert published_sha256(snapshot / "config.json") is None


def test_of_a_downloaded_folder(weights: Path) -> None:
    assert published_sha256(weights) is None
    record(weights, sha256(weights), seconds=60)
    assert published_sha256(weights) == sha256(weights)


def test_it_is_what_the_client_of_the_hub_reads(weights: Path) -> None:
    from huggingface_hub import _local_folder

    _local_folder.write_download_metadata(weights.parent, NAME, "c" * 40, sha256(weights))
    assert published_sha256(weights) == sha256(weights)


@pytest.mark.parametrize(("etag", "seconds"), [("{sha}", -60), ("a" * 40, 0), ("{sha}x", 0), ("", 0), ("a\nb", 0)])
def test_what_changed_or_makes_no_sense_is_unknown(weights: Path, etag: str, seconds: float) -> None:
    record(weights, etag.format(sha=sha256(weights)), seconds=seconds)
    assert published_sha256(weights) is None


def test_a_link_to_elsewhere_is_unknown(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(weights)
    assert published_sha256(tmp_path / "link") is None


@pytest.fixture
def own_demo(demo_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(demo_folder, tmp_path / "demo")


def test_without_verification_such_a_file_is_not_read(
    own_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(own_demo / NAME, sha256(own_demo / NAME), seconds=60)
    read = []
    looked = finite_digest
    monkeypatch.setattr(
        "regsurgery.checkpoints.weights_check.finite_digest", lambda file: read.append(file.path) or looked(file)
    )
    for out, verification in (("unread", False), ("read", True)):
        regsurgery.patch(str(own_demo), tmp_path / out, recipe="demo", num_images=8, verification=verification)
        assert len(read) == verification
        check_sums(tmp_path / out)
    configs = [(tmp_path / out / "config.json").read_bytes() for out in ("unread", "read")]
    assert configs[0] == configs[1]


def test_without_verification_others_are_read(own_demo: Path, tmp_path: Path) -> None:
    path = own_demo / NAME
    last = read_header(path).tensors[-1]
    assert last.dtype == "F32"
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff\xff\xff\xff")
    with pytest.raises(CheckpointError, match="NaN"):
        regsurgery.patch(str(own_demo), tmp_path / "out", recipe="demo", verification=False)
    record(path, "0" * 64, seconds=-60)  # older than the file
    with pytest.raises(CheckpointError, match="NaN"):
        regsurgery.patch(str(own_demo), tmp_path / "out", recipe="demo", verification=False)
