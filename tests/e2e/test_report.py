"""The report in headless Chromium: driven as a reader drives it, and checked by axe-core."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from regsurgery.commands import patch
from regsurgery.commands.find import find
from regsurgery.commands.verify import verify
from regsurgery.compiler.outliers import token_norms
from regsurgery.images.image_set import image_set
from regsurgery.reporting.report import Report, report
from regsurgery.verification.pair import open_pair
from tests.conftest import shared

pytestmark = pytest.mark.slow  # a report takes 30 s to make, and a browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NUM_IMAGES = 6


def needed(what: str) -> None:
    """A skip; in CI, where everything must be, a failure."""
    if os.environ.get("CI"):
        pytest.fail(f"needs {what}")
    pytest.skip(f"needs {what}")


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, patched with a recipe that `find` wrote: it has a sweep and contributions."""
    folder = tmp_path_factory.mktemp("report")
    find("demo", folder / "recipe.yaml", num_images=16)
    patch.patch("demo", folder / "patched", recipe=str(folder / "recipe.yaml"), num_images=8)
    return folder / "patched"


@pytest.fixture(scope="module")
def made(patched: Path) -> Report:
    return report(patched, num_images=NUM_IMAGES)


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


@pytest.fixture(scope="module")
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


@pytest.fixture
def complaints() -> list[str]:
    """What the page said on its console, threw or asked the network for; must stay empty."""
    return []


@pytest.fixture
def page(browser: Browser, made: Report, complaints: list[str]) -> Iterator[Page]:
    yield from opened(browser, made.path, complaints, viewport={"width": 1100, "height": 900})
    assert complaints == []


def opened(browser: Browser, path: Path, complaints: list[str], **context: Any) -> Iterator[Page]:
    surroundings = browser.new_context(**context)
    page = surroundings.new_page()
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda asked: None if asked.url.startswith(("file:", "data:", "blob:")) else complaints.append(asked.url),
    )
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready]")
    yield page
    surroundings.close()


def outliers(folder: Path, block: int, threshold: float) -> list[float]:
    """Patches per image above that many medians, by the models themselves: original, patched."""
    counts = [0.0, 0.0]
    pictures = image_set(None, NUM_IMAGES)
    with open_pair(folder) as pair:
        observe = pair.observer(blocks=[block], what=("blocks",))
        for batch in pair.batches(pictures):
            for side, seen in enumerate(observe(batch.pixels)):
                norms_BN = token_norms(seen.patches(block))
                median_B1 = norms_BN.median(dim=1, keepdim=True).values
                counts[side] += int((norms_BN > threshold * median_B1).sum())
    return [count / NUM_IMAGES for count in counts]


def shown(page: Page) -> list[float]:
    return [float(page.inner_text(f"#count-{side}")) for side in ("original", "patched")]


def test_it_is_one_file_that_says_what_verification_says(made: Report, patched: Path) -> None:
    text = made.path.read_text("utf-8")
    assert made.path == patched.with_name("patched-report.html") and made.size == made.path.stat().st_size < 8_000_000
    assert not re.search(r"(src|href)=[\"']?https?:", text), "nothing is fetched"
    found = made.verdict.outliers_per_image
    assert found.original > 1 > found.patched and f"<td>{found.original:.2f}</td>" in text
    assert verify(patched, num_images=NUM_IMAGES).outliers_per_image == found
    assert str(patched.parent) not in text and "/tmp" not in text, "no path of this machine"


def test_the_threshold_counts_outliers(page: Page, made: Report, patched: Path) -> None:
    block = made.verdict.block
    assert page.input_value("#norm-block") == str(block)
    assert page.inner_text("#threshold-value") == "5"
    assert shown(page) == pytest.approx(outliers(patched, block, 5.0), abs=0.006)
    page.focus("#threshold")
    for _ in range(12):
        page.keyboard.press("ArrowLeft")
    threshold = float(page.get_attribute("#threshold", "aria-valuetext").split()[0])  # type: ignore[union-attr]
    assert 1.5 < threshold < 5
    below, above = (outliers(patched, block, threshold + step) for step in (-0.06, 0.06))
    for count, most, least in zip(shown(page), below, above, strict=True):
        assert least - 0.006 <= count <= most + 0.006
    page.select_option("#norm-block", "0")
    assert shown(page) != pytest.approx(outliers(patched, block, 5.0), abs=0.006)


