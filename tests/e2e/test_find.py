"""`find`: exactly the neurons that cause the outliers; resumable; the same from any number of processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch

import regsurgery
from regsurgery.cli.app import main
from regsurgery.errors import OutputError, UserError
from regsurgery.options import PRECISIONS
from regsurgery.progress import Progress
from regsurgery.recipe import find_recipe
from regsurgery.search.decide import Found
from regsurgery.search.drift import Setting
from regsurgery.search.scores import Scorer, Sums
from tests.conftest import Planted, shared, tiered
from tests.picos import CORE, Pico, _transformers
from tests.planting import plant_model, random_counts, split_real_neuron

SEEDS = int(os.environ.get("REGSURGERY_SEEDS", "4"))


def check_planted(found: Found, planted: Mapping[int, Sequence[int]]) -> None:
    """Every planted neuron is found; the smallest set is them alone; what is chosen besides lowers the drift."""
    there = {(block, neuron) for block, neurons in planted.items() for neuron in neurons}
    assert set(found.smallest.neurons) == there
    assert there <= set(found.choice.setting.neurons)
    (chosen,) = (row for row in found.choice.rows if row.chosen)
    if set(chosen.setting.neurons) > there:
        same_registers = Setting(found.smallest.neurons, chosen.setting.num_registers)
        (without,) = (row for row in found.choice.rows if row.setting == same_registers)
        assert float(chosen.tried.drift.mean()) < float(without.tried.drift.mean())


def as_lists(recipe: regsurgery.Recipe) -> dict[int, list[int]]:
    return {block: list(neurons) for block, neurons in recipe.register_neurons.items()}


# --- the real network -----------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(("images", "num_images"), [("calibration", 40), (None, 40)])
def test_the_real_vit_gets_the_setting_with_the_least_drift(
    images: str | None, num_images: int | None, tmp_path: Path
) -> None:
    found = regsurgery.find(
        str(shared("models", "vit-tiny-timm")),
        tmp_path / "recipe.yaml",
        images=shared("images", images) if images else None,
        num_images=num_images,
    )
    check_the_real_neuron(found)
    assert as_lists(found.recipe) == {6: [189], 7: [417]}, "6:189 prepares what 7:417 completes"
    assert 2 <= found.recipe.num_registers <= 4 and found.recipe.num_patches == 196
    assert find_recipe(str(tmp_path / "recipe.yaml")) == found.recipe
    (chosen,) = (row for row in found.choice.rows if row.chosen)
    (paper,) = (row for row in found.choice.rows if row.paper)
    assert chosen.setting.neurons == ((6, 189), (7, 417)) and paper.setting == Setting(((7, 417),))
    figures, of_paper = chosen.tried.means(), paper.tried.means()
    assert figures["outliers"] == of_paper["outliers"] == 0
    assert figures["register_norm"] > 400
    assert figures["drift"] < 0.3 * of_paper["drift"]


@pytest.mark.real
def test_the_smallest_set_of_the_real_vit_in_another_library() -> None:
    found = regsurgery.find(
        str(shared("models", "vit-tiny-openclip")), images=shared("images", "calibration"), num_images=24, smallest=True
    )
    check_the_real_neuron(found)
    recipe = found.recipe
    assert as_lists(recipe) == {7: [417]} and recipe.num_registers == 1 and recipe.num_patches is None


def check_the_real_neuron(found: Found) -> None:
    assert found.smallest.neurons == ((7, 417),)
    assert found.suppressed and found.second_resolution.held
    assert found.diagnosis.emergence_block == found.diagnosis.settled_block == 7
    first, second = found.candidates[:2]
    assert first.contribution > 30 * second.contribution and first.activation > 15 * second.activation


def test_a_number_of_registers_can_be_asked_for(demo_folder: Path) -> None:
    two = regsurgery.find(str(demo_folder), num_images=16, num_registers=2)
    assert two.recipe.num_registers == 2 and two.recipe.num_patches is None
    assert {row.setting.num_registers for row in two.choice.rows} == {1, 2}, "the paper's row is there all the same"


@pytest.mark.real
@pytest.mark.parametrize("seed", range(2))
def test_the_real_neuron_is_found_whole_when_it_is_spread_over_several(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    least_used = rng.sample(range(19), rng.randint(1, 3))
    shares = [rng.uniform(0.1, 1) for _ in range(len(least_used) + 1)]
    neurons = split_real_neuron(shared("models", "vit-tiny-timm"), tmp_path / "model", shares, least_used)
    found = regsurgery.find(str(tmp_path / "model"), num_images=16, smallest=True)
    assert as_lists(found.recipe) == {7: neurons}


@pytest.mark.real
def test_the_negative_control_gets_no_recipe_and_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(shared("models", "dinov2-small"))
    monkeypatch.chdir(tmp_path)
    for command in (["find", model], ["patch", model, "-o", "out"]):
        monkeypatch.setattr(sys, "argv", ["regsurgery", *command, "--json", "--num-images", "8"])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 3
        assert json.loads(capsys.readouterr().out)["verdict"] == "none"
    assert list(tmp_path.iterdir()) == []


# --- planted ground truth -------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "image_size": 96, "patch_size": 8}
SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 112, "patch_size": 14}


@pytest.mark.parametrize("seed", tiered(range(SEEDS), [0]))
def test_planted_neurons_are_found_among_distractors(seed: int, tmp_path: Path) -> None:
    _transformers("ViTModel", "ViTConfig", **WIDE, intermediate_size=256)(tmp_path / "model")
    truth = plant_model(tmp_path / "model", random_counts(seed, 6), seed)
    found = regsurgery.find(str(tmp_path / "model"), num_images=32, smallest=True)
    assert as_lists(found.recipe) == {block: list(neurons) for block, neurons in truth.neurons.items()}
    assert found.suppressed


@pytest.mark.parametrize("seed", tiered(range(2), []))
def test_what_is_chosen_has_the_planted_neurons_and_drifts_less(seed: int, tmp_path: Path) -> None:
    _transformers("ViTModel", "ViTConfig", **WIDE, intermediate_size=256)(tmp_path / "model")
    truth = plant_model(tmp_path / "model", random_counts(seed, 6), seed)
    found = regsurgery.find(str(tmp_path / "model"))
    check_planted(found, truth.neurons)
    assert found.suppressed


@pytest.mark.slow
def test_planted_neurons_are_found_in_a_model_of_dinov2_small_size(tmp_path: Path) -> None:
    _transformers("Dinov2Model", "Dinov2Config", **SMALL)(tmp_path / "model")
    truth = plant_model(tmp_path / "model", {1: 2, 4: 3}, 0)
    found = regsurgery.find(str(tmp_path / "model"), num_images=10)
    check_planted(found, truth.neurons)


@pytest.mark.parametrize("pico", CORE, ids=lambda pico: pico.id)
def test_planted_neurons_are_found_in_every_family(pico: Pico, planted_picos: Callable[[Pico], Planted]) -> None:
    planted = planted_picos(pico)
    assert as_lists(regsurgery.find(str(planted.folder), num_images=16, smallest=True).recipe) == planted.neurons


# --- the recipe -----------------------------------------------------------------------------------------------------


def test_the_same_model_images_and_seed_give_the_same_bytes(demo_folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a.yaml", 0), ("b.yaml", 0), ("c.yaml", 1)):
        regsurgery.find(str(demo_folder), tmp_path / name, num_images=16, seed=seed)
    first, second, other = ((tmp_path / name).read_bytes() for name in ("a.yaml", "b.yaml", "c.yaml"))
    assert first == second != other
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.yaml", "b.yaml", "c.yaml"]


def test_a_found_recipe_is_replaced_and_any_other_file_is_not(demo_folder: Path, tmp_path: Path) -> None:
    recipe, mine = tmp_path / "recipe.yaml", tmp_path / "mine.yaml"
    for _ in range(2):
        regsurgery.find(str(demo_folder), recipe, num_images=8, smallest=True)
    mine.write_text("schema: 1\nregister_neurons: {1: [2]}\n")
    with pytest.raises(OutputError, match=r"mine\.yaml: exists and was not written by regsurgery find"):
        regsurgery.find(str(demo_folder), mine, num_images=8)
    assert mine.read_text() == "schema: 1\nregister_neurons: {1: [2]}\n"


def test_find_prints_the_contracts_json(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys,
        "argv",
        ["regsurgery", "find", str(demo_folder), "--json", "--num-images", "8", "-o", str(tmp_path / "r.yaml")],
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    printed = json.loads(capsys.readouterr().out)
    keys = {"register_neurons", "emergence_block", "threshold", "num_images", "candidates", "sweep"}
    assert keys <= set(printed)
    expected = {str(b): list(n) for b, n in find_recipe("demo").register_neurons.items()}
    assert printed["register_neurons"] == expected
    assert printed["num_images"] == 8 and printed["threshold"] > 0
    assert {"block", "index", "score"} <= set(printed["candidates"][0])
    assert {"top_k", "outliers_per_image", "cosine_output", "cosine_patches"} <= set(printed["sweep"][0])


def test_patch_finds_by_itself_and_writes_what_it_found(demo_folder: Path, tmp_path: Path) -> None:
    result = regsurgery.patch(str(demo_folder), tmp_path / "out", num_images=16)
    planted = find_recipe("demo").register_neurons
    assert result.verdict.passed
    assert all(set(planted[block]) <= set(result.recipe.register_neurons[block]) for block in planted)
    written = find_recipe(str(tmp_path / "out" / "recipe.yaml"))
    assert written == result.recipe and written.provenance["sweep"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no journal is left"


@pytest.mark.parametrize("pico", [CORE[0], CORE[8], CORE[13]], ids=lambda pico: pico.id)
@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_models_are_placed_by_a_device_map(
    pico: Pico, device_map: str, planted_picos: Callable[[Pico], Planted]
) -> None:
    planted = planted_picos(pico)
    found = regsurgery.find(str(planted.folder), num_images=8, smallest=True, device_map=device_map)
    assert as_lists(found.recipe) == planted.neurons


@pytest.mark.parametrize(
    "device_map, named", [("gpu", "not a device; give auto, cpu"), ("xpu", "torch finds no xpu here")]
)
def test_a_device_that_is_not_there_is_refused_at_once(device_map: str, named: str) -> None:
    with pytest.raises(UserError, match=f"^device map {device_map}: {named}"):
        regsurgery.find("no-such-model", num_images=8, device_map=device_map)


@pytest.mark.parametrize("pico", [CORE[0], CORE[8], CORE[13]], ids=lambda pico: pico.id)
def test_scores_in_bfloat16_find_the_same(pico: Pico, planted_picos: Callable[[Pico], Planted]) -> None:
    planted = planted_picos(pico)
    exact, rounded = (
        regsurgery.find(str(planted.folder), num_images=16, smallest=True, precision=precision)
        for precision in PRECISIONS
    )
    assert as_lists(rounded.recipe) == as_lists(exact.recipe) == planted.neurons
    assert rounded.recipe.provenance["scores_in"] == "bf16" and "scores_in" not in exact.recipe.provenance
    assert rounded.diagnosis == exact.diagnosis, "the pilot stays what it is"
    settings = [[row.as_dict() for row in found.choice.rows] for found in (exact, rounded)]
    assert settings[0] == settings[1], "and so does what is decided on few images"
    scores = [{(c.block, c.neuron): c.contribution for c in found.candidates} for found in (exact, rounded)]
    best = list(scores[0])[:2]
    assert [scores[1][at] for at in best] == pytest.approx([scores[0][at] for at in best], rel=0.05)
    assert scores[0] != scores[1], "autocast is on"


def test_an_unknown_precision_is_refused(demo_folder: Path) -> None:
    with pytest.raises(UserError, match="precision bf17: not one of checkpoint, bf16; did you mean 'bf16'"):
        regsurgery.find(str(demo_folder), precision="bf17")


# --- killed, and shared out -----------------------------------------------------------------------------------------


class Stop(BaseException):
    pass


class StopsAfter(Progress):
    """Stops the search after so many images of the scoring pass; counts them."""

    def __init__(self, images: int | None) -> None:
        self.images, self.scoring, self.seen, self.lines = images, False, 0, list[str]()

    def stage(self, name: str, total: int | None = None, *, in_bytes: bool = False) -> None:
        self.scoring = name == "scores"

    def advance(self, num_images: int) -> None:
        self.seen += num_images if self.scoring else 0
        if self.images is not None and self.seen >= self.images:
            raise Stop

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.slow
def test_a_stopped_search_goes_on_where_it_was(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regsurgery.search.journal.INTERVAL", 0.0)
    whole, resumed = tmp_path / "whole.yaml", tmp_path / "resumed.yaml"
    regsurgery.find(str(demo_folder), whole, num_images=64)
    with pytest.raises(Stop):
        regsurgery.find(str(demo_folder), resumed, num_images=64, progress=StopsAfter(40))
    assert (tmp_path / "resumed.yaml.journal").is_file() and not resumed.exists()
    progress = StopsAfter(None)
    added = []
    add = Scorer.add

    def counted(scorer: Scorer, sums: Sums, images: torch.Tensor) -> None:
        added.append(len(images) if progress.scoring else 0)
        add(scorer, sums, images)

    monkeypatch.setattr(Scorer, "add", counted)
    regsurgery.find(str(demo_folder), resumed, num_images=64, progress=progress)
    assert "continuing resumed.yaml.journal: 40 images are done" in progress.lines
    assert sum(added) == 64 - 40
    assert resumed.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed.yaml", "whole.yaml"]


@pytest.mark.parametrize("damage", tiered(["other images", "cut", "garbage"], ["other images"]))
def test_a_journal_that_does_not_fit_is_not_used(
    damage: str, demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regsurgery.search.journal.INTERVAL", 0.0)
    recipe, journal = tmp_path / "recipe.yaml", tmp_path / "recipe.yaml.journal"
    with pytest.raises(Stop):
        regsurgery.find(str(demo_folder), recipe, num_images=48, smallest=True, progress=StopsAfter(16))
    if damage != "other images":
        journal.write_bytes(journal.read_bytes()[:100] if damage == "cut" else b"garbage")
    progress = StopsAfter(None)
    num_images = 24 if damage == "other images" else 48
    regsurgery.find(str(demo_folder), recipe, num_images=num_images, smallest=True, progress=progress)
    assert any("starting from scratch" in line for line in progress.lines)
    regsurgery.find(str(demo_folder), tmp_path / "plain.yaml", num_images=num_images, smallest=True)
    assert recipe.read_bytes() == (tmp_path / "plain.yaml").read_bytes()


def find_demo(folder: Path, output: Path) -> None:
    regsurgery.find(str(folder), output, num_images=160)


def start(folder: Path, output: Path) -> BaseProcess:
    """A process of its own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "regsurgery.search.find", __name__])
    process = context.Process(target=find_demo, args=(folder, output))
    process.start()
    return process


