"""`survey`, stopped wherever it writes, and continued."""

from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from tests.drills import Row, drill, tries
from tests.drills.moments import stopped_at_new
from tests.drills.patched import demo
from tests.drills.places import mounted
from tests.drills.running import ENDING, Forked, ended, forked_stages, gone, wait

LIST = "schema: 1\nmodels: [{name: demo, model: demo}]\n"
OF_THE_RUN = ("output", "seconds", "peak_rss_mb")  # in the result of a stage
SAMPLE = ("os.rename models/demo/find.json", "open models/demo/.ours-shift.patch.json.partial")  # in the tests


def survey(listed: Path, out: Path, *more: str, prepare: Any = forked_stages, **env: str) -> Forked:
    """Start `regsurgery survey` in a group of its own."""
    words = ["survey", str(listed), "-o", str(out), "--num-images", "8", "--mode", "shift", *more]
    return Forked(words, env, None, prepare, True)


def table(out: Path) -> dict[str, Any]:
    """Model and stage -> what is known of it, without what belongs to the run; the tables but that of costs."""
    models = json.loads((out / "survey.json").read_text())["models"]
    known: dict[str, Any] = {}
    for model in models:
        for record in model["records"]:
            result = {name: value for name, value in (record["result"] or {}).items() if name not in OF_THE_RUN}
            known[f"{model['name']} {record['stage']}"] = (record["outcome"], record["error"], result)
    tables = (out / "survey.md").read_text().split("\n## ")[1:]
    return known | {"tables": [one for one in tables if not one.startswith("Cost")]}


def whole(listed: Path, out: Path, tmp: Path) -> dict[str, Any]:
    """The table of a survey that nothing stops, and that may continue one; nothing half written is left."""
    code, said = ended(survey(listed, out, TMPDIR=str(tmp)))
    assert code == 0, said
    left = [path for path in out.rglob("*") if path.name.startswith(".") or path.name.endswith("-shift")]
    assert not left and not list(tmp.iterdir()), (left, list(tmp.iterdir()))
    return table(out)


def begun(place: Path) -> tuple[Path, Path, Path]:
    """A list, the folder of a survey, and one for temporary files."""
    (place / "list.yaml").write_text(LIST)
    (place / "tmp").mkdir()
    return place / "list.yaml", place / "out", place / "tmp"


def all_but(place: Path, first: tuple[str, ...]) -> Path:
    """The file of moments that are seen: all that an undisturbed run has, but for `first`; empty if there are none."""
    seen = place / "seen"
    seen.write_text("")
    if first:
        out, trace = place / "traced", place / "trace"
        trace.write_text("")
        prepare = partial(stopped_at_new, forked_stages, out, trace, 0, False)  # signal 0 stops nothing
        assert ended(survey(place / "list.yaml", out, prepare=prepare, TMPDIR=str(place / "tmp")))[0] == 0
        moments = trace.read_text().splitlines()
        assert set(first) <= set(moments), moments
        seen.write_text("".join(f"{moment}\n" for moment in moments if moment not in first))
    return seen


@drill
def surveys_killed_at_every_write(place: Path) -> Row:
    """`kill -9` of `survey` or of its group wherever it writes: the same command continues to the same table."""
    listed, out, tmp = begun(place)
    seen = all_but(place, SAMPLE[: tries(2, 0)])
    undisturbed = place / "traced"
    expected = table(undisturbed) if undisturbed.exists() else whole(listed, undisturbed, tmp)
    kills = 0
    while True:
        group = kills % 2 == 0
        how = partial(stopped_at_new, forked_stages, out, seen, signal.SIGKILL, group)
        process = survey(listed, out, prepare=how, TMPDIR=str(tmp))
        code, said = ended(process)
        gone(process.pid)
        if code == 0:
            break
        assert code == -signal.SIGKILL, (code, said)
        kills += 1
    assert whole(listed, out, tmp) == expected == table(out)
    return Row(kills, "continued, to the table of an undisturbed run; nothing half written left")


@drill
def surveys_ended_by_signals(place: Path) -> Row:
    """SIGTERM, SIGHUP and SIGINT to `survey` or its group: their exit code, one line, nothing half written, no stage
    that goes on; the same command continues to the same table.
    """
    listed, out, tmp = begun(place)
    seen = all_but(place, SAMPLE[1 : tries(2, 0)])
    undisturbed = place / "traced"
    expected = table(undisturbed) if undisturbed.exists() else whole(listed, undisturbed, tmp)
    codes: Counter[int] = Counter()
    while True:
        number, code = list(ENDING.items())[codes.total() % len(ENDING)]
        how = partial(stopped_at_new, forked_stages, out, seen, number, codes.total() % 2 == 0)
        process = survey(listed, out, prepare=how, TMPDIR=str(tmp))
        found, said = ended(process)
        gone(process.pid)
        if found == 0:
            break
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert found == code and len(errors) == 1, (found, code, said)
        left = [path for path in out.rglob(".*")] if out.exists() else []
        assert not left and not list(tmp.iterdir()), (left, list(tmp.iterdir()), seen.read_text().splitlines()[-1])
        codes[found] += 1
    assert whole(listed, out, tmp) == expected
    return Row(codes.total(), f"exit codes {', '.join(map(str, sorted(codes)))}; nothing left; continued")


@drill
def two_surveys_in_one_folder(place: Path) -> Row:
    """Of two surveys in one folder one works; the other says so in one line, and changes nothing."""
    listed, out, tmp = begun(place)
    listed.write_text(f"schema: 1\nmodels: [{{name: plain, model: '{plain(place / 'plain')}'}}]\n")
    first = survey(listed, out, TMPDIR=str(tmp))
    assert wait(lambda: (out / "survey.lock").exists(), first), first.communicate()
    others = [survey(listed, out, TMPDIR=str(tmp)) for _ in range(tries(1, 3))]
    told = 0
    for other in others:
        code, said = ended(other)
        assert code == 0 or (code == 2 and "another survey is at work there" in said), (code, said)
        told += code == 2
    assert ended(first)[0] == 0
    known = table(out)
    assert list(known) == ["plain doctor", "tables"] and not list(tmp.iterdir()), known
    assert told, "none ran beside the first"
    return Row(len(others), f"{told} were told that another survey is at work there; its table is whole")


@drill
def surveys_on_a_full_disk(place: Path) -> Row:
    """Without room a survey ends with one line; with room the same command, with `--retry`, ends whole."""
    listed, _, tmp = begun(place)
    tried, refused = 0, 0
    for kibibytes in (8, 16, 32, 64, 256, 1024, 2048)[:: tries(4, 1)]:
        with mounted(place / "disk", f"size={kibibytes}k") as is_mounted:
            if not is_mounted:
                return Row(1, "no tmpfs may be mounted here")
            out = place / "disk" / "out"
            code, said = ended(survey(listed, out, TMPDIR=str(tmp)))
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            assert (code, len(errors)) in ((2, 1), (1, 0), (0, 0)), (code, said)
            assert code != 2 or "No space left" in said or "room" in said, said
            refused += code != 0
            tried += 1
            shutil.rmtree(out, ignore_errors=True)
        assert not list(tmp.iterdir()), list(tmp.iterdir())
    return Row(tried, f"{refused} of {tried} had too little room, and said so")


def plain(folder: Path) -> Path:
    """A model in which there is nothing to fix: after `doctor` its turn is over."""
    from safetensors.torch import load_file, save_file

    weights = demo(folder) / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: value * (0.0 if "intermediate" in name else 1.0) for name, value in tensors.items()}, weights,
              metadata={"format": "pt"})  # fmt: skip
    return folder
