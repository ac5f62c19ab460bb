"""`regsurgery report DIR`: what both models do on example images -> one HTML file that opens offline."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.checkpoints.whole import check_parent, replace_file
from regsurgery.errors import UserError
from regsurgery.options import ReportOptions, takes

if TYPE_CHECKING:
    from regsurgery.verification.verdict import Verdict

NEEDS = {"vl_convert": "vl-convert-python", "scipy": "scipy"}
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


@takes(ReportOptions)
def report(folder: str | Path, output: str | Path | None = None, *, options: ReportOptions) -> Report:
    """Write an HTML report of a patched folder: figures, norms, attention, neurons, recipe.

    Args:
        output: the file; default: `FOLDER-report.html`, next to the folder.
        options: see `options.ReportOptions`; its fields are the keyword arguments. The page shows the images as
            examples.

    Raises:
        UserError: the input is at fault, a package of the extra `eval` is missing, or the page would be larger than
            8 MB; see `errors`.
    """
    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"report needs {' and '.join(missing)}; install with: pip install 'regsurgery[eval]'")
    from regsurgery.emit.run_record import fitted_of, judged
    from regsurgery.reporting.collect import Lost, collect
    from regsurgery.reporting.opening import Cost
    from regsurgery.reporting.page import ReportSubject, page
    from regsurgery.verification.folder import verify_pair
    from regsurgery.verification.observing import check_block
    from regsurgery.verification.pair import reopened
    from regsurgery.verification.patched import existing_folder, open_patched

    progress, root = options.progress, Path(folder)
    target = Path(output) if output is not None else root.absolute().with_name(f"{root.absolute().name}-report.html")
    check_parent(target)
    images = options.image_set()
    progress.stage("checksums")
    opened = open_patched(existing_folder(root), trusted=options.trust_remote_code)
    with reopened(opened, str(folder), options.original, options) as pair:
        verdict = judged(verify_pair(opened, pair, images, progress), images, fitted_of(root), strict=False)
        block = max(0, pair.original.num_blocks - 4) if options.block is None else options.block
        lost = Lost(check_block(pair.original, block), options.kind, options.bias) if options.boxes else None
        collected = collect(pair, images, progress, lost)
        source = opened.config["regsurgery"]["source"]
        tokens, added = pair.sites.num_tokens, pair.patched.side.registers
        cost = Cost(added.stop - added.start, tokens, collected.grid[0] * collected.grid[1])
        subject = ReportSubject(root.absolute().name, pair.mode, opened.recipe, source, cost)
        html = page(subject, verdict, collected, lost)
    content = html.encode()
    if len(content) > MAX_BYTES:
        raise UserError(
            f"{target}: would have {len(content) / 1e6:.1f} MB, more than the limit of {MAX_BYTES / 1e6:.0f} MB; use "
            "fewer images with --num-images"
        )
    replace_file(target, content)
    return Report(target, len(content), verdict.num_images, verdict)
