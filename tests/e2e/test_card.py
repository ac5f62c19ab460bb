"""The model card: metadata that the Hub takes, snippets that run as they are written, and what it says about itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image

import regsurgery
from regsurgery.commands.patch import PatchResult
from regsurgery.demo import write_demo
from regsurgery.emit.card import path_in_card
from regsurgery.emit.published import _card
from regsurgery.emit.run_record import read_run_record
from regsurgery.recipe import find_recipe
from regsurgery.verification.verdict_text import rows, sentence, title

REPO, COMMIT = "someone/pico-vit", "0123456789abcdef0123456789abcdef01234567"
SOURCE_CARD = """\
---
license: other
license_name: pico-licence
license_link: https://example.org/licence
language: en
datasets: [imagenet-1k]
pipeline_tag: image-classification
tags: [vision, pico]
base_model: someone/teacher
---
# The pico
"""
# What is patched, mode and format.
JOBS: dict[str, dict[str, Any]] = {
    "shift": {"recipe": "demo"},
    "bias": {"recipe": "demo", "mode": "bias"},
    "native": {"recipe": "demo", "mode": "native", "calibrate": False},
    "pt2": {"recipe": "demo", "format": "pt2"},
    "onnx": {"recipe": "demo", "format": "onnx"},
    "unverified": {"recipe": "demo", "verification": False},
}
REAL = [f"{library} {mode}" for library in ("transformers", "timm", "open_clip") for mode in ("shift", "native")]


def cached(home: Path, folder: Path) -> None:
    """Put `folder` and a model card where huggingface_hub looks for REPO."""
    repo = home / f"models--{REPO.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    (snapshot / "README.md").write_text(SOURCE_CARD)


@pytest.fixture(scope="module")
def patched(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, PatchResult]]:
    """The demo as a Hub repository with a card, patched in every way."""
    root = tmp_path_factory.mktemp("cards")
    cached(root / "hub", demo_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root / "hub"))
        return {
            name: (root / name, regsurgery.patch(REPO, root / name, num_images=4, **job)) for name, job in JOBS.items()
        }


@pytest.fixture(scope="module")
def real(patched_real: Callable[[str, str], tuple[Path, PatchResult]]) -> dict[str, tuple[Path, PatchResult]]:
    return {name: patched_real(*name.split()) for name in REAL}


def body(folder: Path) -> str:
    """The card's text on one line."""
    return " ".join(ModelCard.load(folder / "README.md").text.split())


