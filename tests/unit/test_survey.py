"""Lists, the order of stages, and what a survey keeps: with stages that only write their records."""

from __future__ import annotations

import errno
import fcntl
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import regsurgery
from regsurgery.errors import CheckpointError, OutputError, UserError
from regsurgery.progress import Progress
from regsurgery.surveying.cache import cached_repository
from regsurgery.surveying.listed import parse_list, read_list
from regsurgery.surveying.records import CRASHED, DONE, FAILED, REFUSED, Record, read_record, write_record
from regsurgery.surveying.work import Work

LIST = """\
schema: 1
models:
  - {name: one, model: user/one}
  - {name: two & more, model: user/two, library: timm}
"""
NORMS = {"value": 2.0, "low": 1.0, "high": 3.0, "n": 8}
FOUND = {"register_neurons": {"1": [3, 4]}, "num_registers": 2, "ranked": [[1, 3], [1, 9]], "paper_is_chosen": False}
RESULTS: dict[str, dict[str, Any]] = {
    "doctor": {"verdict": "register_neurons", "outliers_per_image": 4.0, "emergence_block": 1, "reason": "because"},
    "find": FOUND,
    "patch": {"register_neurons": {"1": [3]}, "num_registers": 1},
    "eval": {
        "figures": [
            {"name": "max", "where": {"block": block}, "original": {**NORMS, "value": 10.0 * block}, "patched": NORMS}
            for block in (1, 2, 3)
        ]
    },
}


def refusal(text: str) -> str:
    with pytest.raises(UserError) as refused:
        parse_list(text, "mine.yaml")
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- lists ------------------------------------------------------------------------------------------------------------


def test_a_list_says_which_models_and_what_is_published() -> None:
    expected = "expected: [{figure: lost, original: 0.3, patched: 0.5, source: a paper}]"
    one, two = parse_list(LIST.replace("library: timm}", f"library: timm, {expected}}}"), "mine.yaml")
    assert (one.name, one.model, dict(one.loading), one.expected) == ("one", "user/one", {}, ())
    assert (two.slug, dict(two.loading)) == ("two-more", {"library": "timm"})
    (figure,) = two.expected
    assert (figure.figure, figure.mode, figure.original, figure.patched) == ("lost", "shift", 0.3, 0.5)


@pytest.mark.parametrize(
    "line, said",
    [
        ("- {name: one, model: user/three}", "'one' and 'one' would have one folder"),
        ("- {name: ONE., model: user/three}", "'ONE.' and 'one' would have one folder"),
        ("- {model: user/three}", "mine.yaml: model 3: 'name' must be text, found None"),
        ("- {name: three}", "'model' must be text"),
        ("- three", "model 3: must be a mapping with a name and a model"),
        ("- {name: three, model: m, trust_remote_code: true}", "unknown key 'trust_remote_code'"),
        ("- {name: three, model: m, subfoldr: x}", "did you mean 'subfolder'?"),
        ("- {name: three, model: m, ema: 1}", "model 3 (three): 'ema' has a value of the wrong kind, 1"),
        ("- {name: three, model: m, expected: 1}", "'expected' must be a list"),
        ("- {name: three, model: m, expected: [{figure: lst, source: s}]}", "did you mean 'lost'?"),
        ("- {name: three, model: m, expected: [{figure: lost, original: 1}]}", "lost: 'source' must be text"),
        ("- {name: three, model: m, expected: [{figure: lost, source: s}]}", "give original or patched"),
        ("- {name: three, model: m, expected: [{figure: lost, source: s, value: 1}]}", "lost: unknown key 'value'"),
        ("- {name: three, model: m, expected: [{figure: neurons, source: s, recipe: dmo}]}", "did you mean 'demo'?"),
        ("- {name: three, model: m, expected: [{figure: lost, source: s, original: true}]}", "wrong kind, True"),
        ("- {name: three, model: m, expected: [{figure: lost, source: s, original: 1, mode: x}]}", "mode must be one"),
    ],
)
def test_a_wrong_list_is_refused_by_entry_and_key(line: str, said: str) -> None:
    assert said in refusal(f"{LIST}  {line}\n")


@pytest.mark.parametrize(
    "text", ["schema: 1\nmodels: []", "schema: 2\nmodels: [{name: a, model: b}]", "models: [}", "1"]
)
def test_what_is_no_list_is_refused(text: str) -> None:
    assert refusal(text).startswith("mine.yaml: ")


