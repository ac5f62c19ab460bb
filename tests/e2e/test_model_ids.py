"""MODEL is also a Hub id, `timm:NAME` or `open_clip:ARCH/TAG`: the real client, offline, over a filled cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from regsurgery.errors import ModelNotFoundError
from regsurgery.frontends.model_id import _open_clip_repo, _timm_repo
from regsurgery.recipe import find_recipe
from tests.conftest import shared

TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(home: Path, repo: str, folder: Path) -> None:
    """Put `folder` into the Hub's cache below `home`, as a download of `repo` would have."""
    root = home / "hub" / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, root / "snapshots" / COMMIT)


def patch(model: str, home: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).parent / "regsurgery"
    return subprocess.run(
        [str(command), "patch", model, "-o", "out", "--num-images", "8", *arguments],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPROFILEIMPORTTIME": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def libraries(done: subprocess.CompletedProcess[str]) -> set[str]:
    """The model libraries that the command imported: Python writes a line for every module to stderr."""
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert {"torch", "regsurgery.commands.patch"} <= modules
    return {"transformers", "timm", "open_clip", "accelerate"} & modules


@pytest.mark.slow
def test_a_hub_id_is_patched_from_the_cache(demo_folder: Path, tmp_path: Path) -> None:
    cached(tmp_path / "home", "someone/pico-vit", demo_folder)
    done = patch("someone/pico-vit", tmp_path / "home", tmp_path, "--recipe", "demo")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Source: `someone/pico-vit`, revision `{COMMIT}`" in card
    assert libraries(done) <= {"transformers", "accelerate"}, "no other library is imported"


@pytest.mark.slow
def test_the_neurons_of_a_hub_id_without_a_bundled_recipe_are_found(demo_folder: Path, tmp_path: Path) -> None:
    cached(tmp_path / "home", "someone/pico-vit", demo_folder)
    done = patch("someone/pico-vit", tmp_path / "home", tmp_path)
    assert done.returncode == 0, done.stderr
    found = find_recipe(str(tmp_path / "out" / "recipe.yaml"))
    assert found.register_neurons == find_recipe("demo").register_neurons
    assert found.model == "someone/pico-vit"


@pytest.mark.real
def test_the_bundled_recipe_is_found_for_its_model(tmp_path: Path) -> None:
    cached(tmp_path / "home", f"timm/{TINY}", shared("models", "vit-tiny-timm"))
    done = patch(f"timm:{TINY}", tmp_path / "home", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "recipe: vit-tiny (bundled)" in done.stderr
    assert "7:417" in done.stdout
    assert libraries(done) == {"timm"}, "no other library is imported"


def test_names_of_libraries_lead_to_hub_repositories() -> None:
    assert _timm_repo("vit_small_patch14_dinov2.lvd142m") == "timm/vit_small_patch14_dinov2.lvd142m"
    assert _open_clip_repo("ViT-B-16/laion2b_s34b_b88k") == "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"


def test_a_misspelt_library_name_gets_the_nearest_one() -> None:
    with pytest.raises(ModelNotFoundError, match=r"did you mean 'vit_small_patch14_dinov2\.lvd142m'"):
        _timm_repo("vit_small_patch14_dinov2.lvd124m")
    with pytest.raises(ModelNotFoundError, match=r"did you mean 'ViT-B-16/"):
        _open_clip_repo("ViT-B-16/laion2b_s34b_b88")
