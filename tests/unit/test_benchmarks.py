"""The suite of benchmarks, not its figures: turns and ratios on a clock that counts work, goals, tables, the parts."""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")

import timm
import torch

from benchmarks import depth, full_size, goals, hooks, models, rehearsal, report, resident, suite
from benchmarks import latency as latency_part
from benchmarks.__main__ import main
from benchmarks.profiling import where_the_time_goes
from regsurgery.evaluation.timing import ratio, turns
from regsurgery.interval import Estimate
from tests.reference import naive_shift


class Work:
    """A clock that moves by the work that is done, by more in every round: a machine that becomes busy."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done: list[str] = []

    def way(self, name: str, cost: float) -> Callable[[], None]:
        def run() -> None:
            self.now += cost * (1 + len(self.done) // 2)
            self.done.append(name)

        return run


def two_ways() -> tuple[Work, dict[str, Callable[[], None]]]:
    work = Work()
    return work, {"original": work.way("original", 4.0), "shift": work.way("shift", 5.0)}


def test_a_ratio_is_that_of_the_work_though_the_machine_becomes_slower() -> None:
    work, ways = two_ways()
    rounds = list(islice(turns(ways, warm_up=2, clock=lambda: work.now), 8))
    assert rounds[0] == {"original": 12.0, "shift": 15.0}  # the third round: two have warmed up
    assert rounds[7] == {"original": 40.0, "shift": 50.0}
    found = ratio(rounds, "shift", "original")
    assert (found.value, found.low, found.high, found.n) == pytest.approx((1.25, 1.25, 1.25, 8))


def test_turns_begin_with_each_way_equally_often() -> None:
    work, ways = two_ways()
    list(islice(turns(ways, warm_up=0, clock=lambda: work.now), 8))
    starts = work.done[::2]
    assert starts.count("original") == starts.count("shift") == 4
    assert all(first != second for first, second in zip(starts[::2], starts[1::2], strict=True))


def test_no_way_always_runs_behind_the_same_one() -> None:
    work = Work()
    ways = {name: work.way(name, 1.0) for name in "abcd"}
    list(islice(turns(ways, warm_up=0, clock=lambda: work.now), 40))
    rounds = [work.done[at : at + 4] for at in range(0, len(work.done), 4)]
    behind = Counter((one, next_) for each in rounds for one, next_ in pairwise(each))
    assert all(sorted(each) == list("abcd") for each in rounds)
    assert len(behind) == 12 and max(behind.values()) < 2 * min(behind.values()) + 3


def test_rounds_end_when_the_time_is_up_or_all_is_known() -> None:
    same = [{"original": 4.0, "shift": 5.0}] * 100
    noisy = [{"original": 4.0, "shift": 5.0 + 0.7 * number % 2} for number in range(100)]
    late, never = 50.0, float("inf")

    def taken(rounds: list[dict[str, float]], until: float) -> int:
        ticks = iter(range(1000))
        found = latency_part.timed_rounds(iter(rounds), ("shift",), until, 0.01, clock=lambda: float(next(ticks)))
        return len(found)

    assert taken(same, never) == latency_part.FIRST_LOOK
    assert taken(noisy, late) == 54  # the clock is looked at from the fourth round on
    assert taken(noisy, 0.0) == 4


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (Estimate(1.005, 1.002, 1.008, 20), "met"),
        (Estimate(1.005, 1.002, 1.012, 20), "met, but the interval includes the limit"),
        (Estimate(1.012, 1.008, 1.02, 20), "missed, but the interval includes the limit"),
        (Estimate(1.03, 1.02, 1.04, 20), "missed"),
        (Estimate(1.01, None, None, 1), "met"),
        (None, "not measured"),
    ],
)
def test_a_goal_is_met_or_missed(found: Estimate | None, word: str) -> None:
    assert goals.Verdict("time", 1.01, "", found).word == word


def group(shape: str, backend: str, batch: int, dtype: str, **modes: float) -> dict[str, Any]:
    ratios = {
        mode: {"value": value, "low": value - 0.001, "high": value + 0.001, "n": 9} for mode, value in modes.items()
    }
    return {
        "shape": shape, "backend": backend, "batch": batch, "dtype": dtype, "device": "cpu", "rounds": 9,
        "name": f"{models.SHAPES[shape].name} {backend} batch {batch} {dtype}",
        "original": {"ms": 10.0, "peak_mb": 2.0}, "hooks_differ_by": None, "profiles": {},
        "modes": {mode: {"ratio": found, "ms": 11.0, "peak_mb": 2.5} for mode, found in ratios.items()},
    }  # fmt: skip


def test_goals_are_about_one_cell_each() -> None:
    groups = [
        group("L", "eager", 1, "fp32", shift=1.02, native=1.003),
        group("L", "eager", 8, "fp32", shift=1.5),
        group("L", "eager", 1, "bf16", shift=1.5, native=1.5),
        group("B", "compile", 1, "fp32", shift=1.014),
    ]
    words = [verdict.word for verdict in goals.latency_verdicts({"groups": groups})]
    assert words == ["missed", "not measured", "not measured", "met", "not measured", "met", "not measured"]


def test_the_goal_of_find_is_about_one_model() -> None:
    ratios = {way: {"value": 0.7, "low": 0.6, "high": 0.75, "n": 5} for way in ("b", "scores")}
    for model, block, word in (
        ("vit_base_patch16_224", 5, "met"),
        ("vit_base_patch16_224", 7, "not measured"),
        ("vit_tiny_patch16_224", 5, "not measured"),
    ):
        figures = {"speed": {"model": model, "settled_block": block, "ratios": ratios}}
        assert [verdict.word for verdict in goals.find_verdicts(figures)] == [word] * 2 + ["not measured"] * 2


def test_the_floor_counts_what_grows_with_the_tokens() -> None:
    shape = models.SHAPES["L"]
    linears, attention = 24 * 12 * 1024**2, 24 * 2 * 1024
    embedding = 256 * 3 * 14**2 * 1024
    counted = [linears * tokens + attention * tokens**2 + embedding for tokens in (257, 258)]
    assert shape.floor == pytest.approx(counted[1] / counted[0])
    assert 1 + 0.9 / 257 < shape.floor < 258 / 257 + 4e-4


@torch.no_grad()
def test_hooks_do_the_surgery_for_every_image_of_a_batch() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    images = torch.randn(3, 3, 160, 160)
    before = model(images)
    neurons = {2: (3, 8)}
    together = hooks.hooked(model, neurons)(images)
    assert not torch.allclose(together, before, atol=1e-4)
    torch.testing.assert_close(together, torch.cat([model(image[None]) for image in images]), atol=1e-5, rtol=1e-5)
    hidden = torch.randn(2, 6, 12)
    shifted = hooks._Shift((3, 8))(model, (), hidden)
    assert torch.equal(shifted, naive_shift(hidden, (3, 8), 1, 1, (1.0,)))


def test_what_is_made_anew_is_what_native_mode_writes(tmp_path: Path) -> None:
    shape = models.SHAPES["smoke"]
    written = models.Workshop(shape, tmp_path).module("native", "timm")
    made = models.stock_host(shape, models.Workshop(shape, tmp_path).stock())
    assert type(written) is type(made) and str(written) == str(made)
    shapes = [{name: value.shape for name, value in one.state_dict().items()} for one in (written, made)]
    assert shapes[0] == shapes[1] and shapes[0]["reg_token"] == (1, 1, 64)


def test_equal_weights_are_shared_and_others_kept() -> None:
    original = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    other = copy.deepcopy(original)
    with torch.no_grad():
        other[1].weight[0, 0] += 1
    kept = other[1].weight.detach().clone()
    assert models.share_weights(original, other) == 3
    assert other[0].weight.data_ptr() == original[0].weight.data_ptr()
    assert torch.equal(other[1].weight, kept) and other[1].weight.data_ptr() != original[1].weight.data_ptr()


def test_models_that_give_other_outputs_are_not_compared() -> None:
    modules = {"original": torch.nn.Identity(), "shift": torch.nn.Tanh(), "hooks": torch.nn.Tanh()}
    pixels = torch.linspace(-1, 1, 12).reshape(1, 3, 2, 2)
    assert latency_part.check_equal(modules, pixels) == 0
    for wrong in ({"hooks": torch.nn.Sigmoid()}, {"shift": torch.nn.Identity(), "hooks": torch.nn.Identity()}):
        with pytest.raises(RuntimeError, match="cannot be compared"):
            latency_part.check_equal({**modules, **wrong}, pixels)


def test_a_profile_names_the_operator_that_is_new() -> None:
    tokens = torch.randn(256, 256)  # large enough that no pause of the machine outweighs it
    found = where_the_time_goes(lambda: tokens @ tokens, lambda: torch.linalg.svd(tokens @ tokens))
    first = found["operators"][0]
    assert "svd" in first["operator"] and (first["original_calls"], first["patched_calls"]) == (0, 1)
    assert found["patched_ms"] > first["patched_ms"] > 0


def test_every_plan_has_every_factor_and_every_goal() -> None:
    plan = latency_part.PLANS["full", "cpu"]
    assert {one.shape for one in plan} == {"Ti", "B", "L", "Ti4", "B4"}
    assert {one.backend for one in plan} == {"eager", "compile", "pt2", "onnx"}
    assert {one.batch for one in plan} == {1, 8, 32} and {one.dtype for one in plan} == {"fp32", "bf16"}
    assert {mode for one in plan for mode in one.modes} == {"shift", "native", "bias", "hooks"}
    for device in ("cpu", "cuda"):
        for goal in goals.LATENCY_GOALS:
            about = [one for one in latency_part.PLANS["full", device] if goal.is_about(one, goal.mode, device)]
            assert len([one for one in about if goal.mode in one.modes]) == 1, f"{goal} on {device}"


def test_the_exponent_is_the_slope() -> None:
    assert depth.exponent((6, 12, 24, 48), [0.2 * blocks**1.5 for blocks in (6, 12, 24, 48)]) == pytest.approx(1.5)


def test_tables_are_markdown() -> None:
    assert report.table(("a", "b"), [("1", "x|y")]) == "| a | b |\n| --- | --- |\n| 1 | x\\|y |\n"
    assert report.shown(Estimate(1.00521, 1.00309, 1.00701, 9)) == "1.0052 [1.0031, 1.0070]"
    assert report.shown(Estimate(0.25, None, None, 1), "s", 2) == "0.25 s"
    assert report.rounded({"a": [1.23456789, "x"], "b": {"c": 3}}) == {"a": [1.2346, "x"], "b": {"c": 3}}


def seconds(value: float) -> dict[str, Any]:
    return {
        "seconds": {"value": value, "low": value, "high": value, "n": 4},
        "slowest": value,
        "over": value,
        "ratio": 2,
    }


MEASURED: dict[str, dict[str, Any]] = {
    "latency": {
        "groups": [group("L", "eager", 1, "fp32", shift=1.02, native=1.003)],
        "floors": {"ViT-L/14": 1.004}, "not_run": ["ViT-B/16 onnx batch 1 fp32"], "failed": {},
    },
    "find": {
        "memory": [{"images": 8, "before": 800.0, "peak": 900.0}, {"images": 80, "before": 800.0, "peak": 901.0}],
        "processes": {
            "images": 80,
            "speed_up": {"value": 1.9, "low": 1.8, "high": 2.0, "n": 3},
            "two_over_half": {"value": 1.05, "low": 1.0, "high": 1.1, "n": 3},
            "apart_over_half": {"value": 1.04, "low": 1.0, "high": 1.1, "n": 3},
        },
    },
    "patch": {
        "sizes": [
            {"gigabytes": 0.1, "blocks": 2}
            | {run: {"seconds": 1.5, "of_cp": 3.0, "cpu_seconds": 2, "peak_mb": 800, "reads": 2} for run in report.RUNS}
        ]
    },
    "rehearsal": {
        "images": 8, "max_memory": "6GB", "failed": {"llava-7b": "make: exit status 1: no room"},
        "models": {
            "dinov2-l": {
                "name": "DINOv2-L/14", "dtype": "float32", "load_average": [2.0, 3.0], "gigabytes": 1.217, "shards": 1,
                "planted": {"12": [3, 4], "13": [7]}, "problems": [],
                "steps": {
                    "make": {"exit": 0, "seconds": 9.6, "cpu_seconds": 12.0, "peak_mb": 900.0, "own_mb": 700.0},
                    "find": {"exit": 0, "seconds": 60.0, "cpu_seconds": 99.0, "peak_mb": 9000.0, "own_mb": 3000.0,
                             "outcome": "the 3 planted neurons and no other; 1 register"},
                },
            },
            "llava-7b": {
                "name": "LLaVA 1.5 7B", "dtype": "float16", "load_average": [2.0, 3.0], "planted": {},
                "problems": ["make: exit status 1: no room"],
                "steps": {"make": {"exit": 1, "seconds": 3.0, "cpu_seconds": 2.0, "peak_mb": 300.0, "own_mb": 200.0}},
            },
        },
    },
    "startup": {"rounds": 4, "runs": {"regsurgery --help": seconds(0.1), "import regsurgery": seconds(0.4)}},
    "depth": {
        "width": 64, "rounds": 4, "seconds": {"trace": {"6": 1.0, "12": 2.0}}, "exponents": {"trace": 1.0},
    },
}  # fmt: skip


EVERY = ["--only", ",".join(suite.PARTS)]


def fake(failing: str = "") -> Callable[..., dict[str, Any]]:
    def run(order: suite.Order, say: Callable[[str], None]) -> dict[str, Any]:
        say("a line")
        fails = order.name == failing
        return {
            "form": order.form, "device": order.device, "seconds": 1.0, "load_average": [0.1, 0.2],
            "machine": {"cpu": "a processor", "cores": 2, "threads": order.threads, "torch": "2.15.0"},
            "status": "failed" if fails else "ok", "error": "exit status 1:\nKilled" if fails else None,
            "figures": None if fails else MEASURED[order.name],
        }  # fmt: skip

    return run


def test_every_part_is_run_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(MEASURED) == set(suite.PARTS) == set(report.RENDERERS)
    assert main([*EVERY, "--short", "--threads", "2", "--output", str(tmp_path)], fake()) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    for part in suite.PARTS.values():
        assert f"## {part.title}\n\na processor, 2 cores, 2 threads; torch 2.15.0; load average 0.1 before" in text
    assert "| shift over original, ViT-L/14, T = 257, eager | 1.008 | 1.0200 [1.0190, 1.0210] | missed |" in text
    assert "| `import regsurgery` | 0.3 s | 0.4000 [0.4000, 0.4000] s | missed |" in text
    assert "| `regsurgery --help` | 0.5 s | 0.1000 [0.1000, 0.1000] s | met |" in text
    assert "Not run, since the time was up: ViT-B/16 onnx batch 1 fp32" in text
    assert "| resident memory of every command, DINOv2-L/14 | 8 GB | 9.4372 GB | missed |" in text
    assert "| resident memory of every command, LLaVA 1.5 7B | 8 GB |  | not measured |" in text
    assert "|  | find | 0 | 60 | 99 | 9000 | 3000 | the 3 planted neurons and no other; 1 register |" in text
    assert set(json.loads((tmp_path / "results.json").read_text())) == set(suite.PARTS)
    assert "latency: a line" in capsys.readouterr().out


@pytest.mark.parametrize("name", suite.PARTS)
def test_one_part_alone_keeps_the_others_figures(name: str, tmp_path: Path) -> None:
    main([*EVERY, "--output", str(tmp_path)], fake())
    assert main(["--only", name, "--short", "--output", str(tmp_path)], fake(failing=name)) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert {key: record["form"] for key, record in results.items()} == {
        key: "short" if key == name else "full" for key in suite.PARTS
    }
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.count("**Failed.**") == 1 and "exit status 1:\nKilled" in text


def test_figures_of_another_version_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*EVERY, "--output", str(tmp_path)], fake())
    kept = json.loads((tmp_path / "results.json").read_text())
    del kept["find"]["figures"]["processes"]["apart_over_half"]
    (tmp_path / "results.json").write_text(json.dumps(kept))
    assert main(["--only", "startup", "--output", str(tmp_path)], fake()) == 0
    assert "find: the earlier figures are of another version" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()).keys() == suite.PARTS.keys() - {"find"}


def test_a_part_that_takes_hours_is_run_only_where_it_is_named(tmp_path: Path) -> None:
    orders: list[suite.Order] = []

    def run(order: suite.Order, say: Callable[[str], None]) -> dict[str, Any]:
        orders.append(order)
        return fake()(order, say)

    main(["--output", str(tmp_path)], run)
    assert "rehearsal" not in {order.name for order in orders} and not any(order.more for order in orders)
    main(["--only", "rehearsal", "--models", "clip-l,llava-7b", "--output", str(tmp_path)], run)
    assert orders[-1].more == {"folder": str(tmp_path), "models": ["clip-l", "llava-7b"]}
    assert orders[-1].seconds == suite.PARTS["rehearsal"].seconds["full"] > suite.TOTAL["full"]


def test_an_unknown_part_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "latency,memory", "--output", str(tmp_path)], fake())
    assert "memory: not one of startup, depth" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--only", "rehearsal", "--models", "vit", "--output", str(tmp_path)], fake())
    assert "vit: not one of dinov2-l, clip-l" in capsys.readouterr().err


def test_parts_share_the_time_that_there_is() -> None:
    for form, minutes in (("full", 20), ("short", 3)):
        assert suite.TOTAL[form] < 60 * minutes
        wanted = {name: part.seconds[form] for name, part in suite.PARTS.items()}
        assert {name: suite.allowed(name, form, 0) for name in wanted} == wanted
        left = wanted["latency"] - 20
        assert suite.allowed("latency", form, suite.TOTAL[form] - left) == left
        assert suite.allowed("latency", form, suite.TOTAL[form] + 1000) == suite.LEAST[form]


def test_a_part_that_dies_or_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    command = ["python", "-c", "print('so far'); raise SystemExit(3)"]
    assert suite._watched(command, 1, 60, said.append) == ("failed", "exit status 3:\nso far")
    assert said == ["so far"]
    status, error = suite._watched(["sleep", "60"], 1, 0.1, said.append)
    assert status == "failed" and error is not None and "more than 0 s" in error
    assert suite._watched(["true"], 1, 60, said.append) == ("ok", None)


def test_memory_is_that_of_a_command_and_what_it_starts(tmp_path: Path) -> None:
    child = "import time; held = bytearray(b'1') * (60 << 20); time.sleep(0.6)"
    script = "import subprocess, sys; held = bytearray(b'1') * (90 << 20)"
    script = f"{script}; subprocess.run([sys.executable, '-c', {child!r}]); print('done'); sys.exit(3)"
    cost = resident.run([sys.executable, "-c", script], tmp_path / "out")
    assert (cost.exit, (tmp_path / "out").read_text()) == (3, "done\n")
    assert 150 < cost.own_mb < cost.peak_mb < 220 and cost.seconds > 0.5 > cost.cpu_seconds > 0


def test_a_rehearsal_says_what_is_wrong() -> None:
    planted = {"12": [3, 4], "13": [7]}
    sick = {"verdict": "register_neurons", "reason": "", "outliers_per_image": 8.0, "emergence_block": 12}
    cured = {"passed": True, "failures": [], "outliers_per_image": {"original": 8.0, "patched": 0.0}}
    found = {"register_neurons": {"12": [4, 3], "13": [7]}, "num_registers": 1}
    verified = {**cured, "passed": False, "failures": ["the outputs differ"]}
    left = {**cured, "outliers_per_image": {"original": 8.0, "patched": 0.1}}
    for step, said, problem in (
        ("doctor", sick, None),
        ("doctor", {**sick, "verdict": "none", "reason": "few"}, "the verdict is none: few"),
        ("doctor", {**sick, "emergence_block": 3}, "neurons were planted from block 12 on"),
        ("find", found, None),
        ("find", {**found, "register_neurons": {"12": [3]}}, "found 12:3; planted were 12:3 12:4 13:7"),
        ("patch", {"verify": cured}, None),
        ("verify", verified, "the outputs differ"),
        ("verify", left, "outliers are left"),
    ):
        assert rehearsal.OUTCOMES[step](said, planted)[1] == problem


@pytest.mark.slow
def test_a_rehearsal_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(rehearsal, "NUM_IMAGES", 4)
    *_, figures = rehearsal.measure("smoke", "cpu", 600, said.append, folder=str(tmp_path))
    assert figures["failed"] == {} and list(figures["models"]) == [full_size.SMOKE]
    record = figures["models"][full_size.SMOKE]
    assert list(record["steps"]) == ["make", "doctor", "find", "patch", "verify"]
    assert all(cost["exit"] == 0 and cost["own_mb"] > 100 for cost in record["steps"].values())
    assert record["steps"]["find"]["outcome"] == "the 2 planted neurons and no other; 1 register"
    assert record["steps"]["verify"]["outcome"].endswith(" 0.00 after") and record["shards"] > 1
    assert [path.name for path in tmp_path.iterdir()] == [rehearsal.KEPT]  # the models are removed
    again = list(rehearsal.measure("smoke", "cpu", 600, said.append, folder=str(tmp_path)))
    assert again[-1] == figures and said[-1] == "smoke: measured before"
