"""MODEL is also a Hub id, `timm:NAME` or `open_clip:ARCH/TAG`: the real client, offline, over a filled cache.

By `HF_HOME` in a process of its own, whose imports are looked at; then in this one, where the client is told of another
cache: importing takes longer than the rest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from regsurgery.errors import ModelNotFoundError
from regsurgery.frontends.model_id import _open_clip_repo, _timm_repo
from regsurgery.recipe import find_recipe
from tests.commands import Done
from tests.conftest import shared

TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(home: Path, repo: str, folder: Path) -> None:
    """Put `folder` into the Hub's cache below `home`, as a download of `repo` would have."""
    root = home / "hub" / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, root / "snapshots" / COMMIT)


Patch = Callable[[str, Path, Path], Done]


@pytest.fixture
def patch_by_id(run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> Patch:
    """(MODEL, home, folder) -> `regsurgery patch MODEL -o folder/out`, with the cache below `home`."""

    def patch(model: str, home: Path, folder: Path) -> Done:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
        return run("patch", model, "-o", folder / "out", "--num-images", 8)

    return patch


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
def test_the_neurons_of_a_hub_id_without_a_bundled_recipe_are_found(
    demo_folder: Path, patch_by_id: Patch, tmp_path: Path
) -> None:
    cached(tmp_path / "home", "someone/pico-vit", demo_folder)
    done = patch_by_id("someone/pico-vit", tmp_path / "home", tmp_path)
    assert done.code == 0, done.err
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


@pytest.mark.real
def test_a_bundled_recipe_that_does_not_fit_gives_way_to_the_search(patch_by_id: Patch, tmp_path: Path) -> None:
    """The id says vit_tiny, but its hidden units are in another order: 417 has become 5."""
    source, folder = shared("models", "vit-tiny-timm"), tmp_path / "model"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    state = load_file(source / "model.safetensors")
    order = torch.arange(768)
    order[[5, 417]] = order[[417, 5]]
    for name, dim in (("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)):
        state[f"blocks.7.mlp.{name}"] = state[f"blocks.7.mlp.{name}"].index_select(dim, order)
    save_file(state, folder / "model.safetensors")
    cached(tmp_path / "home", f"timm/{TINY}", folder)
    done = patch_by_id(f"timm:{TINY}", tmp_path / "home", tmp_path)
    assert done.code == 0, done.err
    assert "recipe vit-tiny does not fit this model (verification failed" in done.err
    found = find_recipe(str(tmp_path / "out" / "recipe.yaml"))
    assert found.register_neurons == {6: (189,), 7: (5,)}


def test_names_of_libraries_lead_to_hub_repositories() -> None:
    assert _timm_repo("vit_small_patch14_dinov2.lvd142m") == "timm/vit_small_patch14_dinov2.lvd142m"
    assert _open_clip_repo("ViT-B-16/laion2b_s34b_b88k") == "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"


def test_a_misspelt_library_name_gets_the_nearest_one() -> None:
    with pytest.raises(ModelNotFoundError, match=r"did you mean 'vit_small_patch14_dinov2\.lvd142m'"):
        _timm_repo("vit_small_patch14_dinov2.lvd124m")
    with pytest.raises(ModelNotFoundError, match=r"did you mean 'ViT-B-16/"):
        _open_clip_repo("ViT-B-16/laion2b_s34b_b88")
