"""`survey` whole: small models on the tests' own Hub, killed and continued; the real ViT-Ti; a GPU where one is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.conftest import Planted, shared
from tests.e2e.test_hub import content_of, held
from tests.hub.commands import environment
from tests.hub.server import Hub
from tests.picos import Pico, by_id

ROOT = Path(__file__).parents[2]
PLANTED, TIMM = by_id("hf-vit-classes"), by_id("timm-vit-mean")
MODELS = ("cut", "planted", "absent", "healthy", "timm")
OF_THE_RUN = ("output", "seconds", "peak_rss_mb")  # in a result of `patch`


def start(listed: Path, output: Path, *more: object, **env: str) -> subprocess.Popen[str]:
    """`regsurgery survey`, on a few generated pictures."""
    words = ["survey", listed, "-o", output, "--num-images", 8, *more]
    return subprocess.Popen(
        [sys.executable, "-m", "regsurgery", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=1800)
    finally:
        process.kill()
    assert "Traceback" not in err, err
    return process.returncode, out, err


def records(output: Path, name: str) -> dict[str, dict[str, Any]]:
    """Stage -> record of a model in `survey.json`."""
    models = json.loads((output / "survey.json").read_text())["models"]
    return {record["stage"]: record for model in models if model["name"] == name for record in model["records"]}


def figures(output: Path, name: str) -> dict[str, Any]:
    """Stage -> what it found, without what belongs to the run."""
    found = {}
    for stage, record in records(output, name).items():
        result = record["result"] or {}
        found[stage] = (record["outcome"], {key: result[key] for key in result if key not in OF_THE_RUN})
    return found


@pytest.fixture(scope="module")
def hub(planted_picos: Callable[[Pico], Planted], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Two models with planted neurons, one of which the cure changes too much, one without, and one that is cut."""
    healthy = tmp_path_factory.mktemp("healthy") / "model"
    PLANTED.build(healthy)
    planted = content_of(planted_picos(PLANTED).folder)
    weights = planted["model.safetensors"]
    with Hub() as server:
        held(server, "me/planted", planted)
        held(server, "me/timm", content_of(planted_picos(TIMM).folder))
        held(server, "me/healthy", content_of(healthy))
        held(server, "me/cut", {**planted, "model.safetensors": weights[: len(weights) // 2]})
        yield server


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("list") / "list.yaml"
    path.write_text("schema: 1\nmodels:\n" + "".join(f"  - {{name: {name}, model: me/{name}}}\n" for name in MODELS))
    return path


@pytest.fixture(scope="module")
def whole(hub: Hub, listed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A survey that nothing disturbed, the home of the Hub's cache, and what it printed."""
    place = tmp_path_factory.mktemp("survey")
    env = environment(hub.url, place / "home")
    code, out, err = ended(start(listed, place / "out", "--mode", "shift", "--free-cache", **env))
    assert code == 1, err
    return place / "out", place / "home", out


@pytest.mark.slow
def test_one_command_surveys_models_good_and_bad(whole: tuple[Path, Path, str]) -> None:
    output, home, out = whole
    assert out.splitlines()[-1] == "failed: cut, absent, timm"
    for name, said in (("cut", "model.safetensors"), ("absent", "no such model on the Hub")):
        (record,) = records(output, name).values()
        assert record["outcome"] == "refused" and said in record["error"]
    assert {stage: record["outcome"] for stage, record in records(output, "healthy").items()} == {"doctor": "done"}
    found = records(output, "planted")
    assert all(record["outcome"] == "done" for record in found.values()), found
    norms = found["ours-shift.norms"]["result"]["figures"]
    (outliers,) = [row for row in norms if row["name"] == "outliers per image"][-2:-1]
    assert outliers["original"]["value"] > 1 and outliers["patched"]["value"] == 0
    assert all(record["seconds"] > 0 and 100 < record["peak_rss_mb"] < 4000 for record in found.values())
    assert "download" in found["doctor"]["parts"]
    *_, last = records(output, "timm").values()
    assert (last["stage"], last["outcome"]) == ("ours-shift.patch", "verification failed"), last
    assert "## Cost" in (output / "survey.md").read_text() and "<table>" in (output / "survey.html").read_text()
    left = {path.name for path in (output / "models").glob("*/*-shift")}
    assert not left and not list(home.glob("hub/models--*")), "patched folders, and the Hub's cache, are emptied"


@pytest.mark.slow
def test_a_survey_that_is_killed_continues(
    hub: Hub, listed: Path, whole: tuple[Path, Path, str], tmp_path: Path
) -> None:
    """`kill -9` in `find`, then in `eval`; no process goes on, and the figures are those of the undisturbed run."""
    output, env = tmp_path / "out", environment(hub.url, tmp_path / "home")
    folder = output / "models" / "planted"
    for sign in ("doctor.json", "*.patch.json"):
        process = start(listed, output, "--mode", "shift", "--only", "planted", **env)
        until = time.monotonic() + 300
        while not list(folder.glob(sign)):
            assert process.poll() is None and time.monotonic() < until, process.communicate()
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate()
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive
        assert not list(folder.glob("*.norms.json"))
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert {path.name for path in written} >= {"doctor.json", "find.json"}
    code, _, err = ended(start(listed, output, "--mode", "shift", "--only", "planted", **env))
    assert code == 0, err
    assert all(path.stat().st_mtime_ns == when for path, when in written.items()), "what is done is not done again"
    assert figures(output, "planted") == figures(whole[0], "planted")
    assert not list(folder.glob(".*")), "nothing half written is left"


@pytest.mark.slow
@pytest.mark.real
def test_the_real_vit_tiny(tmp_path: Path) -> None:
    """With object discovery, and zero-shot where there is a text tower."""
    for kind, number in (("labelled", 4), ("calibration", 40)):
        (tmp_path / kind).mkdir()
        for photo in sorted(shared("images", kind).iterdir())[:number]:
            (tmp_path / kind / photo.name).symlink_to(photo)
    labelled = sorted((tmp_path / "labelled").iterdir())
    num_classes = int(labelled[-1].name.partition("_")[0]) + 1
    (tmp_path / "prompts.txt").write_text("\n".join(f"class {number}" for number in range(num_classes)))
    (tmp_path / "list.yaml").write_text(f"""
schema: 1
models:
  - name: ViT-Ti
    model: {shared("models", "vit-tiny-openclip")}
    expected: [{{figure: neurons, recipe: vit-tiny, source: this project}}]
""")
    where = ("--images", tmp_path / "calibration", "--voc", shared("images", "voc2007-subset"))
    more = ("--labelled", tmp_path / "labelled", "--prompts", tmp_path / "prompts.txt", "--num-scored", 4)
    code, _, err = ended(start(tmp_path / "list.yaml", tmp_path / "out", *where, *more, "--mode", "shift"))
    assert code == 0, err
    found = records(tmp_path / "out", "ViT-Ti")
    assert {f"{setting}-shift.{task}" for setting in ("paper", "ours") for task in ("lost", "classify")} <= set(found)
    assert found["paper-shift.patch"]["result"]["register_neurons"] == {"7": [417]}
    assert found["ours-shift.classify"]["result"]["settings"] == {"prompts": str(tmp_path / "prompts.txt")}
    page = (tmp_path / "out" / "survey.md").read_text()
    assert "2 of 2 among the first 2 candidates" in page and " zero-shot |" in page


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
def test_on_a_gpu_every_stage_says_what_it_took_there(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("schema: 1\nmodels: [{name: demo, model: demo}]")
    code, _, err = ended(start(tmp_path / "list.yaml", tmp_path / "out", "--device-map", "cuda"))
    assert code == 0, err
    found = records(tmp_path / "out", "demo")
    assert all(record["outcome"] == "done" and record["peak_gpu_mb"] > 0 for record in found.values())
    assert all(record["machine"]["gpu"] == torch.cuda.get_device_name() for record in found.values())
