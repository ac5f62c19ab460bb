"""Verify a written folder against its original: what is run, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regsurgery.backends import onnx
from regsurgery.backends.formats import backend
from regsurgery.checkpoints.limits import BROKEN
from regsurgery.checkpoints.turns import in_turns
from regsurgery.compiler.modes.native import at_size
from regsurgery.compiler.surgery import Surgery
from regsurgery.compiler.trace import tensor_inputs
from regsurgery.errors import BrokenModelError, VerificationError, in_short
from regsurgery.formats import LIBRARIES, has_host
from regsurgery.images.image_set import ImageSet, image_set
from regsurgery.modes import NATIVE
from regsurgery.verification.measure import Artefact, Parity, broken, measure, rounding
from regsurgery.verification.pair import Pair
from regsurgery.verification.patched import PatchedFolder, read_patched_config, rebuilt, reloaded
from regsurgery.verification.side import Side, sides, with_unused_registers
from regsurgery.verification.stock import host_outputs
from regsurgery.verification.verdict import Verdict

if TYPE_CHECKING:
    from regsurgery.progress import Progress

INEXACT = 100.0  # times rounding, if a native host's norms have another eps


def module_of(surgery: Surgery, folder: Path, fmt: str) -> nn.Module:
    """The model in `folder`, which this run has written, loaded as a user would, for the surgery's image size.

    Its code is ours, and the source's own where that was allowed.

    Raises:
        BrokenModelError: it cannot be loaded.
    """
    size = surgery.traced.image_size if surgery.loaded.own else None
    with _running("loaded"):
        config, stored = read_patched_config(folder, fmt), surgery.loaded.stored
        return rebuilt(folder, config, fmt, stored=stored, image_size=size, trusted=True)


@contextmanager
def _running(what: str) -> Iterator[None]:
    """Turn what the written model raises into a `BrokenModelError`."""
    try:
        yield
    except BROKEN as error:
        reason = in_short(error)
        raise BrokenModelError(f"the written model cannot be {what}, so nothing was written: {reason}") from error


@dataclass(frozen=True)
class _Written:
    """A written model, and what it is held to; see `measure.measure`."""

    sides: tuple[Side, Side]
    run_artefact: Callable[[Tensor], Artefact]
    parity: Parity


def verify_folder(
    surgery: Surgery, folder: Path, fmt: str, pictures: ImageSet, progress: Progress, loaded: nn.Module | None = None
) -> Verdict:
    """Compare the written model, run as a user would, with the surgery's graphs.

    Args:
        loaded: the folder's module, for the surgery's image size, if it is already loaded.

    Raises:
        BrokenModelError: the written model cannot be loaded or run.
    """
    progress.stage("verify", pictures.num_images)
    written = _written(surgery, folder, fmt, pictures, loaded)
    return measure(
        written.sides,
        written.run_artefact,
        pictures,
        unused=with_unused_registers(surgery.located, surgery.plan.num_registers),
        parity=written.parity,
        progress=progress.advance,
    )


def check_folder(surgery: Surgery, folder: Path, fmt: str, progress: Progress) -> None:
    """Load the written model as a user would and run it on one generated picture, without a verdict.

    Raises:
        VerificationError: it cannot be loaded or run, an output has another shape, or another value than the graph's.
    """
    progress.stage("check")
    picture = image_set(None, 1)
    written = _written(surgery, folder, fmt, picture, None)
    problems = broken(written.sides, written.run_artefact, picture, parity=written.parity)
    if problems:
        raise VerificationError(f"the written model is broken, nothing was written: {'; '.join(problems)}")


def _written(surgery: Surgery, folder: Path, fmt: str, pictures: ImageSet, loaded: nn.Module | None) -> _Written:
    config = read_patched_config(folder, fmt)
    module = loaded or module_of(surgery, folder, fmt)
    if has_host(fmt, surgery.recipe.kind):
        return _written_for_host(surgery, module, config["regsurgery"], fmt, pictures)

    def run(images: Tensor) -> Artefact:
        with _running("run"):
            if fmt in LIBRARIES:
                outputs = surgery.loaded.call(module, images)
            else:
                outputs = module(*tensor_inputs(surgery.loaded, images))
        return Artefact(outputs, outputs)

    return _Written(sides(surgery), run, Parity(factor=onnx.INEXACT if fmt == "onnx" else 1.0))


def _written_for_host(
    surgery: Surgery, module: nn.Module, block: dict[str, Any], fmt: str, pictures: ImageSet
) -> _Written:
    """A stock host of native mode against the edited graph.

    Each host interpolates position embeddings in its own way, so outputs are compared at the size that needs none.
    """
    host = backend(fmt, NATIVE)
    factor = 1.0 if block["exact"] else INEXACT
    own_size = (block["image_size"][0], block["image_size"][1])
    parity = Parity(factor=factor)
    same_size = own_size == surgery.traced.image_size
    if not same_size:
        found, limit = _parity_at(surgery, lambda images: host_outputs(host, module, images, block), own_size, pictures)
        parity = Parity(found, factor * limit, factor)

    def run(images: Tensor) -> Artefact:
        with _running("run"):
            outputs = host_outputs(host, module, images, block)
        return Artefact(outputs, outputs if same_size else {})

    return _Written(sides(surgery), run, parity)


@torch.no_grad()
def _parity_at(
    surgery: Surgery, run: Callable[[Tensor], dict[str, Tensor]], size: tuple[int, int], pictures: ImageSet
) -> tuple[float, float]:
    """Largest difference between edited graph and host at an image size, and what rounding allows."""
    own = surgery.loaded.own or surgery.loaded
    resized = at_size(surgery.as_written(), size)
    batch = next(pictures.some(2).batches(2, own.preprocess))
    images = F.interpolate(batch.float(), size, mode="bicubic", antialias=True).to(batch.dtype)
    calls = [partial(resized.graph_module, *tensor_inputs(own, images)), partial(run, images)]
    expected, given = in_turns(calls) if own.stored else [call() for call in calls]
    worst, limit = 0.0, 0.0
    for name, value in given.items():
        worst = max(worst, float((value - expected[name]).abs().max()))
        limit = max(limit, rounding(expected[name]))
    return worst, limit


def verify_pair(opened: PatchedFolder, pair: Pair, images: ImageSet, progress: Progress) -> Verdict:
    """Verify a patched folder that was opened again, running it as a user would.

    A native-mode folder is a stock checkpoint, and was loaded, traced and matched as one; all others are compared with
    the surgery, done again.
    """
    root, fmt, located = opened.root, opened.format, pair.located
    if pair.stock is None:
        assert pair.surgery is not None
        size = located.loaded.image_size if located.loaded.own else None
        module = reloaded(root, fmt, stored=located.loaded.stored, image_size=size, trusted=opened.trusted)
        return verify_folder(pair.surgery, root, fmt, images, progress, module)
    stock, block = pair.stock, opened.config["regsurgery"]
    host = backend(fmt, opened.recipe.kind)

    def run(images: Tensor) -> Artefact:
        return Artefact(host_outputs(host, stock.model, images, block), stock.call(stock.model, images))

    progress.stage("verify", images.num_images)
    least = with_unused_registers(located, block["num_registers"])
    return measure((pair.original.side, pair.patched.side), run, images, unused=least, progress=progress.advance)
