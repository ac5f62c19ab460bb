"""Verify a written folder against its original: what is run, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regsurgery.backends import onnx
from regsurgery.backends.formats import backend
from regsurgery.compiler.modes.native import at_size
from regsurgery.compiler.surgery import Surgery
from regsurgery.compiler.trace import tensor_inputs
from regsurgery.formats import LIBRARIES
from regsurgery.images.image_set import ImageSet
from regsurgery.modes import NATIVE
from regsurgery.verification.measure import Artefact, Parity, measure, rounding
from regsurgery.verification.pair import Pair
from regsurgery.verification.patched import PatchedFolder, read_patched_config, rebuilt, reloaded
from regsurgery.verification.side import sides, with_unused_registers
from regsurgery.verification.stock import host_outputs
from regsurgery.verification.verdict import Verdict

if TYPE_CHECKING:
    from regsurgery.progress import Progress

INEXACT = 100.0  # times rounding, if a native host's norms have another eps


def module_of(surgery: Surgery, folder: Path, fmt: str) -> nn.Module:
    """The model in `folder`, loaded as a user would, for the surgery's image size."""
    size = surgery.traced.image_size if surgery.loaded.own else None
    return rebuilt(folder, read_patched_config(folder, fmt), fmt, stored=surgery.loaded.stored, image_size=size)


def verify_folder(
    surgery: Surgery, folder: Path, fmt: str, pictures: ImageSet, progress: Progress, loaded: nn.Module | None = None
) -> Verdict:
    """Compare the written model, run as a user would, with the surgery's graphs.

    Args:
        loaded: the folder's module, for the surgery's image size, if it is already loaded.
    """
    progress.stage("verify", pictures.num_images)
    config = read_patched_config(folder, fmt)
    module = loaded or module_of(surgery, folder, fmt)
    if surgery.recipe.kind.stock and fmt in LIBRARIES:
        return _verify_host(surgery, module, config["regsurgery"], fmt, pictures, progress)

    def run(images: Tensor) -> Artefact:
        if fmt in LIBRARIES:
            outputs = surgery.loaded.call(module, images)
        else:
            outputs = module(*tensor_inputs(surgery.loaded, images))
        return Artefact(outputs, outputs)

    least = with_unused_registers(surgery.located, surgery.plan.num_registers)
    parity = Parity(factor=onnx.INEXACT if fmt == "onnx" else 1.0)
    return measure(sides(surgery), run, pictures, unused=least, parity=parity, progress=progress.advance)


def _verify_host(
    surgery: Surgery, module: nn.Module, block: dict[str, Any], fmt: str, pictures: ImageSet, progress: Progress
) -> Verdict:
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
        outputs = host_outputs(host, module, images, block)
        return Artefact(outputs, outputs if same_size else {})

    return measure(
        sides(surgery),
        run,
        pictures,
        unused=with_unused_registers(surgery.located, surgery.plan.num_registers),
        parity=parity,
        progress=progress.advance,
    )


@torch.no_grad()
def _parity_at(
    surgery: Surgery, run: Callable[[Tensor], dict[str, Tensor]], size: tuple[int, int], pictures: ImageSet
) -> tuple[float, float]:
    """Largest difference between edited graph and host at an image size, and what rounding allows."""
    own = surgery.loaded.own or surgery.loaded
    resized = at_size(surgery.as_written(), size)
    batch = next(pictures.some(2).batches(2, own.preprocess))
    images = F.interpolate(batch.float(), size, mode="bicubic", antialias=True).to(batch.dtype)
    expected, given = resized.graph_module(*tensor_inputs(own, images)), run(images)
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
