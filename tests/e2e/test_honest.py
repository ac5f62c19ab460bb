"""What a verdict rests on, from the command line on: whose images, which kind, how many; and when it fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import regsurgery
from regsurgery.checkpoints.sums import write_sums
from regsurgery.commands.patch import PatchResult
from regsurgery.emit.run_record import RUN_RECORD_NAME, read_run_record
from regsurgery.images.digests import image_digests
from regsurgery.images.image_set import image_set
from regsurgery.models import open_model
from regsurgery.options import LoadOptions
from regsurgery.recipe import Recipe
from tests.commands import Done
from tests.conftest import Job, shared
from tests.photos import write_photos

Run = Callable[..., Done]
NEW_KEYS = {"evidence", "num_same", "intervals", "unused_register", "warnings", "fitted_images", "judged"}


@pytest.fixture(scope="module")
def of_the_fit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("fit") / "photos", 20, 3)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("others") / "photos", 8, 4)


@pytest.fixture(scope="module")
def fitted(of_the_fit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in mode bias: fitted on 14 of the photos, verified on the 6 others."""
    folder = tmp_path_factory.mktemp("fitted") / "out"
    result = regsurgery.patch("demo", folder, recipe="demo", mode="bias", images=of_the_fit)
    assert result.verdict is not None and (result.verdict.num_images, result.verdict.fitted_images) == (6, 0)
    return folder


def test_the_record_knows_what_took_part_in_the_fit(fitted: Path, of_the_fit: Path) -> None:
    fit, _ = image_set(of_the_fit).hold_out(6)
    assert read_run_record(fitted)["run"]["fitted"] == sorted(image_digests(fit))
    assert regsurgery.reproduce(fitted, images=of_the_fit).identical


def test_verify_knows_images_of_the_fit_again(run: Run, fitted: Path, of_the_fit: Path, others: Path) -> None:
    seen = run("verify", fitted, "--images", of_the_fit)
    assert seen.code == 0
    assert "14 of 20 images took part in the search or the fit; figures on unseen images are usually worse" in seen.out
    unseen = run("verify", fitted, "--images", others)
    assert unseen.code == 0 and "took part" not in unseen.out
    for images, count in ((of_the_fit, 14), (others, 0), (None, 0)):
        chosen = [] if images is None else ["--images", images]
        found = json.loads(run("verify", fitted, "--json", *chosen).out)
        assert found["fitted_images"] == count


def test_images_of_the_search_are_known_by_the_recipe(of_the_fit: Path, tmp_path: Path) -> None:
    recipe = regsurgery.find_recipe("demo")
    provenance = {"images_seen": image_digests(image_set(of_the_fit))[:3]}
    known = Recipe(recipe.register_neurons, provenance=provenance)
    result = regsurgery.patch("demo", tmp_path / "out", recipe=known, images=of_the_fit)
    assert result.verdict is not None and result.verdict.fitted_images == 3
    text = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert "3 of 20 images took part in the search or the fit" in text
    assert regsurgery.verify(tmp_path / "out", images=of_the_fit).fitted_images == 3


def test_folders_of_earlier_versions_are_verified_without_that(
    run: Run, fitted: Path, of_the_fit: Path, tmp_path: Path
) -> None:
    import shutil

    old = shutil.copytree(fitted, tmp_path / "old")
    record = json.loads((old / RUN_RECORD_NAME).read_text())
    del record["run"]["fitted"]
    for key in NEW_KEYS:
        del record["verify"][key]
    (old / RUN_RECORD_NAME).write_text(json.dumps(record))
    write_sums(old)
    done = run("verify", old, "--images", of_the_fit, "--json")
    assert done.code == 0 and json.loads(done.out)["fitted_images"] is None
    (old / RUN_RECORD_NAME).unlink()
    write_sums(old)
    assert regsurgery.verify(old, images=of_the_fit).fitted_images is None


def test_patch_ends_with_the_words_of_verify(run: Run, of_the_fit: Path, tmp_path: Path) -> None:
    ends = [run("patch", "demo", "-o", tmp_path / "out", "--images", of_the_fit).out.splitlines()[-1]]
    ends.append(run("verify", tmp_path / "out", "--images", of_the_fit).out.splitlines()[-1])
    assert ends[0] == ends[1] and ends[0].startswith("outliers removed (")
    assert ends[0].endswith(" of 20 predictions changed")


def test_generated_pictures_are_named_beside_every_figure(run: Run, tmp_path: Path) -> None:
    done = run("patch", "demo", "-o", tmp_path / "out", "--num-images", 8)
    assert done.code == 0 and "evidence:" in done.out
    kl = next(line for line in done.out.splitlines() if "KL divergence" in line)
    assert kl.rstrip().endswith("8 generated")
    assert done.out.splitlines()[-1].endswith(" of 8 predictions changed, on generated pictures")
    found = json.loads(run("verify", tmp_path / "out", "--num-images", 8, "--json").out)
    assert found["evidence"] == "generated" and found.keys() >= NEW_KEYS
    assert found["intervals"].keys() == {"kl", "same_argmax", "cosine_output", "cosine_patches"}
    assert found["unused_register"].keys() == {"num_images", "kl", "num_same", "cosine_output", "times",
                                               "times_interval"}  # fmt: skip
    assert read_run_record(tmp_path / "out")["verify"]["evidence"] == "generated"


