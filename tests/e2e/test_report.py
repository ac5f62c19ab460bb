"""The report in headless Chromium: driven as a reader drives it, checked by axe-core, made of names that would act."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from regsurgery.commands import patch
from regsurgery.commands.verify import verify
from regsurgery.compiler.outliers import token_norms
from regsurgery.demo import write_demo
from regsurgery.images.image_set import image_set
from regsurgery.recipe import find_recipe
from regsurgery.reporting import live_network, onnxruntime_web
from regsurgery.reporting.live import LIVE_FILES
from regsurgery.reporting.report import Report, report
from regsurgery.verification.pair import open_pair
from tests.commands import Done
from tests.conftest import shared
from tests.photos import write_photos
from tests.unit.test_live import archive, integrity

pytestmark = pytest.mark.slow  # a report takes 10 s to make, and a browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NUM_IMAGES = 6
ACTS = "<img src=x onerror=document.title='it-ran'>"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, the first of which has a name that would act."""
    folder = write_photos(tmp_path_factory.mktemp("photos") / "photos", NUM_IMAGES, 3)
    (folder / "00.png").rename(folder / f"!{ACTS}.png")
    return folder


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in a folder, and with labels and a recipe, whose texts would act; the recipe has a search's table."""
    root = tmp_path_factory.mktemp("report")
    source = root / f"model {ACTS}"
    write_demo(source)
    config = json.loads((source / "config.json").read_text())
    config["id2label"] = {number: f"{ACTS}{number}" for number in config["id2label"]}
    config["label2id"] = {label: int(number) for number, label in config["id2label"].items()}
    (source / "config.json").write_text(json.dumps(config))
    recipe = find_recipe("demo")
    figures = {"outliers_per_image": 0.0, "register_norm": 9.0, "kl": None, "cost": 0.7, "fill": "zero"}
    table = [
        {**figures, "name": name, "num_registers": count, "drift": drift, "paper": count == 1, "chosen": count == 2}
        for name, count, drift in (("smallest", 1, 0.08), (f"smallest +{ACTS}", 2, 0.01))
    ]
    contributions = [{"block": 1, "index": 25, "contribution": 123.4}, {"block": [], "index": ACTS}]
    recipe = replace(recipe, model=ACTS, provenance={"found_by": ACTS, "sweep": table, "candidates": contributions})
    folder = root / f"patched '{ACTS}"
    patch.patch(str(source), folder, recipe=recipe, num_images=4)
    return folder


@pytest.fixture(scope="module")
def made(patched: Path, photos: Path) -> Report:
    return report(patched, images=photos)


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


def outliers(folder: Path, photos: Path, block: int, threshold: float) -> list[float]:
    """Patches per image above that many medians, by the models themselves: original, patched."""
    return [float((norms > threshold).sum()) / NUM_IMAGES for norms in norms_of(folder, photos, block)]


def norms_of(folder: Path, photos: Path, block: int) -> list[Any]:
    """Norms of the patches in medians of their image, `[I, N]`, by the models themselves: original, patched."""
    with open_pair(folder) as pair:
        observe = pair.observer(blocks=[block], what=("blocks",))
        (batch,) = pair.batches(image_set(photos))
        found = [token_norms(seen.patches(block)) for seen in observe(batch.pixels)]
    return [norms_BN / norms_BN.median(dim=1, keepdim=True).values for norms_BN in found]


def shown(page: Page) -> list[float]:
    return [float(page.inner_text(f"#count-{side}")) for side in ("original", "patched")]


def test_it_is_one_file_that_says_what_verification_says(made: Report, patched: Path, photos: Path) -> None:
    text = made.path.read_text("utf-8")
    assert made.path == patched.with_name(f"{patched.name}-report.html")
    assert made.size == made.path.stat().st_size < 8_000_000
    assert not re.search(r"(src|href)=[\"']?https?:", text), "nothing is fetched"
    found = made.verdict.outliers_per_image
    assert found.original > 1 > found.patched and f">{found.original:.2f} → {found.patched:.2f}<" in text
    assert verify(patched, images=photos).outliers_per_image == found
    assert "Measured on 6 images of photos." in text, "counted once"
    assert str(patched.parent) not in text and "/tmp" not in text, "no path of this machine"


