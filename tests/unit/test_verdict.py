"""A verdict's warnings at their limits, its words, and what it refuses to say about few images."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from regsurgery.interval import share
from regsurgery.verification.verdict import (
    MAX_TIMES,
    MIN_DRIFT,
    MIN_IMAGES_TO_JUDGE,
    BeforeAfter,
    UnusedRegister,
    Verdict,
    warnings_of,
)
from regsurgery.verification.verdict_text import FigureRow, remarks, rows, sentence, share_text, title

PAIR = BeforeAfter(20.0, 18.0)
UNUSED = UnusedRegister(32, 0.0025, 32, 0.999, 2.0, (1.0, 4.0))


def verdict(num_images: int = 100, num_same: int | None = None, **changes: Any) -> Verdict:
    """A verdict with nothing to complain about, but for the `changes`."""
    num_same = num_images if num_same is None else num_same
    found = share(num_same, num_images)
    interval = None if found.low is None or found.high is None else (found.low, found.high)
    some = None if num_images < 2 else (0.004, 0.006)
    facts: dict[str, Any] = {
        "passed": True,
        "num_images": num_images,
        "images": f"{num_images} images of photos",
        "evidence": "photos",
        "block": 10,
        "output": "logits",
        "outliers_per_image": BeforeAfter(3.91, 0.0),
        "max_patch_norm": PAIR,
        "worst_patch_norm": PAIR,
        "median_patch_norm": PAIR,
        "register_norm": 500.0,
        "register_norm_std": 30.0,
        "positional": True,
        "margin": None,
        "cosine_patches": 0.99,
        "cosine_output": 0.995,
        "kl": 0.005,
        "same_argmax": num_same / num_images,
        "num_same": num_same,
        "intervals": {"kl": some, "same_argmax": interval, "cosine_output": some, "cosine_patches": some},
        "unused_register": UNUSED,
        "parity_max_abs": 0.0,
        "parity_allowed": 1e-5,
    }
    made = Verdict(**{**facts, **changes})
    return replace(made, warnings=warnings_of(made))


def drifting(times: float, ends: tuple[float, float] | None = (1.0, 100.0), unused_kl: float = 0.0025) -> Verdict:
    return verdict(unused_register=replace(UNUSED, kl=unused_kl, times=times, times_interval=ends))


def without_logits(times: float = 2.0) -> Verdict:
    unused = replace(UNUSED, kl=None, num_same=None, times=times)
    made = replace(verdict(output="pooler_output"), kl=None, same_argmax=None, num_same=None, unused_register=unused)
    return replace(made, warnings=warnings_of(made))


def test_a_faithful_cure_has_no_warning() -> None:
    found = verdict()
    assert found.warnings == () and remarks(found) == []
    assert sentence(found) == "outliers removed (3.91 to 0.00 per image); 0 of 100 predictions changed"


def test_nine_in_ten_first_classes_are_enough_and_fewer_are_not() -> None:
    assert verdict(100, 90).warnings == ()
    (warning,) = verdict(100, 89).warnings
    assert "89 of 100 images; a share of 0.9 or more is expected" in warning
    assert "not certain on 100 images" in warning  # Wilson's interval of 89 in 100 reaches 0.94
    (sure,) = verdict(100, 70).warnings
    assert "not certain" not in sure


@pytest.mark.parametrize(("count", "same", "is_sure"), [(32, 28, False), (32, 20, True), (175, 155, False)])
def test_few_images_are_called_few(count: int, same: int, is_sure: bool) -> None:
    (warning,) = verdict(count, same).warnings
    assert ("not certain" not in warning) == is_sure
    assert sentence(verdict(count, same)).endswith(f"; {count - same} of {count} predictions changed: review")


def test_generated_pictures_are_held_to_what_an_unused_register_keeps() -> None:
    kept = replace(UNUSED, num_same=24)
    assert verdict(32, 23, evidence="generated", unused_register=kept).warnings == ()
    (warning,) = verdict(32, 21, evidence="generated", unused_register=kept).warnings
    assert "21 of 32 generated pictures; a share of 0.68 or more" in warning
    assert "an unused register keeps it in 24 of 32" in warning
    assert verdict(32, 23, unused_register=kept).warnings, "photos are held to the share itself"


def test_drift_is_held_to_a_multiple_of_what_an_unused_register_does() -> None:
    assert drifting(MAX_TIMES).warnings == ()
    (warning,) = drifting(MAX_TIMES + 0.1).warnings
    assert "12.1 times that of appending an unused register; up to 12 times" in warning
    assert "not certain on 32 images" in warning
    (sure,) = drifting(40.0, (MAX_TIMES + 1, 80.0)).warnings
    assert "not certain" not in sure


def test_a_drift_that_is_nothing_is_no_warning_however_often_it_holds_a_smaller_one() -> None:
    least = MAX_TIMES * MIN_DRIFT
    assert drifting(1000.0, unused_kl=least / 1000).warnings == ()
    assert len(drifting(1000.0, unused_kl=1.01 * least / 1000).warnings) == 1
    assert verdict(unused_register=replace(UNUSED, times=None, times_interval=None)).warnings == ()
    assert verdict(unused_register=None).warnings == ()


def test_models_without_logits_are_held_to_the_cosine_of_their_output() -> None:
    assert without_logits().warnings == ()
    (warning,) = without_logits(20.0).warnings
    assert warning.startswith("1 - cosine of 'pooler_output' is 20.0 times")
    assert "cosine of 'pooler_output' 0.995 (95 % interval 0.004 to 0.006), on 100 images" in sentence(without_logits())


def test_strict_makes_failures_of_warnings_and_of_too_few_images() -> None:
    assert verdict().strictly() == verdict()
    strict = verdict(100, 50).strictly()
    assert not strict.passed and strict.failures == verdict(100, 50).warnings and strict.warnings == ()
    assert sentence(strict).startswith("FAILED: the first class stays the same in 50 of 100 images")
    few = verdict(MIN_IMAGES_TO_JUDGE - 1).strictly()
    assert not few.passed and few.failures == ("too few images to judge: 3, at least 4",)
    assert verdict(MIN_IMAGES_TO_JUDGE).strictly().passed


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (BeforeAfter(3.91, 0.0), "outliers removed (3.91 to 0.00 per image)"),
        (BeforeAfter(3.91, 0.04), "all but a few outliers removed (3.91 to 0.04 per image)"),
        (BeforeAfter(3.91, 0.0004), "all but a few outliers removed (3.91 to 4e-04 per image)"),
        (BeforeAfter(0.03, 0.03), "no fewer outliers than before (0.03 to 0.03 per image)"),
        (BeforeAfter(0.0, 0.0), "no outlier tokens to remove (0.00 per image now)"),
    ],
)
def test_what_became_of_the_outliers_is_named(found: BeforeAfter, words: str) -> None:
    assert sentence(verdict(outliers_per_image=found)).startswith(f"{words}; ")


def test_a_failure_is_the_sentence() -> None:
    assert sentence(verdict(passed=False, failures=("a", "b"))) == "FAILED: a; b"


@pytest.mark.parametrize("count", [1, 3])
def test_a_few_images_are_no_verdict(count: int) -> None:
    found = verdict(count, count - 1)
    assert not found.is_judged and found.as_dict()["judged"] is False
    text = sentence(found)
    assert text.startswith(f"too few images to judge ({count} image") and "predictions" not in text
    assert verdict(4).is_judged and "predictions changed" in sentence(verdict(4))


def test_one_image_gives_no_estimates() -> None:
    def named(found: list[FigureRow]) -> str:
        return " ".join(row.name for row in found)

    assert "cosine" not in named(rows(verdict(1))) and "first class" not in named(rows(verdict(1)))
    assert "cosine of logits" in named(rows(verdict(2))) and "same first class" in named(rows(verdict(2)))


@pytest.mark.parametrize("count", [2, 4, 29])
def test_below_thirty_images_there_is_no_percentage(count: int) -> None:
    found = verdict(count, count - 1, evidence="generated")
    shown = [cell for row in rows(found) for cell in (row.original, row.patched, row.interval, row.images)]
    assert not any("%" in cell for cell in shown)
    assert "%" not in sentence(found).replace("95 % interval", "")
    assert f"{count - 1} of {count}" in shown


def test_shares_are_counts_and_from_thirty_on_percentages_too() -> None:
    assert share_text(28, 29) == "28 of 29"
    assert share_text(27, 30) == "27 of 30 (90.0 %)"


def test_every_figure_of_generated_pictures_is_marked() -> None:
    found = verdict(32, evidence="generated")
    assert {row.images for row in rows(found)} == {"32 generated"}
    assert {row.images for row in rows(verdict(175))} == {"175", "32"}
    assert title(found).endswith("(evidence: generated)") and title(verdict()).endswith("(evidence: photos)")
    assert sentence(found).endswith("0 of 32 predictions changed, on generated pictures")


def test_images_of_the_fit_are_told() -> None:
    (line,) = remarks(verdict(fitted_images=25))
    assert line == ("25 of 100 images took part in the search or the fit; figures on unseen images are usually worse")
    assert remarks(verdict(fitted_images=0)) == remarks(verdict(fitted_images=None)) == []


def test_as_json_it_is_what_it_is_in_python() -> None:
    facts = verdict(100, 50).as_dict()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["intervals"]["kl"] == [0.004, 0.006] and verdict(1).as_dict()["intervals"]["kl"] is None
    assert facts["unused_register"]["times_interval"] == [1.0, 4.0]
