"""The live page: both models run in the reader's browser, on a photo of the reader's own.

It is a folder beside the report, to be served: a page that is opened as a file may load nothing. The models stay
`.onnx` files, which any onnxruntime opens; inside the page they would be a third larger, and several times in memory.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.checkpoints.whole import replace_file, temporary_folder
from regsurgery.compiler.outliers import OUTLIER_FACTOR
from regsurgery.errors import OutputError
from regsurgery.html import html_template, inline, inline_json, script_hashes
from regsurgery.images.image_set import image_set
from regsurgery.reporting.collect import SIDES, why_no_attention
from regsurgery.reporting.live_network import PIXELS, ShownNetwork, shown_network, write_network
from regsurgery.reporting.onnxruntime_web import FILES, PROGRAM, SCRIPT, VERSION, onnxruntime_web
from regsurgery.reporting.packing import packed_palette
from regsurgery.reporting.preprocessing import Preprocessing, measured
from regsurgery.version import __version__

if TYPE_CHECKING:
    from regsurgery.options import ReportOptions
    from regsurgery.progress import Progress
    from regsurgery.reporting.collect import Example
    from regsurgery.verification.pair import Pair

PAGE = "index.html"
LIVE_FILES = (PAGE, *(f"{side}.onnx" for side in SIDES), *FILES)
MAX_SAMPLES = 4


@dataclass(frozen=True)
class Live:
    """What a live page needs of two models; made before a report begins, so that a refusal comes at once.

    Attributes:
        networks: side -> the network.
        runtime: name -> content of onnxruntime-web's files.
        attention_note: why the page shows no attention; "" if it does.
        examples: a batch of pixels on which the written networks are compared with torch.
    """

    networks: Mapping[str, ShownNetwork]
    preprocessing: Preprocessing
    runtime: Mapping[str, bytes]
    attention_note: str
    examples: Any

    @property
    def num_bytes(self) -> int:
        """What a browser loads to run the page, but for the page itself and the networks' graphs."""
        return sum(network.num_bytes for network in self.networks.values()) + sum(map(len, self.runtime.values()))


def live_folder(report: Path) -> Path:
    """Where the live page of a report is."""
    return report.with_name(f"{report.stem}-live")


def prepare(pair: Pair, options: ReportOptions) -> Live:
    """Raise unless a page can run both models of `pair`.

    Raises:
        UserError: they are too large, of another dtype, or preprocessed in a way that the page does not know; or
            onnxruntime-web cannot be had.
    """
    note = why_no_attention(pair)
    probe, subjects = pair.sites.probe_block, (pair.original, pair.patched)
    networks = {
        side: shown_network(subject, probe, attention=not note) for side, subject in zip(SIDES, subjects, strict=True)
    }
    preprocessing = measured(pair.loaded)
    examples = next(image_set(None, 2).batches(2, pair.loaded.preprocess))
    runtime = onnxruntime_web(options.onnxruntime_web, options.progress)
    return Live(networks, preprocessing, runtime, note, examples)


def write_live(live: Live, report: Path, name: str, examples: Sequence[Example], progress: Progress) -> int:
    """Write the folder of a report's live page, each file whole; how many bytes it has.

    An earlier page of that report is replaced.

    Args:
        name: of the model.
        examples: of the report, the first of which can be chosen in the page.

    Raises:
        OutputError: the folder cannot be written.
        UnsupportedModelError, VerificationError: see `write_network`.
    """
    files = dict(live.runtime)
    with temporary_folder() as scratch:
        for side, network in live.networks.items():
            progress.stage(f"onnx, {side}")
            path = scratch / f"{side}.onnx"
            write_network(network, path, live.examples)
            files[path.name] = path.read_bytes()
    files[PAGE] = _page(live, report, name, examples, {key: len(content) for key, content in files.items()}).encode()
    folder = live_folder(report)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror}); choose another file with -o") from error
    for key, content in files.items():
        replace_file(folder / key, content)
    return sum(map(len, files.values()))


def _page(live: Live, report: Path, name: str, examples: Sequence[Example], sizes: Mapping[str, int]) -> str:
    from markupsafe import Markup

    network, how, script = live.networks[SIDES[0]], live.preprocessing, inline("maps.js", "live.js")
    resized = how.resized if isinstance(how.resized, int) else "×".join(map(str, how.resized))
    data = {
        "grid": network.subject.grid,
        "factor": OUTLIER_FACTOR,
        "input": PIXELS,
        "preprocessing": how.as_dict(),
        "palette": packed_palette(),
        "files": {
            key: {"name": file, "bytes": sizes[file]}
            for key, file in {"script": SCRIPT, "program": PROGRAM, **{side: f"{side}.onnx" for side in SIDES}}.items()
        },
        "samples": [
            {"name": example.name, "data": base64.b64encode(example.jpeg).decode("ascii")}
            for example in examples[:MAX_SAMPLES]
        ],
    }
    return html_template("live.html.j2").render(
        name=name,
        report=report.name,
        factor=f"{OUTLIER_FACTOR:g}",
        block=network.probe,
        has_attention=not live.attention_note,
        attention_note=live.attention_note,
        resized=f"{'the shorter side to ' if isinstance(how.resized, int) else 'to '}{resized} pixels, {how.filter}",
        crop="×".join(map(str, how.crop)),
        version=__version__,
        runtime=VERSION,
        style=Markup(inline("report.css", "live.css")),  # nosec B704 # our files
        script=Markup(script),  # nosec B704 # our files
        may_run=Markup(script_hashes(script)),  # nosec B704 # base64
        data=Markup(inline_json(data)),  # nosec B704 # escaped there
    )
