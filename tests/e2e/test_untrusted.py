"""A patched transformers folder whose code is not trusted: never the original without a sign, in 4.57 and in 5."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import regsurgery
from tests.e2e.test_reload import transformers_4_python

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
    python = transformers_4_python() if request.param == "4.57" else sys.executable
    modules = tmp_path_factory.mktemp("modules")
    done = subprocess.run(
        [python, "-c", PROGRAM, *map(str, folders)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout[done.stdout.index('{"') :]).values())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["auto", "auto for classes", "nothing said", "config"])
def test_auto_classes_refuse(way: str, attempts: list[dict[str, Any]]) -> None:
    for attempt in attempts:
        assert "contains custom code which must be executed to correctly load the model" in attempt[way]["error"]
        assert "pass the argument `trust_remote_code=True`" in attempt[way]["error"]


def test_the_stock_class_warns(attempts: list[dict[str, Any]]) -> None:
    for attempt, added in zip(attempts, ("register_tokens", "attention_constants"), strict=True):
        assert attempt["stock class"]["error"] is None
        assert "regsurgery_vit" in attempt["stock class"]["told"]
        assert f"vit.{added}" in attempt["stock class"]["told"]


def test_trusted_it_loads_without_a_word(attempts: list[dict[str, Any]]) -> None:
    for attempt in attempts:
        assert (attempt["trusted"]["error"], attempt["trusted"]["told"]) == (None, "")
        assert "modeling_regsurgery" in attempt["trusted"]["type"]


def test_the_preprocessing_needs_no_trust(attempts: list[dict[str, Any]]) -> None:
    for attempt in attempts:
        assert attempt["processor"]["error"] is None