def test_a_list_that_is_not_there_is_told_what_is() -> None:
    with pytest.raises(UserError, match="did you mean 'published'"):
        read_list("publshed")


def test_the_bundled_list_has_models_that_their_libraries_know() -> None:
    """Ids of timm and open_clip resolve; those of the Hub alone can only have its form."""
    from regsurgery.frontends.model_id import hub_place

    entries = read_list("published")
    assert len(entries) == 24
    assert all(hub_place(entry.model).repo.count("/") == 1 for entry in entries)
    figures = {(entry.name, one.figure) for entry in entries for one in entry.expected}
    assert {("DINOv2-L/14", "lost"), ("InternViT-6B", "lost"), ("OpenCLIP B/16", "accuracy")} <= figures


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def surveyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`survey` of LIST with stages that write what `RESULTS` and `outcomes` say; `ran` has them in their order."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "list.yaml").write_text(LIST)

    def run(outcomes: dict[str, str] | None = None, **options: Any) -> Any:
        def stage(work: Work) -> int:
            if work.stage.kind == "find":
                for name in ("recipe.yaml", "recipe-paper.yaml"):
                    (work.folder / name).write_text("")
            if work.stage.kind == "patch" and work.stage.variant is not None:
                (work.folder / work.stage.variant.name).mkdir(exist_ok=True)
            for name in work.stage.records:
                ran.append(f"{work.entry.name}: {name}")
                outcome = (outcomes or {}).get(ran[-1], DONE)
                if outcome == "killed":
                    return -signal.SIGKILL
                if outcome == "stopped":
                    raise KeyboardInterrupt
                result = RESULTS[work.stage.kind] if outcome == DONE else None
                write_record(work.folder, Record(name, outcome, None if result else "<b>no|t</b>", result, 1.5))
            return 0

        monkeypatch.setattr("regsurgery.surveying.survey._in_a_process", stage)
        ran.clear()
        how = {"mode": ["shift"], "num_images": 4, **options}
        return regsurgery.survey(tmp_path / "list.yaml", tmp_path / "out", **how)

    ran: list[str] = []
    run.ran = ran  # type: ignore[attr-defined]
    return run


WHOLE = ["doctor", "find", *(f"{setting}-shift.{what}" for setting in ("paper", "ours")
                             for what in ("patch", "norms", "fidelity"))]  # fmt: skip


def test_every_model_goes_through_every_stage_once(surveyed: Any, tmp_path: Path) -> None:
    first = surveyed()
    assert surveyed.ran == [f"{name}: {stage}" for name in ("one", "two & more") for stage in WHOLE]
    assert first.failed == ()
    assert not list((tmp_path / "out" / "models").glob("*/*-shift")), "patched folders are removed"
    surveyed()
    assert surveyed.ran == []
    written = json.loads((tmp_path / "out" / "survey.json").read_text())
    assert [model["name"] for model in written["models"]] == ["one", "two & more"]
    row = next(line for line in (tmp_path / "out" / "survey.md").read_text().splitlines() if "| ours | shift |" in line)
    assert "| 20.00 → 2.000 (1.000 to 3.000) |" in row, "the norm after the last block but one"


