"""`regsurgery report DIR`: what both models do on example images -> one HTML file that opens offline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.errors import UserError

if TYPE_CHECKING:
    from regsurgery.loading import LoadOptions
    from regsurgery.pipeline import Progress
    from regsurgery.verdict import Verdict

NEEDS = {"vl_convert": "vl-convert-python", "scipy": "scipy", "matplotlib": "matplotlib"}
DEFAULT_IMAGES = 16
MAX_BYTES = 8_000_000


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        path: the HTML file; `size` in bytes.
        verdict: of the verification on the same images.
    """

    path: Path
    size: int
    num_images: int
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "output": str(self.path),
            "bytes": self.size,
            "num_images": self.num_images,
            "verify": self.verdict.as_dict(),
        }


def report(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    images: str | Path | None = None,
    num_images: int = DEFAULT_IMAGES,
    original: str | None = None,
    lost_block: int | None = None,
    lost_kind: str = "keys",
    lost_bias: float = -0.2,
    boxes: bool = True,
    options: LoadOptions | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write an HTML report of a patched folder: figures, norms, attention, neurons, recipe.

    Args:
        output: the file; by default beside the folder: `FOLDER-report.html`.
        images, num_images: see `calibration.image_set`; these are also the examples that the page shows.
        original: MODEL to compare with, where the folder cannot restore it.
        lost_block: whose features LOST takes (negative: from the end); by default the fourth from the end.
        lost_kind: `queries`, `keys` or `values`; `lost_bias` is added to similarities.
        boxes: draw LOST's boxes.

    Raises:
        UserError: the input is at fault, a package of the extra `eval` is missing, or the page would be larger than
            8 MB; see `errors`.
    """
    import importlib.util

    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"report needs {' and '.join(missing)}, not installed; install with: pip install 'regsurgery[eval]'"
        )
    from regsurgery import checkpoint_io, pipeline
    from regsurgery.calibration import image_set
    from regsurgery.evaluation.pair import open_pair
    from regsurgery.observing import check_block
    from regsurgery.patched import read_patched_config
    from regsurgery.reporting.collect import Lost, collect
    from regsurgery.reporting.page import Subject, page

    progress = progress or pipeline.Progress()
    root = Path(folder)
    target = Path(output) if output is not None else root.absolute().with_name(f"{root.absolute().name}-report.html")
    checkpoint_io.check_parent(target)
    verdict = pipeline.verify(
        folder, original=original, images=images, num_images=num_images, options=options, progress=progress
    )
    pictures = image_set(images, num_images, say=progress.say)
    with open_pair(folder, original, options, progress) as pair:
        if lost_block is None:
            lost_block = max(0, pair.original.num_blocks - 4)
        lost = Lost(check_block(pair.original, lost_block), lost_kind, lost_bias) if boxes else None
        collected = collect(pair, pictures, progress, lost)
        assert pair.recipe is not None
        source = read_patched_config(root, pair.format)["regsurgery"]["source"]
        html = page(Subject(root.absolute().name, pair.mode, pair.recipe, source), verdict, collected, lost)
    content = html.encode()
    if len(content) > MAX_BYTES:
        raise UserError(
            f"{target}: would have {len(content) / 1e6:.1f} MB, at most {MAX_BYTES / 1e6:.0f} open well everywhere; "
            "take fewer images with --num-images"
        )
    checkpoint_io.replace_file(target, content)
    return Report(target, len(content), verdict.num_images, verdict)
