"""A verdict as text and as the rows of a table: the same in the terminal, the model card and the report."""

from __future__ import annotations

from dataclasses import dataclass

from regsurgery.plain import plural
from regsurgery.verification.verdict import MIN_IMAGES_FOR_PERCENT, BeforeAfter, Verdict

NO_INTERVAL = "no interval"
MEANINGS = {  # the start of a figure's name -> what it is
    "outlier tokens": "Patches whose norm is more than 5 times the median of their image.",
    "largest patch norm, mean": "Of each image the largest norm, averaged over the images.",
    "largest patch norm, worst": "The largest norm of all patches of all images.",
    "median patch norm": "The norm of a usual patch; it should stay as it was.",
    "register token": "The norm that the outliers had should be here now.",
    "margin": "How far registers and other tokens lie apart for the neurons that tell them apart.",
    "cosine of patches": "How similar the other patches are to the original's; 1 is the same direction.",
    "cosine": "How similar the output is to the original's; 1 is the same direction.",
    "KL divergence to": "How far the class probabilities moved from the original's, in nats; 0 is not at all, 0.01 is "
    "little.",
    "same first class": "Images whose most probable class is still the original's.",
    "KL divergence, register unused": "The same distance if as many registers are appended and nothing is shifted onto "
    "them: what any additional token does.",
    "1 - cosine": "The distance of the output if as many registers are appended and nothing is shifted onto them: what "
    "any additional token does.",
    "drift": "The first distance divided by the second: 1 is no more than any additional token does.",
    "attention of": "The share of its attention that the class token gives to the registers, in the last block.",
}


@dataclass(frozen=True)
class FigureRow:
    """One figure as text.

    Attributes:
        interval: the 95 % interval of the patched model's figure; "" for a figure that is not an estimate.
        images: the number of images, and whether they were generated; "" for a figure that is not about images.
    """

    name: str
    original: str
    patched: str
    interval: str
    images: str

    @property
    def meaning(self) -> str:
        """What the figure is, for a reader who does not know it."""
        return next((meaning for start, meaning in MEANINGS.items() if self.name.startswith(start)), "")


def title(verdict: Verdict) -> str:
    """The heading of the table: where norms were read, on which images, and what kind of images these are."""
    return f"after block {verdict.block}, {verdict.images} (evidence: {verdict.evidence})"


def sentence(verdict: Verdict) -> str:
    """The outcome in one line."""
    if verdict.failures:
        return f"FAILED: {'; '.join(verdict.failures)}"
    seen = counted(verdict)
    if not verdict.is_judged:
        return f"too few images to judge ({seen}): {_outliers(verdict.outliers_per_image)}"
    parts = [_outliers(verdict.outliers_per_image)]
    if verdict.num_same is not None:
        parts.append(f"{verdict.num_images - verdict.num_same} of {verdict.num_images} predictions changed")
    else:
        interval = ends(verdict, "cosine_output", 3)
        parts.append(f"cosine of '{verdict.output}' {verdict.cosine_output:.3f} (95 % interval {interval})")
    text = "; ".join(parts)
    if verdict.evidence == "generated":
        text += f", on {seen if verdict.num_same is None else 'generated pictures'}"
    elif verdict.num_same is None:
        text += f", on {seen}"
    return f"{text}: review" if verdict.warnings else text


def remarks(verdict: Verdict) -> list[str]:
    """What to read with the sentence: its warnings, and whether the images were new to the model."""
    lines = [f"review: {warning}" for warning in verdict.warnings]
    if verdict.fitted_images:
        lines.append(
            f"{verdict.fitted_images} of {verdict.num_images} images took part in the search or the fit; figures on "
            "unseen images are usually worse"
        )
    return lines


def ends(verdict: Verdict, figure: str, digits: int) -> str:
    """The ends of a figure's 95 % interval, or `NO_INTERVAL`."""
    interval = verdict.intervals[figure]
    return NO_INTERVAL if interval is None else f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def counted(verdict: Verdict) -> str:
    """The number and kind of images: "175 images", "32 generated pictures"."""
    kind = "generated picture" if verdict.evidence == "generated" else "image"
    return plural(verdict.num_images, kind)


