"""The bounded run of `tests/fuzz`; the long one is `python -m tests.fuzz`, see CONTRIBUTING.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.kinds import KINDS

ROOT = Path(__file__).parents[2]
INPUTS = 300


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_damaged_input_ends_in_an_error_of_the_projects_own_or_is_accepted(tmp_path):
    done = run("--inputs", INPUTS, "--seed", 1, "--keep", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    rows = {line[:24].strip(): line[24:].split() for line in done.stdout.splitlines() if line[:24].strip() in KINDS}
    columns = done.stdout.splitlines()[0].split()
    assert set(rows) == set(KINDS), "every kind of damage is drawn"
    accepted = {kind: row[columns.index("accepted")] for kind, row in rows.items()}
    reaching = ("weights: other tensors", "config: tree", "preprocessor", "index", "recipe", "patched: config")
    assert all(accepted[kind] not in ("-", rows[kind][columns.index("all")]) for kind in reaching), (
        "deep stages are met"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [3])
def test_an_input_that_fails_is_reported_and_kept(tmp_path, monkeypatch, number):
    from tests.fuzz.run import fuzz

    def broken(path: Path) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("regsurgery.checkpoints.safetensors_file.read_header", broken)
    monkeypatch.setattr("tests.fuzz.run.build", lambda root: _only_weights(root))
    monkeypatch.setattr("tests.fuzz.run._warm", lambda folder: None)
    outcome = fuzz(1, 0, first=number, only="header:", keep=tmp_path / "kept")
    assert len(outcome.failures) == 1
    assert "ZeroDivisionError: planted" in outcome.failures[0]
    assert outcome.failures[0].startswith(f"0/{number} header")
    assert len(list((tmp_path / "kept").glob("*/model/*.safetensors"))) == 1


def _only_weights(root: Path):
    import torch
    from safetensors.torch import save_file

    from tests.fuzz.bases import Bases
    from tests.fuzz.kinds import LOADED

    names = (*LOADED, "adapter")
    for name in names:
        (root / name).mkdir()
        save_file({"a": torch.ones(3)}, root / name / "model.safetensors")
    return Bases({name: root / name for name in names}, None, None)
