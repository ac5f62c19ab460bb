"""A patched transformers folder whose code is not trusted: never the original without a sign, in 4.57 and in 5."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel

import regsurgery
from regsurgery.recipe import Recipe
from tests.e2e.test_reload import transformers_4_python
from tests.picos import by_id

PROGRAM = """
import contextlib, io, json, logging, sys
sys.modules["regsurgery"] = None
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers import ViTForImageClassification

def tried(cls, folder, **options):
    told = io.StringIO()
    handler = logging.StreamHandler(told)
    logging.getLogger("transformers").addHandler(handler)
    try:
        error, model = None, cls.from_pretrained(folder, **options)
    except ValueError as refused:
        error, model = str(refused), None
    logging.getLogger("transformers").removeHandler(handler)
    return {"error": error, "told": told.getvalue(), "type": type(model).__module__}

print(json.dumps({folder: {
    "auto": tried(AutoModel, folder, trust_remote_code=False),
    "auto for classes": tried(AutoModelForImageClassification, folder, trust_remote_code=False),
    "nothing said": tried(AutoModelForImageClassification, folder),
    "config": tried(AutoConfig, folder, trust_remote_code=False),
    "stock class": tried(ViTForImageClassification, folder),
    "processor": tried(AutoImageProcessor, folder),
    "trusted": tried(AutoModelForImageClassification, folder, trust_remote_code=True),
} for folder in sys.argv[1:]}))
"""

SAYS = "and a stock class would ignore that; load it with"
PARTS = """
import json, sys
sys.modules["regsurgery"] = None
from transformers import AutoModel, CLIPModel, CLIPTextModel, CLIPVisionModel, CLIPVisionModelWithProjection

def words(cls, folder):
    try:
        cls.from_pretrained(folder)
    except ValueError as refused:
        return str(refused)

whole, tower, again = sys.argv[1:]
model = AutoModel.from_pretrained(whole, trust_remote_code=True)
named = (CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection)
model.save_pretrained(again)
print(json.dumps({
    "whole": [words(cls, whole) for cls in named],
    "saved": [words(cls, again) for cls in named],
    "tower": [words(cls, tower) for cls in named],
    "text": [words(CLIPTextModel, whole), words(CLIPTextModel, again)],
}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("untrusted")
    for mode in ("shift", "bias"):
        regsurgery.patch("demo", root / mode, recipe="demo", mode=mode, verification=False)
    return [root / "shift", root / "bias"]


@pytest.fixture(scope="module", params=["4.57", "5"])
def attempts(
    request: pytest.FixtureRequest, folders: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each way to load gave, for each folder."""
    found = answers(request.param, PROGRAM, folders, tmp_path_factory.mktemp("modules"))
    return list(found.values())


def answers(version: str, program: str, folders: list[Path], modules: Path) -> dict[str, Any]:
    """What `program` prints about `folders`, in a version of transformers."""
    python = transformers_4_python() if version == "4.57" else sys.executable
    done = subprocess.run(
        [python, "-c", program, *map(str, folders)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index('{"') :])
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("way", ["auto", "auto for classes", "nothing said", "config"])
def test_auto_classes_refuse(way: str, attempts: list[dict[str, Any]]) -> None:
    for attempt in attempts:
        assert "contains custom code which must be executed to correctly load the model" in attempt[way]["error"]
        assert "pass the argument `trust_remote_code=True`" in attempt[way]["error"]


def test_the_stock_class_refuses_and_says_what_to_write(attempts: list[dict[str, Any]]) -> None:
    call = 'AutoModelForImageClassification.from_pretrained("FOLDER", trust_remote_code=True)'
    for attempt in attempts:
        assert attempt["stock class"]["error"].endswith(f"this checkpoint is patched, {SAYS} {call}")
        assert "regsurgery_vit" in attempt["stock class"]["told"]


def test_trusted_it_loads_without_a_word(attempts: list[dict[str, Any]]) -> None:
    for attempt in attempts:
        assert (attempt["trusted"]["error"], attempt["trusted"]["told"]) == (None, "")
        assert "modeling_regsurgery" in attempt["trusted"]["type"]


def test_the_preprocessing_needs_no_trust(attempts: list[dict[str, Any]]) -> None:
    for attempt in attempts:
        assert attempt["processor"]["error"] is None


@pytest.mark.slow
def test_a_class_for_a_part_refuses_too_and_what_is_not_patched_loads(tmp_path: Path) -> None:
    """A vision class reads the `vision_config` of a whole CLIP alone."""
    folders = [patched(name, tmp_path) for name in ("hf-clip", "hf-clip-vision-projection")]
    for version in ("4.57", "5"):
        found = answers(version, PARTS, [*folders, tmp_path / f"again-{version}"], tmp_path / f"modules-{version}")
        call = 'AutoModel.from_pretrained("FOLDER", trust_remote_code=True)'
        for refused in (*found["whole"], *found["saved"], *found["tower"]):
            assert refused.endswith(f"{SAYS} {call}")
        assert found["text"] == [None, None]


@pytest.mark.slow
def test_transformers_which_opens_timm_s_folders_refuses_a_patched_one(tmp_path: Path) -> None:
    folder = patched("timm-dinov2", tmp_path)
    with pytest.raises(ValueError, match=re.escape(f'{SAYS} modeling_regsurgery.load("FOLDER")')):
        AutoModel.from_pretrained(folder)


def patched(name: str, root: Path) -> Path:
    by_id(name).build(root / name)
    folder = root / f"{name}-patched"
    regsurgery.patch(str(root / name), folder, recipe=Recipe({1: (3,)}), num_images=2, verification=False)
    return folder
