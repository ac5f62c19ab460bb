"""The pictures that a task draws, and where `eval --png` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from regsurgery.errors import OutputError, UserError
from regsurgery.evaluation.observed import Observed, observed
from regsurgery.evaluation.plots import plot_attention, plot_norm_maps, plot_norms, plot_shift_maps
from regsurgery.verification.pair import Pair

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regsurgery.evaluation.result import Evaluation
    from regsurgery.images.image_set import ImageSet

EXAMPLES = 4  # images to draw maps for
DPI = 150
DRAWN = {
    "norms": "the norms over the blocks, and norm maps in a second file, FILE-maps",
    "attention": "attention maps",
    "shift-map": "mean norm maps, with the outliers where they were, on the register, and at the chosen places",
}


def check_png(task: str, png: Path) -> None:
    """Raises:
    UserError: the task draws nothing.
    OutputError: the file cannot be written.
    """
    if task not in DRAWN:
        raise UserError(f"eval {task}: draws no picture; leave out --png ({', '.join(DRAWN)} draw one)")
    if not png.absolute().parent.is_dir():
        raise OutputError(f"{png}: no such folder; create it first")
    if png.suffix.lower() != ".png":
        raise OutputError(f"{png}: pictures are PNG files; give a name that ends in .png")


def write_pictures(task: str, evaluation: Evaluation, pair: Pair, images: ImageSet, png: Path) -> list[str]:
    """Draw the task's pictures; returns the files written."""
    figures: dict[Path, Figure] = {}
    block = evaluation.settings.get("block")
    if task == "norms":
        figures[png] = plot_norms(evaluation)
        where = pair.sites.probe_block if block is None else block
        both = _examples(pair, images, where, "blocks")
        figures[png.with_name(f"{png.stem}-maps{png.suffix}")] = plot_norm_maps(*both, block=where)
    elif task == "shift-map":
        figures[png] = plot_shift_maps(evaluation)
    else:
        where = pair.original.num_blocks - 1 if block is None else block
        figures[png] = plot_attention(*_examples(pair, images, where, "attention"), block=where)
    for path, figure in figures.items():
        try:
            figure.savefig(path, dpi=DPI, metadata={"Software": None})
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
    return [str(path) for path in figures]


def _examples(pair: Pair, images: ImageSet, block: int, what: str) -> tuple[Observed, Observed]:
    batches = [batch.pixels for batch in pair.batches(images.some(EXAMPLES))]
    original, patched = (
        observed(pair, subject, batches, (block,), (what,)) for subject in (pair.original, pair.patched)
    )
    return original, patched