def test_the_histogram_follows_block_and_threshold(page: Page) -> None:
    def bars() -> list[str]:
        return page.eval_on_selector_all("#histogram path[aria-label]", "all => all.map(one => one.ariaLabel)")

    before = bars()
    assert any("original" in label for label in before) and any("patched" in label for label in before)
    page.select_option("#norm-block", "0")
    page.wait_for_timeout(200)
    assert bars() != before
    rule = "#histogram .layer_1_marks line"
    places = [page.get_attribute(rule, "transform")]
    page.fill("#threshold", "90")
    page.wait_for_timeout(200)
    places.append(page.get_attribute(rule, "transform"))
    assert None not in places and places[0] != places[1]


def pixels(page: Page, canvas: str) -> str:
    return page.eval_on_selector(canvas, "one => one.toDataURL()")


def test_the_pickers_change_the_maps(page: Page) -> None:
    seen = {pixels(page, "#map-original"), pixels(page, "#map-patched")}
    assert len(seen) == 2
    for act in (
        lambda: page.select_option("#image", "1"),
        lambda: page.select_option("#map-block", "0"),
        lambda: page.fill("#opacity", "20"),
        lambda: page.select_option("#kind", "attention"),
        lambda: page.select_option("#head", "2"),
        lambda: page.uncheck("#boxes"),
    ):
        act()
        page.wait_for_timeout(100)
        now = pixels(page, "#map-original")
        assert now not in seen
        seen.add(now)
    assert "attention" in (page.get_attribute("#map-original", "aria-label") or "")
    before = page.eval_on_selector_all("#activations canvas", "all => all.map(one => one.toDataURL())")
    assert len(before) == NUM_IMAGES
    page.select_option("#neuron", "1")
    assert page.eval_on_selector_all("#activations canvas", "all => all.map(one => one.toDataURL())") != before


def test_everything_is_reached_by_keyboard(page: Page) -> None:
    wanted = set(page.eval_on_selector_all("select, input", "all => all.map(one => one.id)"))
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert wanted - reached == {"head"}, "the head is hidden where norms are shown"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_finding_of_axe_and_no_side_scrolling_on_a_phone(
    browser: Browser, made: Report, axe: str, complaints: list[str], scheme: str
) -> None:
    for page in opened(
        browser, made.path, complaints, viewport={"width": 375, "height": 800}, color_scheme=scheme, bypass_csp=True
    ):
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        page.select_option("#kind", "attention")
        page.evaluate(axe)
        found = page.evaluate("axe.run()")
        assert len(found["passes"]) > 10
        bad = [each for each in found["violations"] if each["impact"] in ("serious", "critical", "moderate")]
        assert bad == [], json.dumps([(each["id"], [node["html"] for node in each["nodes"]]) for each in bad], indent=1)
    assert complaints == []


@pytest.mark.real
def test_the_real_model_has_its_outliers_in_the_corners(
    browser: Browser, complaints: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "patched"
    patch.patch(str(shared("models", "vit-tiny-timm")), folder, recipe="vit-tiny", num_images=4)
    made = report(folder, images=shared("images", "labelled"))
    assert made.num_images == 16 and made.size < 8_000_000
    for page in opened(browser, made.path, complaints):
        original, patched = shown(page)
        assert original == pytest.approx(made.verdict.outliers_per_image.original, abs=0.006)
        assert original > 3.5 and patched == 0
        maps = page.evaluate("[report.grid, Array.from(norms.original.subarray(10 * 16 * 196, 10 * 16 * 196 + 196))]")
        (rows, columns), values = maps
        highest = sorted(range(rows * columns), key=lambda patch: -values[patch])[:4]
        assert set(highest) <= {0, columns - 1, (rows - 1) * columns, rows * columns - 1}
    assert complaints == []
