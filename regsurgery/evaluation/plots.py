"""Pictures of evaluations: matplotlib figures, for notebooks and for `eval --png`.

Shape suffixes: B images, A heads, N patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from regsurgery.compiler.outliers import token_norms
from regsurgery.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regsurgery.evaluation.observed import Observed
    from regsurgery.evaluation.result import Evaluation

COLOURS = {"original": "#c1440e", "patched": "#1f6f8b"}  # they differ in brightness too
STYLES = {"max": "-", "p99": "--", "median": ":"}


def plot_norms(evaluation: Evaluation) -> Figure:
    """Patch norms and outlier tokens over the blocks, with their 95 % intervals.

    Args:
        evaluation: result of the task `norms`.

    Raises:
        UserError: it is the result of another task.
    """
    if evaluation.task != "norms":
        raise UserError(f"plot_norms: takes an evaluation of the task norms, not of {evaluation.task}")
    figure = _figure(9, 3.6)
    norms, counts = figure.subplots(1, 2)
    for name, style in STYLES.items():
        _curve(norms, evaluation, name, style)
    _curve(counts, evaluation, "outliers per image", "-")
    norms.set(yscale="log", xlabel="block", ylabel="patch norm, mean over the images")
    counts.set(xlabel="block", ylabel="outlier tokens per image", ylim=(0, None))
    norms.legend(fontsize="small")
    counts.legend(fontsize="small")
    figure.suptitle(f"{evaluation.num_images} images", fontsize="medium")
    return figure


def _curve(axes: Any, evaluation: Evaluation, name: str, style: str) -> None:
    rows = evaluation.select(name)
    blocks = [row.where["block"] for row in rows]
    for kind, colour in COLOURS.items():
        estimates = [getattr(row, kind) for row in rows]
        label = kind if style == "-" and name not in STYLES else f"{kind}, {name}"
        axes.plot(blocks, [one.value for one in estimates], style, color=colour, label=label, marker=".")
        if all(one.low is not None for one in estimates):
            axes.fill_between(
                blocks, [one.low for one in estimates], [one.high for one in estimates], color=colour, alpha=0.2, lw=0
            )


def plot_norm_maps(original: Observed, patched: Observed, *, block: int = -1, count: int = 4) -> Figure:
    """Norms of the patches after a block, on the patch grid, under the pictures.

    Args:
        original, patched: the same images, with `what` naming `blocks`; see `observe`.
        block: 0-based, or from the end of those observed; `count`: maximum number of images.

    Raises:
        UserError: the block was not observed.
    """
    maps = [token_norms(_of_block(seen.blocks, block, "blocks")[:, seen.patches]) for seen in (original, patched)]
    return _maps(original, maps, count, "patch norm")


def plot_attention(
    original: Observed, patched: Observed, *, block: int = -1, head: int | None = None, count: int = 4
) -> Figure:
    """The attention of the class token (without one, of the mean patch) to the patches, under the pictures.

    Args:
        original, patched: the same images, with `what` naming `attention`; see `observe`.
        block: 0-based, or from the end of those observed; `head`: 0-based, by default the mean over the heads.

    Raises:
        UserError: the block was not observed, or there is no such head.
    """
    maps = []
    for seen in (original, patched):
        weights_BATT = _of_block(seen.attention, block, "attention")
        num_heads = weights_BATT.shape[1]
        if head is not None and not 0 <= head < num_heads:
            raise UserError(f"head {head} does not exist: there are {num_heads}, counted from 0")
        one_BATT = weights_BATT if head is None else weights_BATT[:, head : head + 1]
        queries = slice(0, 1) if seen.has_class_token else seen.attended_patches
        maps.append(one_BATT[:, :, queries].mean(dim=(1, 2))[:, seen.attended_patches])
    return _maps(original, maps, count, "attention")


def plot_shift_maps(evaluation: Evaluation) -> Figure:
    """The mean norm maps of the task `shift-map` on one scale; crosses mark the chosen patches."""
    maps = evaluation.details["norm_maps"]
    columns = evaluation.details["grid"][1]
    figure = _figure(4.0 * len(maps), 4.0)
    axes = figure.subplots(1, len(maps))
    largest = max(max(map(max, rows)) for rows in maps.values())
    shown = [axis.imshow(rows, vmin=0, vmax=largest) for axis, rows in zip(axes, maps.values(), strict=True)]
    for axis, name in zip(axes, maps, strict=True):
        axis.set_title(name if name == "original" else f"moved to the {name}")
        axis.set_axis_off()
    places = [divmod(patch, columns) for patch in evaluation.details["chosen"]]
    axes[-1].plot([column for _, column in places], [row for row, _ in places], "x", color="white")
    figure.colorbar(shown[0], ax=list(axes), label="mean patch norm")
    return figure


def _of_block(kept: Any, block: int, what: str) -> Tensor:
    blocks = sorted(kept)
    if not blocks or (block not in kept and not -len(blocks) <= block < 0):
        listed = ", ".join(map(str, blocks)) or "none"
        raise UserError(f"block {block}: its {what} were not observed (only: {listed}); name it in observe()")
    return kept[block if block in kept else blocks[block]]


def _maps(original: Observed, maps_BN: Sequence[Tensor], count: int, label: str) -> Figure:
    """Pictures in the first row, the original's maps in the second, the patched model's in the third."""
    number = min(count, len(original.pictures))
    figure = _figure(2.4 * number + 0.6, 6.6)
    rows = figure.subplots(3, number, squeeze=False)
    for index in range(number):
        rows[0][index].imshow(original.pictures[index].permute(1, 2, 0).numpy())
        for row, (kind, map_BN) in enumerate(zip(COLOURS, maps_BN, strict=True), start=1):
            axes = rows[row][index]
            image = axes.imshow(map_BN[index].float().cpu().reshape(original.grid).numpy(), cmap="viridis")
            figure.colorbar(image, ax=axes, fraction=0.046)
            axes.set_title(f"{kind}: {label}", fontsize="small")
    for axes in rows.flat:
        axes.set_axis_off()
    return figure


def _figure(width: float, height: float) -> Figure:
    """A figure, sizes in inches. Without pyplot, which would keep every figure and may need a screen."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
