"""Headless Chromium, and axe-core for its pages."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def needed(what: str) -> None:
    """A skip; in CI, where everything must be, a failure."""
    if os.environ.get("CI"):
        pytest.fail(f"needs {what}")
    pytest.skip(f"needs {what}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        needed("chromium")
    with sync_playwright() as playwright:
        # Tests run as root in containers, where Chromium's own sandbox cannot.
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, from the npm registry."""
    npm = shutil.which("npm")
    if npm is None:
        needed("npm")
    folder = shutil.copytree(Path(__file__).parent / "browser", tmp_path_factory.mktemp("browser") / "client")
    command = [str(npm), "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        needed(f"axe-core from the npm registry: {done.stderr[-1000:]}")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text("utf-8")
