"""The live page in headless Chromium: the real ViT-Ti in onnxruntime-web, held to torch."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import ExifTags, Image

from regsurgery.commands.patch import PatchResult
from regsurgery.compiler.outliers import outliers, token_norms
from regsurgery.errors import UserError
from regsurgery.images.decoding import decode
from regsurgery.progress import Progress
from regsurgery.reporting.onnxruntime_web import onnxruntime_web
from regsurgery.reporting.report import Report, report
from regsurgery.verification.pair import Pair, open_pair
from tests.conftest import shared
from tests.e2e.conftest import needed

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.real, pytest.mark.slow]  # a report of the ViT-Ti, and its model in a browser

TOLERANCE = 1e-4  # of the largest figure: onnxruntime-web's kernels against torch's, in float32


@pytest.fixture(scope="module")
def folder(patched_real: Callable[[str, str], tuple[Path, PatchResult]]) -> Path:
    return patched_real("timm", "shift")[0]


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report and its live page, with onnxruntime-web from the cache, or else from the registry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        try:
            onnxruntime_web(None, Progress())
        except UserError as error:
            needed(str(error))
    output = tmp_path_factory.mktemp("a site") / "report #1.html"
    photos = shared("images", "labelled")
    return report(folder, output, images=photos, num_images=2, boxes=False, live=True)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(made: Report) -> Iterator[str]:
    """The address of the folder that holds the report, served as Python serves it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=made.path.parent)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def opened(browser: Browser, address: str, **context: Any) -> Iterator[Page]:
    """The page, once it is ready; it must ask nobody else, and have nothing to complain about."""
    complaints: list[str] = []
    surroundings = browser.new_context(**context)
    page = surroundings.new_page()
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    own = address.rpartition("/report")[0]
    page.on("request", lambda asked: None if asked.url.startswith((own, "data:")) else complaints.append(asked.url))
    page.goto(address)
    page.wait_for_selector("body[data-ready]", timeout=120_000)
    yield page
    surroundings.close()
    assert complaints == [], complaints


def seen(page: Page) -> dict[str, Any]:
    """What the page holds of the last photo."""
    text = page.evaluate("JSON.stringify({...shown, pixels: Array.from(shown.pixels)})")
    return {name: value for name, value in json.loads(text).items() if name != "photo"}


@torch.no_grad()
def test_both_models_see_and_give_what_they_do_in_torch(
    browser: Browser, site: str, made: Report, folder: Path, tmp_path: Path
) -> None:
    """A photo of a size that must be resized and cropped, through the report's link; then the maps."""
    photo = tmp_path / "tall.png"
    junco = Image.open(shared("images", "labelled") / "0013_junco.jpg").convert("RGB")
    junco.resize((341, 507)).save(photo)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    junco.resize((407, 301)).save(tmp_path / "turned.jpg", exif=turned)
    for page in opened(browser, f"{site}/report%20%231.html"):
        page.click("a >> text=Try it")
        page.wait_for_selector("#outcome:not([hidden])", timeout=120_000)
        assert page.eval_on_selector_all("#samples button", "all => all.length") == 2
        sample = seen(page)
        page.set_input_files("#photo", tmp_path / "turned.jpg")
        page.get_by_text("What both models make of turned.jpg").wait_for()
        upright = seen(page)
        page.set_input_files("#photo", photo)
        page.get_by_text("What both models make of tall.png").wait_for()
        found = seen(page)
        with open_pair(folder) as pair:
            check_jpegs(pair, sample, upright, tmp_path / "turned.jpg")
            expected = pair.loaded.preprocess([Image.open(photo)])
            pixels = torch.tensor(found["pixels"]).reshape(expected.shape)
            assert torch.allclose(pixels, expected, atol=1e-6), "what timm makes of the photo, to the pixel"
            probe, last = made.verdict.block, pair.original.num_blocks - 1
            given = pair.observer(blocks=[probe, last], what=("blocks", "attention"))(pixels)
        counts = []
        for side, observed in zip(("original", "patched"), given, strict=True):
            norms = token_norms(observed.patches(probe))
            assert_near(found[side]["norms"], norms[0])
            maps = observed.attention(last)[0, :, 0].mean(dim=0)
            assert_near(found[side]["attention"], maps[observed.subject.attended_patches])
            counts.append(int(outliers(norms).sum()))
        assert counts[0] > 0 and counts[1] == 0
        assert page.inner_text("#outliers") == f"{counts[0]} → 0"
        assert page.inner_text("#caption-patched").startswith("patched: 0 outlier patches, largest ")
        check_maps(page)


def check_jpegs(pair: Pair, sample: dict[str, Any], upright: dict[str, Any], turned: Path) -> None:
    """A photo of the report is seen as there, by the crop that is stored; one that EXIF turns stands upright."""
    original = shared("images", "labelled") / sample["name"]
    for shown, path, most in ((sample, original, 0.03), (upright, turned, 0.001)):
        (expected,) = pair.loaded.preprocess([decode(path)])
        pixels = torch.tensor(shown["pixels"]).reshape(expected.shape)
        assert float((pixels - expected).abs().mean()) < most, path


def assert_near(shown: list[float], expected: torch.Tensor) -> None:
    np.testing.assert_allclose(shown, expected.numpy(), rtol=0, atol=TOLERANCE * float(expected.abs().max()))


def check_maps(page: Page) -> None:
    def pictures() -> list[str]:
        return page.eval_on_selector_all(".pair canvas", "all => all.map(one => one.toDataURL())")

    norms = pictures()
    assert norms[0] != norms[1]
    page.select_option("#kind", "attention")
    attention = pictures()
    assert len({*norms, *attention}) == 4 and "registers take" in page.inner_text("#caption-patched")
    page.focus("#map-original")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#readout").startswith("Row 0, column 1: norm ")
    assert all(before != after for before, after in zip(attention, pictures(), strict=True)), "one cursor for both"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_finding_of_axe_and_all_fits_a_phone(browser: Browser, site: str, axe: str, scheme: str) -> None:
    """And a file that is no picture is told, with both maps of the last photo still there."""
    address = f"{site}/report%20%231-live/"
    for page in opened(browser, address, viewport={"width": 390, "height": 844}, color_scheme=scheme, bypass_csp=True):
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.is_visible("#map-original") and not page.is_visible("#map-patched")
        page.check("[name=side][value=patched]")
        assert page.is_visible("#map-patched") and not page.is_visible("#map-original")
        page.evaluate(axe)
        found = page.evaluate("axe.run()")
        bad = [(each["id"], [node["html"] for node in each["nodes"]]) for each in found["violations"]]
        assert bad == [] and len(found["passes"]) > 10, json.dumps(bad, indent=1)
        page.set_input_files("#photo", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"})
        page.get_by_text("notes.txt cannot be shown").wait_for()
        assert page.is_visible("#map-patched") and page.is_enabled("#photo")


def test_opened_as_a_file_it_says_what_to_type(browser: Browser, made: Report) -> None:
    assert made.live is not None
    page = browser.new_page()
    page.goto((made.live / "index.html").as_uri())
    page.wait_for_selector("body[data-ready]")
    assert page.inner_text("#serve") == f"python -m http.server -b 127.0.0.1 -d '{made.path.parent}'"
    assert page.inner_text("#address") == "http://127.0.0.1:8000/report%20%231-live/"
    assert not page.is_visible("#live")
    page.close()