def test_it_opens_with_a_picture_a_sentence_and_three_figures(page: Page, patched: Path) -> None:
    assert page.inner_text("h1") == f"model {ACTS}", "the model, not the folder"
    assert "patches of an image for notes of its own" in page.inner_text(".lead")
    top, bottom = page.evaluate(
        "(box => [box.top, box.bottom])(document.querySelector('.opening').getBoundingClientRect())"
    )
    assert top < 200 and bottom < 900, "on the first screen"
    tiles = page.eval_on_selector_all(".opening .map", "all => all.map(one => [one.naturalWidth, one.alt])")
    assert len(tiles) == 8 and {width for width, _ in tiles} == {12}
    assert page.locator(".opening img[src^='data:image/jpeg']").count() == 4 and page.locator(".tiles dd").count() == 3
    page.click("#copy")
    line = page.input_value("#load")
    assert line == f"import regsurgery; model = regsurgery.load({patched.name!r})"
    selected = page.evaluate(
        "(one => one.value.slice(one.selectionStart, one.selectionEnd))(document.getElementById('load'))"
    )
    assert selected == line and page.inner_text("#copied") in ("Copied.", "Press Ctrl+C.")
    assert page.inner_text(".heat .chosen").split() == ["0.01", "chosen"]
    page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
    lines = """all => all.filter(one => !/\\s/.test(one.textContent)).map((one) => {
        const range = document.createRange();
        range.selectNodeContents(one);
        return range.getClientRects().length;
    })"""
    assert set(page.eval_on_selector_all("thead th", lines)) <= {0, 1}, "a word of a table's head is not broken"


def test_no_name_of_others_acts(page: Page) -> None:
    assert page.title() != "it-ran" and page.locator("img[onerror]").count() == 0
    assert page.locator("#image option").first.inner_text() == f"!{ACTS}.png"
    assert f"+{ACTS}" in page.inner_text(".heat") and page.locator("script").count() == 3


def test_the_threshold_counts_outliers(page: Page, made: Report, patched: Path, photos: Path) -> None:
    block = made.verdict.block
    assert page.input_value("#norm-block") == str(block)
    assert page.inner_text("#threshold-value") == "5"
    assert shown(page) == pytest.approx(outliers(patched, photos, block, 5.0), abs=0.006)
    page.focus("#threshold")
    for _ in range(12):
        page.keyboard.press("ArrowLeft")
    threshold = float(page.get_attribute("#threshold", "aria-valuetext").split()[0])  # type: ignore[union-attr]
    assert 1.5 < threshold < 5
    below, above = (outliers(patched, photos, block, threshold + step) for step in (-0.06, 0.06))
    for count, most, least in zip(shown(page), below, above, strict=True):
        assert least - 0.006 <= count <= most + 0.006
    page.select_option("#norm-block", "0")
    assert shown(page) != pytest.approx(outliers(patched, photos, block, 5.0), abs=0.006)


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


def pixels(page: Page, canvases: str) -> list[str]:
    return page.eval_on_selector_all(canvases, "all => all.map(one => one.toDataURL())")


def test_the_pickers_change_the_maps_and_the_grid(page: Page) -> None:
    assert not page.is_checked("#boxes"), "boxes distract until they are asked for"
    seen = {pixels(page, "#map-original")[0], pixels(page, "#map-patched")[0]}
    assert len(seen) == 2
    in_grid = [pixels(page, "#grid canvas")]
    assert len(in_grid[0]) == 2 * NUM_IMAGES
    for act, changes_grid in (
        (lambda: page.select_option("#image", "1"), False),
        (lambda: page.select_option("#map-block", "0"), True),
        (lambda: page.fill("#strength", "20"), False),
        (lambda: page.select_option("#kind", "attention"), True),
        (lambda: page.select_option("#head", "2"), True),
        (lambda: page.check("#boxes"), False),
        (lambda: page.select_option("#kind", "shared"), True),
        (lambda: page.select_option("#kind", "own"), True),
    ):
        act()
        page.wait_for_timeout(50)
        now = pixels(page, "#map-original")[0]
        assert now not in seen
        seen.add(now)
        grid = pixels(page, "#grid canvas")
        assert (grid not in in_grid) == changes_grid
        in_grid.append(grid)
    page.locator("#grid button").nth(3).click()
    assert page.input_value("#image") == "3"
    assert page.eval_on_selector_all("#grid [aria-pressed=true]", "all => all.length") == 1
    before = pixels(page, "#activations canvas")
    assert len(before) == NUM_IMAGES
    page.select_option("#neuron", "1")
    assert pixels(page, "#activations canvas") != before


def test_both_maps_show_the_patch_that_is_pointed_at(page: Page, made: Report, patched: Path, photos: Path) -> None:
    """With the mouse over one map, and by keyboard; the norms are the models', and one legend is for both maps."""
    norms = [each[0].reshape(12, 12) for each in norms_of(patched, photos, made.verdict.block)]
    row, column = divmod(int(norms[0].argmax()), 12)
    untouched = pixels(page, ".pair canvas")
    box = page.locator("#map-patched").bounding_box()
    assert box is not None
    page.locator("#map-patched").hover(
        position={"x": box["width"] * (column + 0.5) / 12, "y": box["height"] * (row + 0.5) / 12}
    )
    now = pixels(page, ".pair canvas")
    assert all(before != after for before, after in zip(untouched, now, strict=True))
    text = page.inner_text("#readout")
    assert f"Row {row}, column {column}," in text and "attention of the class token" in text
    figures = re.search(r"norm ([\d.]+) → ([\d.]+) medians", text)
    assert figures is not None
    for figure, norms_RC in zip(figures.groups(), norms, strict=True):
        assert float(figure) == pytest.approx(float(norms_RC[row, column]), abs=0.06)
    page.focus("#map-original")
    page.keyboard.press("ArrowDown" if row < 11 else "ArrowUp")
    assert f"Row {row + (1 if row < 11 else -1)}, column {column}," in page.inner_text("#readout")
    page.keyboard.press("Escape")
    assert pixels(page, ".pair canvas") == untouched
    page.select_option("#kind", "attention")
    assert page.locator("#scale").count() == 1 and "or more" in page.inner_text("#scale-high")
    assert "The registers take" in page.inner_text("#taken")