def test_a_stopped_survey_continues_where_it_stopped(surveyed: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        surveyed({"one: paper-shift.fidelity": "stopped"})
    surveyed()
    assert surveyed.ran[0] == "one: paper-shift.fidelity" and surveyed.ran[1] == "one: ours-shift.patch"


def test_a_patched_folder_that_was_lost_is_made_again(surveyed: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        surveyed({"one: paper-shift.fidelity": "stopped"})
    (tmp_path / "out" / "models" / "one" / "paper-shift").rmdir()
    surveyed(only=["one"])
    assert surveyed.ran[:2] == ["one: paper-shift.patch", "one: paper-shift.fidelity"]


@pytest.mark.parametrize("outcome", [REFUSED, CRASHED, "killed"])
def test_a_failed_model_leaves_the_others_alone(surveyed: Any, tmp_path: Path, outcome: str) -> None:
    found = surveyed({"one: doctor": outcome})
    assert surveyed.ran == ["one: doctor", *(f"two & more: {stage}" for stage in WHOLE)]
    assert found.failed == ("one",)
    (record,) = found.models[0].records
    assert record.outcome == (CRASHED if outcome == "killed" else outcome)
    if outcome == "killed":
        assert "ended by SIGKILL; see log.txt in models/one" in record.error
    else:
        assert "<b>" not in (tmp_path / "out" / "survey.html").read_text()
        assert r"&lt;b>no\|t&lt;/b>" in (tmp_path / "out" / "survey.md").read_text()
    surveyed()
    assert surveyed.ran == [], "what failed is not tried again"
    surveyed(retry=True)
    assert surveyed.ran == [f"one: {stage}" for stage in WHOLE]


def test_a_mode_that_a_model_does_not_allow_is_no_failure(surveyed: Any) -> None:
    found = surveyed({"one: paper-shift.patch": REFUSED, "two & more: paper-shift.patch": FAILED}, keep=True)
    assert "one: ours-shift.norms" in surveyed.ran and "one: paper-shift.norms" not in surveyed.ran
    assert found.failed == ("two & more",)


def test_a_task_that_kills_its_process_is_the_one_that_failed(surveyed: Any, tmp_path: Path) -> None:
    surveyed({"one: ours-shift.norms": "killed"})
    folder = tmp_path / "out" / "models" / "one"
    norms, fidelity = (read_record(folder, f"ours-shift.{task}") for task in ("norms", "fidelity"))
    assert norms is not None and norms.outcome == CRASHED and fidelity is not None and fidelity.outcome == DONE


def test_without_register_neurons_nothing_is_searched(surveyed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RESULTS, "doctor", {**RESULTS["doctor"], "verdict": "already_registered"})
    found = surveyed()
    assert surveyed.ran == ["one: doctor", "two & more: doctor"] and found.failed == ()
    assert [model.summary for model in found.models] == ["already_registered"] * 2


@pytest.mark.parametrize("model", ["./absent", "../absent/model", "a b/c", "demo", "user/three"])
def test_what_no_cache_can_have_is_for_doctor_to_refuse(model: str) -> None:
    assert cached_repository(model) is None


def test_what_was_in_the_cache_before_stays_there(
    surveyed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the survey was stopped and its own download is there when it continues."""
    freed: list[str] = []
    monkeypatch.setattr("regsurgery.surveying.survey.free", lambda model: freed.append(model) or 0)
    (tmp_path / "cache" / "models--user--one").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        surveyed({"two & more: find": "stopped"}, free_cache=True)
    (tmp_path / "cache" / "models--user--two").mkdir()
    surveyed(free_cache=True)
    assert freed == ["user/two"]


def test_images_can_be_added_but_not_changed(surveyed: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        surveyed({"one: doctor": "stopped"}, only=["one"])
    for other, named in (({"seed": 1}, "seed (0)"), ({"num_images": 5}, "images (4 generated dead-leaves")):
        with pytest.raises(OutputError, match="was begun with other") as refused:
            surveyed(**other)
        assert named in str(refused.value)
    labelled = tmp_path / "labelled"
    labelled.mkdir()
    for number in range(4):
        (labelled / f"{number}_x.jpg").write_bytes(b"")
    surveyed(only=["one"], labelled=labelled, keep=True)
    assert "one: ours-shift.classify" in surveyed.ran
    (tmp_path / "list.yaml").write_text(LIST.replace("user/one", "user/other"))
    with pytest.raises(OutputError, match=r"has the figures of .*user/one"):
        surveyed(labelled=labelled)


def test_a_folder_is_one_surveys_at_a_time(surveyed: Any, tmp_path: Path) -> None:
    from regsurgery.surveying.survey import _own

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    with pytest.raises(OutputError, match="not the folder of a survey"):
        surveyed()
    (tmp_path / "out" / "mine.txt").unlink()
    (tmp_path / "out").rmdir()
    with _own(tmp_path / "out", Progress()), pytest.raises(OutputError, match="another survey is at work there"):
        surveyed()


def test_a_survey_begins_where_there_are_no_locks_and_where_another_has_just_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regsurgery.surveying import survey

    told: list[str] = []
    progress = Progress()
    monkeypatch.setattr(progress, "say", told.append)

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with survey._own(tmp_path / "begun", progress):
        monkeypatch.setattr(Path, "is_file", lambda path: False)  # it was looked for a moment before
        with (
            pytest.raises(OutputError, match="another survey is at work there"),
            survey._own(tmp_path / "begun", progress),
        ):
            pass
    monkeypatch.setattr(fcntl, "flock", flock)
    with survey._own(tmp_path / "out", progress):
        assert "has no locks; see to it that no other survey works there" in told[0]


def test_what_a_killed_survey_left_half_written_is_removed(surveyed: Any, tmp_path: Path) -> None:
    """Of a record that was whole when its run was killed, which is not written again."""
    surveyed(only=["one"])
    for place in (tmp_path / "out", tmp_path / "out" / "models" / "one"):
        (place / ".doctor.json.partial-0123abcd").mkdir()
        (place / ".doctor.json.partial-0123abcd" / "owner.json").write_text("")
    surveyed(only=["one"])
    assert not list((tmp_path / "out").rglob(".*"))


@pytest.mark.parametrize("content", ["{}", "[", '{"schema": 1}'])
def test_a_broken_record_is_named(surveyed: Any, tmp_path: Path, content: str) -> None:
    surveyed(only=["one"])
    (tmp_path / "out" / "models" / "one" / "find.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"find\.json: .*remove it, and the stage runs again"):
        surveyed()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"mode": ["shft"]}, "did you mean 'shift'"),
        ({"prompts": "x"}, "goes with --labelled"),
        ({"voc": "nowhere"}, "--voc nowhere: no such file or folder"),
        ({"only": ["on"]}, "did you mean 'one'"),
    ],
)
def test_a_wrong_option_is_refused_at_once(surveyed: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        surveyed(**options)
    assert surveyed.ran == []


# --- published figures ------------------------------------------------------------------------------------------------


def test_published_figures_stand_beside_the_measured_ones(surveyed: Any, tmp_path: Path) -> None:
    expected = """[{figure: verdict, value: register_neurons, source: a},
        {figure: num_neurons, patched: 50, source: b}, {figure: largest_norm, original: 30, patched: 3, source: c},
        {figure: neurons, recipe: demo, source: d}, {figure: lost, patched: 0.5, source: e, images: VOC 2007}]"""
    text = LIST.replace("model: user/one}", f"model: user/one, expected: {expected}}}")
    (tmp_path / "list.yaml").write_text(text)
    surveyed()
    page = (tmp_path / "out" / "survey.md").read_text()
    rows = [
        line
        for line in page.partition("## Published")[2].partition("## Cost")[0].splitlines()
        if line.startswith("| one ")
    ]
    cells = [[cell.strip() for cell in row.split("|")[2:-1]] for row in rows]
    assert cells == [
        ["verdict", "", "register_neurons", "register_neurons", "register_neurons", "a", ""],
        ["num_neurons", "shift", "50", "1", "1", "b", ""],
        ["largest_norm", "shift", "30 → 3", *["20.00 → 2.000 (1.000 to 3.000)"] * 2, "c", ""],
        ["neurons", "", "3 listed", "", "0 of 3 among the first 3 candidates", "d", ""],
        ["lost", "shift", "0.5000", "", "", "e", "VOC 2007"],
    ]


# --- processes --------------------------------------------------------------------------------------------------------

APART = """
import os, signal, sys
from pathlib import Path
from regsurgery.checkpoints.owned import OwnedFolder
from regsurgery.errors import UserError
from regsurgery.surveying import apart

apart.IMPORTED = ()
LOG = Path(sys.argv[1])
TEMPORARY = LOG.with_name("temporary")

def kills(number): print("said", flush=True); os.kill(os.getpid(), number)
def fails(): raise ValueError("a bug")
def works(): works.folder = OwnedFolder(TEMPORARY, "for-the-whole-process-")
def is_ended():
    with OwnedFolder(TEMPORARY, "for-a-block-"):
        kills(signal.SIGTERM)

if __name__ == "__main__":
    codes = [apart.run_apart(works, log=LOG), apart.run_apart(fails, log=LOG), apart.run_apart(kills, 9, log=LOG)]
    try:
        apart.run_apart(is_ended, log=LOG)
    except UserError as error:
        codes.append("SIGTERM" in str(error))
    print(codes)
"""


def test_a_process_ends_as_it_does_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    script = tmp_path / "script.py"
    script.write_text(APART)
    done = subprocess.run([sys.executable, script, tmp_path / "log"], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[0, 1, -9, True]\n", "")
    log = (tmp_path / "log").read_text()
    assert "ValueError: a bug" in log and log.count("said") == 2
    assert not list((tmp_path / "temporary").iterdir())
