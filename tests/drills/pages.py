"""The report and the model card of a hostile model, opened in Chromium."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import regsurgery
from regsurgery.demo import write_demo
from regsurgery.recipe import find_recipe
from tests.drills import Row, drill

ACTS = "<img src=x onerror=document.title='it-ran'><script>document.title='it-ran'</script>"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@drill
def hostile_labels_in_pages(place: Path) -> Row:
    """Nothing in a folder's name, its labels or a recipe acts in the report or in the model card."""
    import markdown
    from playwright.sync_api import sync_playwright

    source = place / ACTS.replace("/", "")
    write_demo(source)
    config = json.loads((source / "config.json").read_text())
    config["id2label"] = {number: f"{ACTS}{number}" for number in config["id2label"]}
    config["label2id"] = {label: int(number) for number, label in config["id2label"].items()}
    (source / "config.json").write_text(json.dumps(config))
    recipe = replace(find_recipe("demo"), model=ACTS, provenance={"found_by": ACTS, "judged_on": ACTS})
    regsurgery.patch(str(source), place / "out", recipe=recipe, num_images=2)
    regsurgery.report(place / "out", place / "report.html", num_images=2)
    card = (place / "out" / "README.md").read_text("utf-8").split("---\n", 2)[2]
    (place / "card.html").write_text(
        "<title>card</title>" + markdown.markdown(card, extensions=["tables", "fenced_code"]), "utf-8"
    )
    path = next(found for name in CHROMIUM if (found := shutil.which(name)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for name in ("report", "card"):
            page = browser.new_page()
            page.goto((place / f"{name}.html").as_uri())
            page.wait_for_timeout(1000)
            assert page.title() != "it-ran", name
            assert page.locator("img[onerror]").count() == 0
        browser.close()
    return Row(2, "neither page ran anything")
