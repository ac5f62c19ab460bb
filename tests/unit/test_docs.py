"""Every code block of the documentation is run, or parsed, or says why not.

Python blocks run, those of a page one after another in one namespace, in a folder that holds what they name. Of shell
blocks every `regsurgery` command is parsed; a block with other commands needs a reason for not being run, as has
everything else that is not run: `<!-- not run: REASON -->` on the line before it.
"""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
from PIL import Image

import regsurgery
from regsurgery.cli.app import app
from regsurgery.recipe import parse_recipe
from regsurgery.surveying.listed import parse_list
from tests.conftest import Planted
from tests.e2e.test_families import write_llava
from tests.picos import PICOS, Pico, by_id

ROOT = Path(__file__).resolve().parents[2]
GENERATED = {ROOT / "docs" / "cli.md"}  # from the commands; test_cli.py compares
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted({*(ROOT / "docs").glob("*.md")} - GENERATED)]
BLOCK = re.compile(r"(?:^<!-- not run: ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
SHELL = ("sh", "console")
LANGUAGES = (*SHELL, "python", "yaml", "mermaid")
TIMM = next(pico for pico in PICOS if pico.id.startswith("timm-"))


def write_depth(folder: Path) -> None:
    from transformers import DPTImageProcessor

    by_id("whole-depth-anything").build(folder)
    DPTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


WHOLES = {"llava-patched": write_llava, "depth-patched": write_depth}  # folders, and what writes their sources


@dataclass(frozen=True)
class Block:
    """A fenced block; `reason` says why it is not run, "" if it is."""

    page: str
    line: int
    language: str
    code: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text("utf-8")
    for found in BLOCK.finditer(text):
        reason, language, code = found.groups()
        yield Block(page.name, text.count("\n", 0, found.start(2)) + 1, language, code, reason or "")


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = sorted({block.page for block in BLOCKS if block.language == "python" and not block.reason})
DEMOS = ("demo-patched", "demo-pt2", "native")


def commands_of(block: Block) -> list[list[str]]:
    """The words of every command of a shell block; of a console block those after `$`."""
    lines = block.code.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    kept = []
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split, lexer.commenters = True, "#"
        command: list[str] = []
        for word in [*lexer, "&&"]:
            if set(word) <= set(";&|"):
                kept.append(command)
                command = []
            else:
                command.append(word)
    return [command for command in kept if command]


def regsurgery_words(command: list[str]) -> list[str] | None:
    """What follows `regsurgery` in a command, or in one that a launcher starts; None if it is another command."""
    words = command[command.index("-m") :] if command[:1] != ["python"] and "-m" in command else command
    words = words[1:] if words[0] == "-m" else words
    return words[1:] if words and Path(words[0]).name == "regsurgery" else None


def parse(words: list[str]) -> None:
    """Raises if there is no such command or option, or a value is missing."""
    command: Any = typer.main.get_command(app)
    words = list(words)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"no such command: {words[0]}"
        command = command.commands[words.pop(0)]
    command.make_context("regsurgery", words, resilient_parsing=hasattr(command, "commands"))


def test_no_block_is_overlooked() -> None:
    """Every fence opens or closes a block, and is of a language that is looked at."""
    for page in PAGES:
        assert page.read_text("utf-8").count("```") == 2 * len(list(blocks_of(page))), page.name
    assert not [str(block) for block in BLOCKS if block.language not in LANGUAGES]


def test_every_reason_stands_right_before_its_block() -> None:
    for page in PAGES:
        reasons = [block for block in blocks_of(page) if block.reason]
        assert len(re.findall("^<!-- not run: ", page.read_text("utf-8"), re.M)) == len(reasons), page.name


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in SHELL], ids=str)
def test_shell_blocks_name_commands_and_options_that_exist(block: Block) -> None:
    commands = commands_of(block)
    assert commands
    others = []
    for command in commands:
        words = regsurgery_words(command)
        if words is None:
            others.append(" ".join(command))
        else:
            parse(words)
    assert block.reason or not others, f"{block}: say why these are not run: <!-- not run: REASON -->"


@pytest.mark.parametrize("line", ["patch demo -o x --imges y", "ptch demo", "eval nrms x"])
def test_a_wrong_command_would_be_seen(line: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such (option|command)"):
        parse(line.split())


def test_yaml_blocks_are_recipes_or_lists_of_models() -> None:
    found = [block for block in BLOCKS if block.language == "yaml"]
    assert found
    for block in found:
        (parse_list if block.page == "survey.md" else parse_recipe)(block.code, str(block))


def write_noise(folder: Path, count: int) -> Path:
    for number in range(count):
        Image.effect_noise((96, 96), 90).convert("RGB").save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Patched folders by the names that the pages use, each made when a page first asks for it."""
    root, made = tmp_path_factory.mktemp("docs"), {}
    noise = write_noise(tmp_path_factory.mktemp("noise"), 12)  # to fit native mode on: fewer than are generated
    how: dict[str, dict[str, Any]] = {
        "demo-patched": {},
        "demo-pt2": {"format": "pt2"},
        "native": {"mode": "native", "format": "timm", "calibrate": False, "images": noise},
    }

    def folder(name: str) -> Path:
        if name in made:
            return made[name]
        made[name], source = root / name, root / f"{name}-source"
        if name in WHOLES:
            WHOLES[name](source)
            recipe = regsurgery.Recipe({1: (3,)})
            regsurgery.patch(str(source), made[name], recipe=recipe, num_images=2, verification=False)
        else:
            regsurgery.patch("demo", made[name], recipe="demo", verification=False, **how[name])
        return made[name]

    return folder


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page == "inside.md")) for page in PYTHON]
)
def test_python_blocks_run(
    page: str,
    folders: Callable[[str], Path],
    planted_picos: Callable[[Pico], Planted],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = [block for block in BLOCKS if block.page == page and block.language == "python" and not block.reason]
    for name in (*DEMOS, *WHOLES):
        if any(re.search(rf"[\":]{name}[\"/]", block.code) for block in code):
            (tmp_path / name).symlink_to(folders(name))
    if any('"patched"' in block.code for block in code):  # of a timm model, with its own loader
        planted = planted_picos(TIMM)
        recipe = regsurgery.Recipe({block: tuple(neurons) for block, neurons in planted.neurons.items()})
        regsurgery.patch(str(planted.folder), tmp_path / "patched", recipe=recipe, num_images=4, verification=False)
    if any('"photo.jpg"' in block.code for block in code):
        Image.effect_noise((96, 80), 90).convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names: dict[str, Any] = {}
    for block in code:
        exec(compile(block.code, str(block), "exec"), names)
    sys.modules.pop("modeling_regsurgery", None)


@pytest.mark.parametrize("script", ["picture.py", "features_picture.py"])
def test_the_pictures_are_drawn(folders: Callable[[str], Path], tmp_path: Path, script: str) -> None:
    photos = write_noise(tmp_path, 4)
    draw = runpy.run_path(str(ROOT / "docs" / script))["draw"]
    draw(str(folders("demo-patched")), str(photos), 2).savefig(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 500


def test_every_page_is_in_the_navigation() -> None:
    navigation = re.findall(r"^  - .+: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M)
    assert sorted(navigation) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_readme_is_short_and_its_links_are_there() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert text.count("\n") <= 150
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / link).is_file(), link
