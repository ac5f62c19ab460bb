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
        live: the live page's folder, if it was asked for; `live_size` of its files together, in bytes.
        verdict: of the verification on the same images.
    """

    path: Path
    size: int
    num_images: int
    verdict: Verdict
    live: Path | None = None
    live_size: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "output": str(self.path),
            "bytes": self.size,
            "num_images": self.num_images,
            "live": None if self.live is None else str(self.live),
            "live_bytes": self.live_size,
            "verify": self.verdict.as_dict(),
        }


def default_report(folder: Path) -> Path:
    """Where the report of a patched folder is, unless its user says otherwise: beside it."""
    return folder.absolute().with_name(f"{folder.absolute().name}-report.html")


@takes(ReportOptions)
def report(folder: str | Path, output: str | Path | None = None, *, options: ReportOptions) -> Report:
    """Write an HTML report of a patched folder: figures, norms, attention, neurons, recipe; and a live page beside it.

    Args:
        output: the file; default: `FOLDER-report.html`, next to the folder.
        options: see `options.ReportOptions`; its fields are the keyword arguments. The page shows the images as
            examples.

    Raises:
        UserError: the input is at fault, a package of the extra `eval` is missing, or the page would be larger than
            8 MB; see `errors`. For a live page, see also `live.prepare`.
        VerificationError: the live page's models would give other figures than torch's.
    """
    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"report needs {' and '.join(missing)}; install with: pip install 'regsurgery[eval]'")
    from regsurgery.checkpoints.sums import SUMS_NAME, sha256
    from regsurgery.emit.run_record import fitted_of, judged
    from regsurgery.reporting.collect import Lost, collect
    from regsurgery.reporting.live import live_folder, prepare, write_live
    from regsurgery.reporting.opening import Cost
    from regsurgery.reporting.page import LiveLink, ReportSubject, page
    from regsurgery.verification.folder import verify_pair
    from regsurgery.verification.observing import check_block
    from regsurgery.verification.pair import reopened
    from regsurgery.verification.patched import existing_folder, open_patched

    progress, root = options.progress, Path(folder)
    target = Path(output) if output is not None else default_report(root)
    check_parent(target)
    images = options.image_set()
    progress.stage("checksums")
    opened = open_patched(existing_folder(root), trusted=options.trust_remote_code)
    with reopened(opened, str(folder), options.original, options) as pair:
        live = prepare(pair, options) if options.live else None
        verdict = judged(verify_pair(opened, pair, images, progress), images, fitted_of(root), strict=False)
        block = max(0, pair.original.num_blocks - 4) if options.block is None else options.block
        lost = Lost(check_block(pair.original, block), options.kind, options.bias) if options.boxes else None
        collected = collect(pair, images, progress, lost)
        source = opened.config["regsurgery"]["source"]
        tokens, added = pair.sites.num_tokens, pair.patched.side.registers
        cost = Cost(added.stop - added.start, tokens, collected.grid[0] * collected.grid[1])
        digest = sha256(opened.root / SUMS_NAME)
        subject = ReportSubject(root.absolute().name, digest, pair.mode, opened.recipe, source, cost)
        link = None if live is None else LiveLink(live_folder(target).name, live.num_bytes)
        html = page(subject, verdict, collected, lost, link)
        content = html.encode()
        if len(content) > MAX_BYTES:
            raise UserError(
                f"{target}: would have {len(content) / 1e6:.1f} MB, more than the limit of {MAX_BYTES / 1e6:.0f} MB; "
                "use fewer images with --num-images"
            )
        written = 0 if live is None else write_live(live, target, subject.name, collected.examples, progress)
    replace_file(target, content)
    beside = None if live is None else live_folder(target)
    return Report(target, len(content), verdict.num_images, verdict, beside, written)