def snippets(folder: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def called(folder: Path) -> str:
    """What the card calls the folder."""
    found = re.search("^`(.+)` stands for the path of this folder", (folder / "README.md").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def run_snippets(folders: list[Path], tmp_path: Path) -> list[dict[str, Any]]:
    jobs = [(str(folder), called(folder), code) for folder in folders for code in snippets(folder)]
    assert len(jobs) == 3 * len(folders)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("fresh_snippets.py")), str(tmp_path / "jobs.json")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == len(jobs)
    return results


def check_snippets(results: list[dict[str, Any]], programs: tuple[str, ...] = ()) -> None:
    for result in results:
        assert result["error"] == "", f"{result['folder']}:\n{result['code']}\n{result['error'][-2000:]}"
        if Path(result["folder"]).name not in programs:
            assert result["added"], f"{result['folder']}: not the patched model:\n{result['code']}"
    assert {result["folder"] for result in results if "import regsurgery" in result["code"]} == {
        result["folder"] for result in results
    }


def check_metadata(folder: Path) -> ModelCardData:
    """The front matter passes through huggingface_hub's own classes and comes out the same."""
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    plain = huggingface_hub.metadata_load(folder / "README.md")
    assert plain is not None and card.data.to_dict() == plain
    if "model-index" in plain:
        name, results = model_index_to_eval_results(plain["model-index"])
        assert eval_results_to_model_index(name, results) == plain["model-index"]
        assert all(isinstance(result.metric_value, float) for result in results)
    assert plain.get("base_model_relation") in (None, "adapter", "merge", "quantized", "finetune")
    assert isinstance(card.data, ModelCardData)
    return card.data


@pytest.mark.parametrize("job", JOBS)
def test_metadata_are_the_sources(job: str, patched: dict[str, tuple[Path, PatchResult]]) -> None:
    folder, result = patched[job]
    data = check_metadata(folder)
    assert (data.license, data.license_name, data.license_link) == (
        "other",
        "pico-licence",
        "https://example.org/licence",
    )
    assert (data.language, data.datasets, data.pipeline_tag) == (["en"], ["imagenet-1k"], "image-classification")
    assert data.base_model == REPO and data.get("base_model_relation") == "finetune"
    assert {"regsurgery", "vision", "pico"} <= set(data.tags or [])
    assert data.library_name == {"pt2": "pytorch"}.get(result.format, result.format)
    assert (data.eval_results is None) == (job == "unverified")


@pytest.mark.slow
def test_every_snippet_runs_as_written(patched: dict[str, tuple[Path, PatchResult]], tmp_path: Path) -> None:
    results = run_snippets([folder for folder, _ in patched.values()], tmp_path)
    check_snippets(results, programs=("pt2", "onnx"))
    assert [result["patches"] for result in results if result["patches"]] == [[1, 144, 64]]  # of native mode


def test_figures_of_the_card_are_those_of_the_verdict(patched: dict[str, tuple[Path, PatchResult]]) -> None:
    folder, result = patched["shift"]
    verdict, text = result.verdict, body(folder)
    assert verdict is not None and verdict.kl is not None and verdict.same_argmax is not None
    found = verdict.outliers_per_image
    assert f"| outlier tokens per image | {found.original:.2f} | {found.patched:.2f} |" in text
    assert f"is {verdict.kl:.3g} nats (95 % interval" in text
    assert f"{verdict.num_same} of 4 keep their first class, {4 - (verdict.num_same or 0)} change it" in text
    assert f"**{sentence(verdict)}**" in text and f"| {title(verdict)} |" in text
    for row in rows(verdict):
        assert " ".join(f"| {row.name} | {row.original} | {row.patched} | {row.interval} |".split()) in text
    data = check_metadata(folder)
    assert data.eval_results is not None
    measured = {entry.metric_type: entry.metric_value for entry in data.eval_results}
    assert measured["outlier_tokens_per_image"] == pytest.approx(found.patched)
    assert measured["kl_to_original"] == pytest.approx(verdict.kl, rel=1e-5)
    assert "same_first_class" not in measured, "a share of 4 images says too much"
    assert all(entry.metric_name.endswith(", 4 generated pictures") for entry in data.eval_results)
    assert read_run_record(folder)["verify"]["kl"] == pytest.approx(verdict.kl, rel=1e-5)


def test_costs_are_counted(patched: dict[str, tuple[Path, PatchResult]]) -> None:
    assert "1 more token in every block: 146 instead of 145 at 96x96 pixels" in body(patched["shift"][0])
    assert "64 additional parameters, on top of 222,410." in body(patched["shift"][0])
    text = body(patched["bias"][0])
    assert "more token" not in text and "one constant key and value in each of 2 attentions" in text


def test_generated_pictures_are_called_so(patched: dict[str, tuple[Path, PatchResult]]) -> None:
    assert "**No photo was used**" in body(patched["shift"][0])
    assert "(evidence: generated)" in body(patched["shift"][0])
    assert "| 4 generated |" in body(patched["shift"][0]) and "On 4 generated pictures," in body(patched["shift"][0])
    assert "regsurgery reproduce pico-vit-patched ```" in body(patched["shift"][0])


def test_a_folder_that_nobody_verified_says_so(patched: dict[str, tuple[Path, PatchResult]]) -> None:
    folder, _ = patched["unverified"]
    text = body(folder)
    assert "is **not known**" in text and "None are known, because nothing was measured" in text
    assert not (folder / "before_after.png").exists() and "![" not in text
    assert read_run_record(folder)["verify"] is None


def test_the_picture_is_there_and_holds_nothing_but_pixels(patched: dict[str, tuple[Path, PatchResult]]) -> None:
    for name in set(JOBS) - {"unverified"}:
        folder, _ = patched[name]
        assert "](before_after.png)" in body(folder)
        with Image.open(folder / "before_after.png") as picture:
            assert picture.info == {} and picture.width > 700


def test_both_papers_are_cited_and_the_source_named(patched: dict[str, tuple[Path, PatchResult]]) -> None:
    text = body(patched["native"][0])
    assert "arXiv:2506.08010" in text and "arXiv:2309.16588" in text
    assert f"Source: `{REPO}`, revision `{COMMIT}`" in text
    assert "`pico-licence` (https://example.org/licence)" in text


def test_a_local_source_is_called_by_its_name_and_is_no_base_model(demo_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    recipe = find_recipe("demo")
    candidate = {"block": 1, "index": 25, "contribution": 123.4, "mean_activation": 5.25}
    provenance = {"candidates": [candidate, "not one"], "found_by": "a\ntest", "positional": True}
    known = regsurgery.Recipe(recipe.register_neurons, provenance=provenance)
    regsurgery.patch(str(demo_folder), folder, recipe=known, verification=False)
    card, text = (folder / "README.md").read_text(), body(folder)
    assert str(demo_folder.parent) not in card
    assert "Source: a local folder called `demo`" in text and "The source's files name no licence" in text
    data = check_metadata(folder)
    assert data.base_model is None and data.get("base_model_relation") is None and data.license is None
    assert "| 1 | 25 | 123 | 5.25 |" in text and "| 1 | 73 | – | – |" in text
    assert "Found by: a test." in text
    regsurgery.patch(str(demo_folder), tmp_path / "given", recipe=recipe, verification=False)
    assert "| block | register neuron | |---|---| | 1 | 25 |" in body(tmp_path / "given"), "no columns without figures"
    assert "The outliers are **positional**" in text


def test_a_recipe_that_was_changed_by_hand_says_so(demo_folder: Path, tmp_path: Path) -> None:
    found = find_recipe("demo")
    listed = {block: list(neurons) for block, neurons in found.register_neurons.items()}
    chosen = {"register_neurons": listed, "num_registers": 1, "fill": "zero"}
    provenance = {"found_by": "regsurgery 0.0.0 find", "chosen": chosen}
    recipe = regsurgery.Recipe(found.register_neurons, provenance=provenance)
    as_found, edited, asked = tmp_path / "as found", tmp_path / "edited", tmp_path / "asked"
    regsurgery.patch(str(demo_folder), as_found, recipe=recipe, verification=False)
    assert "by hand" not in body(as_found)
    other = regsurgery.Recipe({2: (172,)}, fill="mean", provenance=provenance)
    regsurgery.patch(str(demo_folder), edited, recipe=other, verification=False)
    says = "Changed by hand, or with `--num-registers`, after `find` wrote it:"
    assert f"{says} register_neurons 1:25, 1:73, 2:172 -> 2:172; fill zero -> mean." in body(edited)
    regsurgery.patch(str(demo_folder), asked, recipe=recipe, num_registers=3, verification=False)
    assert f"{says} num_registers 1 -> 3." in body(asked)
    assert regsurgery.reproduce(asked).identical


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_cards_of_the_real_models(name: str, real: dict[str, tuple[Path, PatchResult]]) -> None:
    folder, result = real[name]
    data = check_metadata(folder)
    assert data.library_name == name.split()[0] and data.base_model is None
    text = body(folder)
    if name.endswith("shift"):
        assert result.verdict is not None and result.verdict.positional is True
    assert "The outliers are **positional**" in text  # the corners
    assert "**No photo was used**" not in text
    assert "regsurgery reproduce vit-tiny" in text and "-patched --images FOLDER" in text
    assert "| 7 | 417 |" in text


@pytest.mark.real
def test_every_snippet_of_the_real_models_runs_as_written(
    real: dict[str, tuple[Path, PatchResult]], tmp_path: Path
) -> None:
    check_snippets(run_snippets([folder for folder, _ in real.values()], tmp_path))


HOSTILE = "evil\x1b]0;t\x07<img src=x onerror=alert(1)>|`b`[l](j:a)\u202e\u2028--- **x**"


@pytest.fixture(scope="module")
def hostile_card(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The card of a model whose names, labels, licence and provenance are all meant to act."""
    root = tmp_path_factory.mktemp("hostile")
    source = root / HOSTILE
    write_demo(source)
    config = json.loads((source / "config.json").read_text())
    config["id2label"] = {number: f"<script>{number}</script>\ud800" for number in config["id2label"]}
    config["label2id"] = {label: int(number) for number, label in config["id2label"].items()}
    (source / "config.json").write_text(json.dumps(config))
    metadata = {
        "license": "other",
        "license_name": "<b>x</b>`|",
        "license_link": "javascript:alert(1)",
        "tags": ["---"],
    }
    (source / "README.md").write_text(f"---\n{json.dumps(metadata)}\n---\n")
    provenance = {"found_by": "<script>alert(1)</script>\x1b[31m | `x`\n# H", "judged_on": "<b>|"}
    recipe = replace(find_recipe("demo"), provenance=provenance)
    regsurgery.patch(str(source), root / "out", recipe=recipe, num_images=4)
    return (root / "out" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    "name, path",
    [
        ("vit-tiny-timm", "vit-tiny-timm-patched"),
        ("someone/pico.vit_1", "pico.vit_1-patched"),
        (HOSTILE, "evil-0-t-img-src-x-onerror-alert-1-b-l-j-a-x-patched"),
        ("...", "model-patched"),
        ("é" * 99, "model-patched"),
        ("-rf" * 99, f"rf{'-rf' * 19}-patched"),
    ],
)
def test_what_the_card_calls_the_folder_can_stand_in_a_program(name: str, path: str) -> None:
    assert path_in_card(name) == path


def test_of_a_card_of_an_earlier_version_the_hub_gets_its_own_path(
    patched: dict[str, tuple[Path, PatchResult]],
) -> None:
    folder, _ = patched["shift"]
    text = (folder / "README.md").read_text()
    earlier = text.replace(called(folder), ".")
    assert earlier != text and _card(earlier, REPO, None) == _card(text, REPO, None)
    assert f'regsurgery.load("{REPO}")' in _card(text, REPO, None) and called(folder) not in _card(text, REPO, None)


def test_a_licence_without_a_name_of_its_own(demo_folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(demo_folder, tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    regsurgery.patch(str(source), tmp_path / "out", recipe="demo", verification=False)
    assert "Licence: same as the source, `mit`.\n" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_nothing_of_others_acts_in_the_card(hostile_card: str) -> None:
    assert all(character.isprintable() or character == "\n" for character in hostile_card)
    _, front, body = hostile_card.split("\n---\n" if hostile_card.startswith("\n") else "---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["license_name"] == "<b>x</b>`|" and "license_link" not in metadata
    assert metadata["model-index"][0]["name"].startswith("evil\\x1b]0;t\\x07<img")
    outside_code = re.sub(r"```.*?```|`[^`\n]*`", "", re.sub(r"\\.", "", body), flags=re.S)
    assert "<" not in outside_code and "](j:" not in outside_code and "**x**" not in outside_code
    assert [line for line in body.splitlines() if line.startswith("# ")][1:] == []


def test_the_card_as_a_page_has_nothing_that_acts(hostile_card: str) -> None:
    import markdown

    html = markdown.markdown(hostile_card.split("---\n", 2)[2], extensions=["tables", "fenced_code"])
    assert not re.search(r"<(script|b|img(?! alt=\"Norms of the patches))\b", html)
    assert "&lt;script&gt;alert(1)" in html or "&lt;script>alert(1)" in html