def share_text(hits: int, count: int) -> str:
    """A share as a count, "12 of 16", with its percentage where `count` is large enough for one."""
    percent = f" ({100 * hits / count:.1f} %)" if count >= MIN_IMAGES_FOR_PERCENT else ""
    return f"{hits} of {count}{percent}"


def rows(verdict: Verdict) -> list[FigureRow]:
    """The table of before and after. With a single image there are no estimates."""
    images = f"{verdict.num_images} generated" if verdict.evidence == "generated" else str(verdict.num_images)

    def both(name: str, pair: BeforeAfter, digits: int) -> FigureRow:
        return FigureRow(name, f"{pair.original:.{digits}f}", f"{pair.patched:.{digits}f}", "", images)

    def estimate(name: str, best: str, value: str, figure: str, digits: int) -> FigureRow:
        return FigureRow(name, best, value, ends(verdict, figure, digits), images)

    found = [
        both("outlier tokens per image", verdict.outliers_per_image, 2),
        both("largest patch norm, mean", verdict.max_patch_norm, 1),
        both("largest patch norm, worst image", verdict.worst_patch_norm, 1),
        both("median patch norm", verdict.median_patch_norm, 1),
    ]
    if verdict.register_norm is not None:
        norm = f"{verdict.register_norm:.1f} ± {verdict.register_norm_std or 0.0:.1f}"
        found.append(FigureRow("register token norm", "", norm, "", images))
    if verdict.margin is not None:
        found.append(FigureRow("margin of the register's detectors", "", f"{verdict.margin:.2f}", "", images))
    if verdict.num_images > 1:
        cosine, patches = f"{verdict.cosine_output:.4f}", f"{verdict.cosine_patches:.4f}"
        found.append(estimate(f"cosine of {verdict.output}", "1", cosine, "cosine_output", 4))
        found.append(estimate("cosine of patches, outliers aside", "1", patches, "cosine_patches", 4))
        if verdict.kl is not None and verdict.num_same is not None:
            found.append(estimate("KL divergence to the original", "0", f"{verdict.kl:.4f}", "kl", 4))
            found.append(
                estimate("same first class", "", share_text(verdict.num_same, verdict.num_images), "same_argmax", 3)
            )
    found += _unused(verdict)
    return found


def _unused(verdict: Verdict) -> list[FigureRow]:
    unused = verdict.unused_register
    if unused is None or unused.num_images < 2:
        return []
    images = f"{unused.num_images} generated" if verdict.evidence == "generated" else str(unused.num_images)
    kind = f"1 - cosine of {verdict.output}" if unused.kl is None else "KL divergence"
    found = [FigureRow(f"{kind}, register unused", "0", f"{unused.drift:.4f}", "", images)]
    if unused.times is not None:
        times = unused.times_interval
        interval = NO_INTERVAL if times is None else f"{times[0]:.1f} to {times[1]:.1f}"
        found.append(FigureRow("drift, patched over unused", "", f"{unused.times:.1f}", interval, images))
    return found


def parity_row(verdict: Verdict) -> FigureRow:
    """How far the written model is from the patched graph."""
    name = f"written model against graph, allowed {verdict.parity_allowed:.0e}"
    return FigureRow(name, "", f"{verdict.parity_max_abs:.1e}", "", "")


def _outliers(found: BeforeAfter) -> str:
    if found.original == 0:
        return f"no outlier tokens to remove ({_number(found.patched)} per image now)"
    moved = f"({_number(found.original)} to {_number(found.patched)} per image)"
    if found.patched >= found.original:
        return f"no fewer outliers than before {moved}"
    return f"outliers removed {moved}" if found.patched == 0 else f"all but a few outliers removed {moved}"


def _number(value: float) -> str:
    """Two decimals; a number that would round to zero keeps a digit."""
    return f"{value:.2f}" if value == 0 or value >= 0.005 else f"{value:.0e}"
