"""The record of a run: what it holds, that it says the same of the same, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import regsurgery
from regsurgery.emit.run_record import (
    RUN_RECORD_NAME,
    count_fitted,
    fitted_digests,
    fitted_of,
    images_of,
    read_run_record,
    rounded,
    versions,
    write_run_record,
)
from regsurgery.errors import CheckpointError
from regsurgery.images.digests import image_digest, image_digests
from regsurgery.images.image_set import image_set
from regsurgery.recipe import Recipe
from regsurgery.verification.verdict import BeforeAfter, Verdict

RUN: dict[str, Any] = {
    "model": "demo", "revision": None, "sha256": "0" * 64, "mode": "shift", "format": "transformers",
    "num_registers": 1, "calibrate": None, "seed": 0, "num_images": None, "force": False, "verification": True,
    "images": None, "versions": {"torch": "2.15.0"},
}  # fmt: skip
PAIR = BeforeAfter(1 / 3, 2e-7 / 3)
VERDICT = Verdict(
    passed=True, num_images=4, images="4 images", evidence="photos", block=2, output="logits", outliers_per_image=PAIR,
    max_patch_norm=PAIR, worst_patch_norm=PAIR, median_patch_norm=PAIR, register_norm=1.5,
    register_norm_std=float("inf"), positional=False, margin=None, cosine_patches=0.9, cosine_output=0.99,
    kl=0.123456789, same_argmax=1.0, num_same=4, intervals={"kl": (0.1234567, 0.2), "cosine_patches": None},
    unused_register=None, parity_max_abs=0.0, parity_allowed=1e-5,
)  # fmt: skip


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_run_record(tmp_path, RUN, VERDICT)
    record = read_run_record(tmp_path)
    assert (record["schema"], record["regsurgery"], record["run"]) == (1, regsurgery.__version__, RUN)
    assert record["verify"].keys() == VERDICT.as_dict().keys()
    assert record["verify"]["outliers_per_image"] == {"original": 0.333333, "patched": 6.66667e-08}
    assert (record["verify"]["kl"], record["verify"]["passed"]) == (0.123457, True)


def test_without_verification_there_are_no_figures(tmp_path: Path) -> None:
    write_run_record(tmp_path, RUN, None)
    assert read_run_record(tmp_path)["verify"] is None


def test_the_file_is_json_as_everybody_reads_it(tmp_path: Path) -> None:
    write_run_record(tmp_path, RUN, VERDICT)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    json.loads((tmp_path / RUN_RECORD_NAME).read_text(), parse_constant=refuse)


def test_numbers_keep_six_digits() -> None:
    assert rounded({"a": [123456.789, 0.1 + 0.2], "b": True, "c": "x", "d": 7}) == {
        "a": [123457.0, 0.3],
        "b": True,
        "c": "x",
        "d": 7,
    }
    assert rounded(float("nan")) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "reads schema 1"),
        ({"run": []}, "'run' is not an object"),
        ({"run": {**RUN, "model": None}}, "no valid 'model'"),
        ({"run": {key: value for key, value in RUN.items() if key != "seed"}}, "no valid 'seed'"),
        ({"run": {**RUN, "images": {"note": "x"}}}, "lacks note, count or sha256"),
        ({"run": {**RUN, "fitted": "x"}}, "'fitted' under 'run' is not a list of digests"),
        ({"run": {**RUN, "fitted": [1]}}, "'fitted' under 'run' is not a list of digests"),
        ({"verify": {"passed": "yes"}}, "'verify' is not a verdict"),
        ({"regsurgery": 1}, "'regsurgery' is not a version"),
    ],
)
def test_a_broken_record_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_run_record(tmp_path, RUN, None)
    path = tmp_path / RUN_RECORD_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message) as refused:
        read_run_record(tmp_path)
    assert str(path) in str(refused.value) and "patch the model again" in str(refused.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "\0"])
def test_what_is_no_record_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / RUN_RECORD_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=RUN_RECORD_NAME):
        read_run_record(tmp_path)


def test_a_folder_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing; without it, nothing is known about how"):
        read_run_record(tmp_path)


def test_versions_are_those_that_are_imported() -> None:
    import timm
    import torch

    assert versions()["timm"] == timm.__version__
    assert torch.__version__.startswith(versions()["torch"])


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / ("sub" if number % 2 else "") / f"{number}.png")
    return folder


def test_the_digest_is_of_the_images_wherever_they_lie(pictures: Path, tmp_path: Path) -> None:
    before = images_of(image_set(pictures))
    assert before is not None and (before["note"], before["count"]) == ("6 images of photos", 6)
    moved = pictures.rename(tmp_path / "elsewhere")
    assert image_digest(image_set(moved)) == before["sha256"]


def test_the_digest_tells_other_images(pictures: Path) -> None:
    whole, some = image_digest(image_set(pictures)), image_digest(image_set(pictures, 4))
    path = pictures / "sub" / "3.png"
    path.write_bytes(path.read_bytes() + b"\0")
    assert len({whole, some, image_digest(image_set(pictures))}) == 3


def test_generated_pictures_need_no_digest() -> None:
    assert images_of(image_set(None, 4)) is None


def test_norm_maps_are_no_part_of_the_verdicts_figures() -> None:
    assert "norm_maps" not in VERDICT.as_dict()
    assert dataclasses.replace(VERDICT, norm_maps=None) == VERDICT


def test_images_are_known_by_the_start_of_their_sha256(pictures: Path, tmp_path: Path) -> None:
    whole = image_digests(image_set(pictures))
    files = sorted(path for path in pictures.rglob("*.png"))
    assert whole == [hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files]
    assert image_digests(image_set(pictures, 4)) == [whole[place] for place in (0, 1, 3, 4)]
    moved = pictures.rename(tmp_path / "elsewhere")
    assert image_digests(image_set(moved)) == whole
    assert image_digests(image_set(None, 4)) == []


def test_an_image_that_cannot_be_read_took_part_in_nothing(pictures: Path) -> None:
    (pictures / "0.png").write_bytes(b"no picture")
    images = image_set(pictures)
    before = image_digests(images)
    assert len(list(images.batches(8, lambda some: torch.zeros(len(some), 3, 4, 4)))) == 1
    assert image_digests(images) == before[1:]


def test_what_took_part_is_the_search_and_the_fit(pictures: Path) -> None:
    seen, images = "0123456789ab", image_set(pictures, 4)
    found = Recipe({}, provenance={"images_seen": [seen, seen]})
    assert fitted_digests(found, images) == {seen, *image_digests(images)}
    assert fitted_digests(found, None) == {seen}
    for images_seen in (None, "0123456789ab", 7, {"a": 1}, [None, 3, "short", "0123456789AB", ["x"]]):
        assert fitted_digests(Recipe({}, provenance={"images_seen": images_seen}), None) == set()


def test_images_that_took_part_are_counted(pictures: Path) -> None:
    images = image_set(pictures)
    digests = image_digests(images)
    assert count_fitted(images, {*digests[:2], "0123456789ab"}) == 2
    assert (count_fitted(images, set()), count_fitted(images, None)) == (0, None)
    assert count_fitted(image_set(None, 4), set(digests)) == 0


def test_records_of_earlier_versions_do_not_know_what_took_part(tmp_path: Path) -> None:
    assert fitted_of(tmp_path) is None
    write_run_record(tmp_path, RUN, VERDICT)
    assert fitted_of(tmp_path) is None
    write_run_record(tmp_path, {**RUN, "fitted": ["0123456789ab"]}, VERDICT)
    assert fitted_of(tmp_path) == {"0123456789ab"}
