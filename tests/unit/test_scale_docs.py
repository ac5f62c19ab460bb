"""docs/scale.md says what its script computes, and its snippets run as they are written."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import regsurgery
from regsurgery.checkpoints.safetensors_file import read_header

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "scale.md").read_text("utf-8")
SCRIPT = runpy.run_path(str(ROOT / "docs" / "scale_figures.py"))


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


def test_the_tables_are_the_scripts() -> None:
    between = DOCUMENT.partition("<!-- python docs/scale_figures.py -->\n")[2].partition("\n<!-- end -->")[0]
    assert between.split("\n\n") == list(SCRIPT["figures"]().values())


def test_the_rehearsals_table_is_the_scripts() -> None:
    after = DOCUMENT.partition("<!-- python docs/scale_figures.py --rehearsal -->\n")[2]
    assert after.partition("\n<!-- end -->")[0] == SCRIPT["rehearsal"]()


def test_the_decoding_time_is_measured(demo_folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    seconds = []
    for size in (16, 1024):
        (tmp_path / str(size)).mkdir()
        for number in range(4):
            Image.effect_noise((size, size), 90).save(tmp_path / str(size) / f"{number}.jpg")
        seconds.append(SCRIPT["decode_seconds"](str(demo_folder), tmp_path / str(size)))
    assert 0 < 3 * seconds[0] < seconds[1] < 5


def fake_ray() -> Any:
    """Runs every task at once, in this process."""

    def remote(**_: Any) -> Callable[[Any], Any]:
        return lambda function: types.SimpleNamespace(remote=function)

    return types.SimpleNamespace(remote=remote, init=lambda: None, get=list)


@pytest.mark.slow
def test_the_ray_snippet_and_the_size_of_statistics(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (snippet,) = [each for each in snippets("python") if "import ray" in each]
    given = {'"MODEL", "DIR", 64': f"{str(demo_folder)!r}, None, 2", 'device_map="cuda"': 'device_map="cpu"'}
    for written, here in given.items():
        assert written in snippet
        snippet = snippet.replace(written, here)
    (tmp_path / "parts").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", fake_ray())
    exec(compile(snippet, "scale.md", "exec"), {})
    regsurgery.find(str(demo_folder), "plain.yaml")
    assert Path("recipe.yaml").read_bytes() == Path("plain.yaml").read_bytes()
    path = Path("parts/1.stats")
    hidden_sizes = [len(sums) for name, sums in load_file(path).items() if name.startswith("everywhere")]
    assert len(hidden_sizes) > 1
    assert path.stat().st_size - read_header(path).data_start == SCRIPT["statistics_bytes"](hidden_sizes)


def test_the_shell_snippets_are_valid_and_their_options_exist() -> None:
    written = snippets("sh")
    options = subprocess.run(
        [sys.executable, "-m", "regsurgery", "find", "--help"],
        capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"},
    ).stdout  # fmt: skip
    assert len(written) == 4
    for snippet in written:
        subprocess.run(["bash", "-n", "-c", snippet], check=True)
        for _, arguments in re.findall(r"regsurgery (find) (.*)", snippet):
            assert set(re.findall(r"--[a-z-]+", arguments)) <= set(re.findall(r"--[a-z-]+", options))
