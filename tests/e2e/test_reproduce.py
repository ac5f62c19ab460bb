"""`reproduce`: the same bytes again, or what is other; and errors where it cannot be tried."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from PIL import Image

import regsurgery
from regsurgery.checkpoints.sums import check_sums, write_sums
from regsurgery.cli.app import main
from regsurgery.commands.patch import PatchResult
from regsurgery.emit.published import published
from regsurgery.emit.run_record import RUN_RECORD_NAME, read_run_record, versions
from regsurgery.errors import CheckpointError, ModelNotFoundError, UserError
from tests.conftest import shared
from tests.photos import write_photos

REPO, COMMIT = "someone/patched", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def source(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(demo_folder, tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "photos", 8, 3)


@pytest.fixture(scope="module")
def with_photos(source: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in mode bias, which is fitted on some photos and verified on others."""
    folder = tmp_path_factory.mktemp("with photos") / "out"
    regsurgery.patch(str(source), folder, recipe="demo", mode="bias", images=photos)
    return folder


@pytest.fixture
def patched(with_photos: Path, tmp_path: Path) -> Path:
    return shutil.copytree(with_photos, tmp_path / "patched")


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["regsurgery", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_the_demo_with_what_find_found_comes_out_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its neurons are those that were found then, with all of their provenance."""
    recipe = regsurgery.find("demo", num_images=8).recipe
    regsurgery.patch("demo", tmp_path / "out", recipe=recipe, num_registers=2, num_images=4, seed=5)
    assert run(["reproduce", str(tmp_path / "out"), "-o", str(tmp_path / "again"), "--json"], monkeypatch) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["identical"], answer["differences"], answer["num_files"]) == (True, {}, 9)
    assert (tmp_path / "again" / "SHA256SUMS").read_bytes() == (tmp_path / "out" / "SHA256SUMS").read_bytes()
    check_sums(tmp_path / "again")


@pytest.mark.slow
def test_what_was_found_on_some_photos_is_verified_on_the_others_again(source: Path, tmp_path: Path) -> None:
    """The recipe is given the second time, and still the images that it was found on take no part."""
    photos = write_photos(tmp_path / "photos", 24, 3)
    made = regsurgery.patch(str(source), tmp_path / "out", images=photos)
    assert made.verdict is not None and made.verdict.num_images == 8 and made.verdict.fitted_images == 0
    result = regsurgery.reproduce(tmp_path / "out", images=photos)
    assert result.identical, (result.differences, result.figures)


def test_photos_may_lie_elsewhere_by_then(patched: Path, photos: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(photos, tmp_path / "called otherwise")
    result = regsurgery.reproduce(patched, images=moved)
    assert result.identical and result.output is None and result.figures == {}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_was_changed_in_the_folder_is_named(
    patched: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = bytearray((patched / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (patched / "model.safetensors").write_bytes(weights)
    (patched / "preprocessor_config.json").unlink()
    assert run(["reproduce", str(patched), "--images", str(photos)], monkeypatch) == 1
    out = capsys.readouterr().out
    assert "model.safetensors  matches SHA256SUMS, but the file in the folder was changed or lost since" in out
    assert "preprocessor_config.json  matches SHA256SUMS" in out
    assert "DIFFERENT in 2 of 9 files" in out


def test_other_versions_and_figures_are_told(
    patched: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that another torch wrote, with another KL."""
    path = patched / RUN_RECORD_NAME
    record = json.loads(path.read_text())
    record["run"]["versions"]["torch"], kept = "2.0.0", record["verify"]["kl"]
    record["verify"]["kl"] = 0.5
    path.write_text(json.dumps(record))
    write_sums(patched)
    assert run(["reproduce", str(patched), "--images", str(photos)], monkeypatch) == 1
    told = capsys.readouterr()
    assert f"torch was 2.0.0, here it is {versions()['torch']}" in told.err
    assert f"{RUN_RECORD_NAME}  has different content" in told.out
    assert f"figure kl was 0.5, now {kept}" in told.out


def test_another_image_is_refused(patched: Path, photos: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(photos, tmp_path / "photos")
    Image.new("RGB", (64, 64), (1, 2, 3)).save(changed / "5.png")
    with pytest.raises(UserError, match=r"not the images of the run: it used 8 images of photos .* give the same"):
        regsurgery.reproduce(patched, images=changed)


def test_photos_must_be_given(patched: Path) -> None:
    with pytest.raises(UserError, match=r"used 8 images of photos .* give them with --images"):
        regsurgery.reproduce(patched)


def test_a_changed_weight_of_the_source_is_refused(patched: Path, photos: Path, source: Path, tmp_path: Path) -> None:
    other = shutil.copytree(source, tmp_path / "source")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    told = _with(patched, model=str(other))
    with pytest.raises(CheckpointError, match=r"its weights have sha256 \w+, expected \w+; give the checkpoint"):
        regsurgery.reproduce(told, images=photos)


def test_a_source_that_is_gone_is_named(
    patched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["reproduce", str(_with(patched, model="gone/model"))], monkeypatch) == 2
    assert "gone/model: what was patched is not there (relative to" in capsys.readouterr().err


def test_images_where_the_run_had_none_are_refused(patched: Path, photos: Path) -> None:
    with pytest.raises(UserError, match="used no photos; leave out --images"):
        regsurgery.reproduce(_with(patched, images=None), images=photos)


def test_a_folder_without_a_record_is_refused(patched: Path) -> None:
    (patched / RUN_RECORD_NAME).unlink()
    with pytest.raises(CheckpointError, match="missing; without it, nothing is known about how"):
        regsurgery.reproduce(patched)


def test_a_repository_needs_no_download_of_weights(
    with_photos: Path, photos: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder's path only the name was published, and the card names the repository."""
    repo = tmp_path / "hub" / f"models--{REPO.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name, content in published(with_photos, REPO).files.items():
        if name != "model.safetensors":
            (snapshot / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelNotFoundError, match=r"model: what was patched is not there.*--source"):
        regsurgery.reproduce(REPO, images=photos)
    result = regsurgery.reproduce(REPO, images=photos, source=str(source))
    assert result.identical and result.differences == {}
    with pytest.raises(ModelNotFoundError, match="someone/else: no such file or folder"):
        regsurgery.reproduce("someone/else")


def _with(patched: Path, **changes: Any) -> Path:
    """`patched` with a record that says something else."""
    record = read_run_record(patched)
    record["run"].update(changes)
    (patched / RUN_RECORD_NAME).write_text(json.dumps(record))
    return patched


@pytest.mark.real
@pytest.mark.parametrize(("library", "mode"), [("timm", "shift"), ("open_clip", "native")])
def test_a_real_model_comes_out_the_same(
    library: str, mode: str, patched_real: Callable[[str, str], tuple[Path, PatchResult]]
) -> None:
    result = regsurgery.reproduce(patched_real(library, mode)[0], images=shared("images", "labelled"))
    assert (result.identical, result.differences) == (True, {})
    assert bool(result.note) == (library == "open_clip")