def test_photos_are_named_too(fitted: Path) -> None:
    found = read_run_record(fitted)["verify"]
    assert found["evidence"] == "photos" and found["judged"] is True
    assert found["unused_register"] is None, "mode bias appends none"
    assert "(evidence: photos)" in (fitted / "README.md").read_text()


def test_the_figures_and_their_intervals_are_those_of_the_images(of_the_fit: Path, tmp_path: Path) -> None:
    """Against the two models run by hand; the interval is within a quarter of the normal one."""
    recipe = Recipe({1: (25, 73), 2: (172,)}, num_registers=2, scale=(1.0, 1.0))
    made = regsurgery.patch("demo", tmp_path / "out", recipe=recipe, images=of_the_fit).verdict
    assert made is not None
    loaded = open_model("demo", LoadOptions()).loaded
    pixels = next(image_set(of_the_fit).batches(20, loaded.preprocess))
    with torch.no_grad():
        before = loaded.model(pixels).logits
        after = regsurgery.load(tmp_path / "out")(pixels).logits
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1).double()
    assert made.cosine_output == pytest.approx(float(cosine.mean()), abs=1e-6)
    assert made.num_same == int((before.argmax(-1) == after.argmax(-1)).sum())
    low, high = made.intervals["cosine_output"] or (0.0, 0.0)
    half = 1.96 * float(cosine.std()) / 20**0.5
    assert low < made.cosine_output < high
    assert high - low == pytest.approx(2 * half, rel=0.25, abs=2e-7)


@pytest.mark.slow
def test_a_few_images_are_too_few(run: Run, tmp_path: Path) -> None:
    done = run("patch", "demo", "-o", tmp_path / "out", "--num-images", 3)
    assert done.code == 0
    assert done.out.splitlines()[-1].startswith("too few images to judge (3 generated pictures): ")
    assert "model-index" not in (tmp_path / "out" / "README.md").read_text()
    assert run("verify", tmp_path / "out", "--num-images", 3).code == 0
    strict = run("verify", tmp_path / "out", "--num-images", 3, "--strict")
    assert strict.code == 1 and strict.out.splitlines()[-1].startswith("FAILED: too few images to judge: 3")
    done = run("patch", "demo", "-o", tmp_path / "strict", "--recipe", "demo", "--num-images", 3, "--strict")
    assert done.code == 1 and not (tmp_path / "strict").exists()


def test_strict_makes_a_failure_of_a_warning(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ("--num-images", 8)
    assert run("patch", "demo", "-o", tmp_path / "fine", "--strict", *options).code == 0
    monkeypatch.setattr("regsurgery.verification.verdict.MAX_TIMES", 0.0)  # as if the demo, which hardly moves, drifted
    assert run("patch", "demo", "-o", out, "--recipe", "demo", "--strict", *options).code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fine"]
    done = run("patch", "demo", "-o", out, "--recipe", "demo", *options)
    assert done.code == 0 and done.out.splitlines()[-1].endswith(": review")
    assert "\nreview: the KL divergence to the original is " in done.out
    assert ": review**" in (out / "README.md").read_text()
    assert run("verify", out, *options).code == 0
    failed = run("verify", out, "--strict", "--json", *options)
    found = json.loads(failed.out)
    assert failed.code == 1 and found["passed"] is False and found["warnings"] == [] and len(found["failures"]) == 1


@pytest.mark.real
def test_a_recipe_that_drifts_is_for_review_and_a_faithful_one_is_not(run: Run, tmp_path: Path) -> None:
    model, images = shared("models", "vit-tiny-timm"), shared("images", "labelled")
    drifting = Recipe({7: (417,)})
    faithful = Recipe({6: (189,), 7: (417,)}, num_registers=3, scale=(1.0,) * 3)
    for name, recipe, code in (("drifting", drifting, 1), ("faithful", faithful, 0)):
        (tmp_path / f"{name}.yaml").write_text(recipe.to_yaml())
        options = ("--recipe", tmp_path / f"{name}.yaml", "--images", images, "--num-images", 64, "--strict", "--json")
        done = run("patch", model, "-o", tmp_path / name, *options)
        assert done.code == code and (tmp_path / name).exists() == (code == 0)
        assert ("times that of appending an unused register" in done.err) == (code == 1)
    record = read_run_record(tmp_path / "faithful")["verify"]
    assert record["warnings"] == [] and record["unused_register"]["times"] < 4


@pytest.mark.real
def test_the_real_models_verdict_knows_the_images_of_its_fit(
    run: Run, patched_real: Callable[[str, str], tuple[Path, PatchResult]]
) -> None:
    folder, few = patched_real("timm", "native")[0], Job.NUM_IMAGES
    seen = run("verify", folder, "--images", shared("images", "labelled"), "--num-images", few)
    assert f"{few - few // 3} of {few} images took part in the search or the fit" in seen.out
    searched = run("verify", folder, "--images", shared("images", "calibration"), "--num-images", 8)
    assert "8 of 8 images took part" in searched.out
    unseen = run("verify", folder, "--images", shared("images", "voc2007-subset", "JPEGImages"), "--num-images", 8)
    assert "took part" not in unseen.out and "8 predictions changed" in unseen.out
