"""What is declared is what is imported; bounds, constraint files, citation and workflows say the same versions."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from regsurgery.version import __version__

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
FOR_USERS = ("data", "onnx", "eval")  # the extras that the package itself imports
MODULES = {"open_clip_torch": "open_clip", "pyyaml": "yaml", "Pillow": "PIL", "scikit-learn": "sklearn",
           "vl-convert-python": "vl_convert"}  # fmt: skip
NOT_IMPORTED = {"onnx"}  # torch.onnx imports it
NOT_DECLARED = {
    "peft",  # whoever has an adapter has it; without it the message says what to install
    "modeling_regsurgery",  # in snippets: a patched folder's own file
}


def declared(*extras: str) -> dict[str, Requirement]:
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in PROJECT["optional-dependencies"][extra])]
    return {each.name: each for each in map(Requirement, texts)}


def imported() -> Iterator[str]:
    for file in (ROOT / "regsurgery").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield str(node.module).partition(".")[0]


def pinned(name: str) -> dict[str, Version]:
    lines = (ROOT / ".ci" / name).read_text("utf-8").splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {package: Version(version) for package, version in pairs}


def test_every_dependency_is_imported_and_every_import_is_a_dependency() -> None:
    modules = {MODULES.get(name, name) for name in declared(*FOR_USERS).keys() - NOT_IMPORTED}
    assert modules == set(imported()) - set(sys.stdlib_module_names) - NOT_DECLARED - {"regsurgery"}


def test_the_lower_bounds_are_the_versions_that_ci_installs() -> None:
    oldest, newest = pinned("oldest.txt"), pinned("newest.txt")
    for name, requirement in declared().items():
        (bound,) = requirement.specifier
        assert bound.operator == ">=" and Version(bound.version) == oldest[name] <= newest[name], name
    assert oldest.keys() == newest.keys() == declared().keys()


def test_the_citation_names_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["version"] == __version__


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit_with_their_version(workflow: Path) -> None:
    used = re.findall(r"uses: (.+)", workflow.read_text("utf-8"))
    assert used and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", each) for each in used)


def test_the_workflow_tries_every_python_that_is_declared() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))["jobs"]
    tried = {row["python"] for row in jobs["installed"]["strategy"]["matrix"]["include"]}
    prefix = "Programming Language :: Python :: "
    versions = {each.removeprefix(prefix) for each in PROJECT["classifiers"] if each.startswith(f"{prefix}3.")}
    assert tried == versions and f">={min(tried, key=Version)}" == PROJECT["requires-python"]