def test_everything_is_reached_by_keyboard(page: Page) -> None:
    page.select_option("#kind", "attention")
    named = "one => one.id || one.textContent"
    visible = f"all => all.filter(one => one.offsetParent).map({named})"
    wanted = set(page.eval_on_selector_all("select, input, button, summary, canvas[tabindex='0']", visible))
    reached = set()
    page.focus("#load")
    for _ in range(len(wanted) + 5):
        reached.add(page.evaluate(f"({named})(document.activeElement)"))
        page.keyboard.press("Tab")
    assert wanted - reached == set()
    assert {"head", "map-block", "map-original", "boxes", "neuron", "!" + ACTS + ".png"} <= reached


def test_a_page_without_attention_boxes_and_neurons_works(
    browser: Browser, made: Report, complaints: list[str], tmp_path: Path
) -> None:
    """As of a model without class token, a report with --no-boxes, and a recipe without neurons."""
    text = made.path.read_text("utf-8")
    start = text.index(">", text.index('<script id="data"')) + 1
    end = text.index("</script>", start)
    data = json.loads(text[start:end])
    data |= {"attention": None, "registers": None, "heads": 0, "neurons": []}
    data["activations"] = {"data": "", "low": [], "high": []}
    data["images"] = [{**image, "boxes": None} for image in data["images"]]
    path = tmp_path / "page.html"
    path.write_text(text[:start] + json.dumps(data).replace("<", "\\u003c") + text[end:], "utf-8")
    for page in opened(browser, path, complaints):
        assert page.eval_on_selector_all("#kind option", "all => all.map(one => one.value)") == [
            "norms",
            "shared",
            "own",
        ]
        page.focus("#map-original")
        page.keyboard.press("ArrowDown")
        assert "attention" not in page.inner_text("#readout") and "norm" in page.inner_text("#readout")
    assert complaints == []


def test_a_live_page_is_written_beside_the_report_or_refused(
    run: Callable[..., Done], patched: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both networks were held to torch before they were written; `test_live.py` runs such a page."""
    package, output = tmp_path / "package.tgz", tmp_path / "shown.html"
    package.write_bytes(archive())
    monkeypatch.setattr(onnxruntime_web, "INTEGRITY", integrity(archive()))
    asked = ("report", patched, "-o", output, "--images", photos, "--num-images", 2, "--no-boxes", "--live")
    done = run(*asked, "--onnxruntime-web", package)
    assert done.code == 0, done.err
    folder = tmp_path / "shown-live"
    assert {path.name for path in folder.iterdir()} == set(LIVE_FILES)
    assert f"`python -m http.server -b 127.0.0.1 -d {tmp_path}`" in done.out
    assert "http://127.0.0.1:8000/shown-live/" in done.out
    assert 'href="shown-live/index.html"' in output.read_text("utf-8")
    page = (folder / "index.html").read_text("utf-8")
    assert 'href="../shown.html"' in page and "<img src=x" not in page and str(tmp_path) not in page
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(live_network, "MAX_BYTES", 1000)
    refused = run(*asked, "--onnxruntime-web", package)
    assert (
        refused.code == 2 and "MB of weights, more than the limit of 0 MB for a page; leave out --live" in refused.err
    )
    assert content == {path.name: path.read_bytes() for path in folder.iterdir()}
    alone = run("report", patched, "--onnxruntime-web", package)
    assert alone.code == 2 and f"--onnxruntime-web {package}: goes with --live" in alone.err


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_finding_of_axe_and_no_side_scrolling_on_a_phone(
    browser: Browser, made: Report, axe: str, complaints: list[str], scheme: str
) -> None:
    """And one map at a time, and tables as cards."""
    for page in opened(
        browser, made.path, complaints, viewport={"width": 375, "height": 800}, color_scheme=scheme, bypass_csp=True
    ):
        page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
        page.select_option("#kind", "attention")
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        assert page.is_visible("#map-original") and not page.is_visible("#map-patched")
        page.check("[name=side][value=patched]")
        assert page.is_visible("#map-patched") and not page.is_visible("#map-original")
        assert page.eval_on_selector(".cards td", "one => getComputedStyle(one, '::before').content") == '"paper"'
        page.evaluate(axe)
        found = page.evaluate("axe.run()")
        assert len(found["passes"]) > 10
        bad = [(each["id"], [node["html"] for node in each["nodes"]]) for each in found["violations"]]
        assert bad == [], json.dumps(bad, indent=1)
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