def finish(process: BaseProcess) -> None:
    process.join(240)
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def whole(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of one process that nobody disturbed."""
    output = tmp_path_factory.mktemp("whole") / "whole.yaml"
    finish(start(demo_folder, output))
    return output


@pytest.mark.slow
def test_killed_at_any_moment_it_gives_the_same_recipe(demo_folder: Path, whole: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    finish(start(demo_folder, tmp_path / "timed.yaml"))
    duration = time.monotonic() - started
    rng = random.Random(0)
    output = tmp_path / "killed.yaml"
    for _ in range(5):
        process = start(demo_folder, output)
        process.join(rng.uniform(0, 1) * duration)
        readers = []
        with suppress(psutil.NoSuchProcess):  # it may have finished
            readers = psutil.Process(process.pid).children()
        process.kill()
        process.join(30)
        assert psutil.wait_procs(readers, timeout=10)[1] == []  # one that writes into a full pipe would never end
    finish(start(demo_folder, output))
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_two_processes_find_the_same_as_one(demo_folder: Path, whole: Path, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "regsurgery")
    command = [sys.executable, *launcher, "find", str(demo_folder), "-o", str(tmp_path / "two.yaml"), "-q"]
    assert subprocess.run([*command, "--num-images", "160"], check=False, timeout=240).returncode == 0
    assert (tmp_path / "two.yaml").read_bytes() == whole.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["two.yaml"]
