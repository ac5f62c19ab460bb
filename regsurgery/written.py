"""A written folder against its original: what is run, and what it is compared with."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regsurgery import backends
from regsurgery.backends import native_open_clip, onnx_program
from regsurgery.calibration import ImageSet
from regsurgery.errors import CheckpointError
from regsurgery.fitting import at_size, restored_native
from regsurgery.loading import Loaded, LoadOptions
from regsurgery.loading import load as load_original
from regsurgery.match import match
from regsurgery.patched import read_patched_config, rebuilt
from regsurgery.recipe import Recipe
from regsurgery.sites import Sites
from regsurgery.surgery import Surgery
from regsurgery.trace import Traced, tensor_inputs, trace
from regsurgery.verification import Artefact, Side, Verdict, detectors, rounding, sides, verify, with_unused_registers

if TYPE_CHECKING:
    from regsurgery.pipeline import Progress

INEXACT = 100.0  # times rounding, where a native host's norms have another eps


def module_of(surgery: Surgery, folder: Path, fmt: str) -> nn.Module:
    """What was written to `folder`, loaded as a user would for the surgery's image size."""
    size = surgery.traced.image_size if surgery.loaded.own else None
    return rebuilt(folder, read_patched_config(folder, fmt), fmt, stored=surgery.loaded.stored, image_size=size)


def verify_folder(
    surgery: Surgery, folder: Path, fmt: str, pictures: ImageSet, progress: Progress, loaded: nn.Module | None = None
) -> Verdict:
    """What was written, run as a user would, against the surgery's graphs.

    Args:
        loaded: the folder's module, for the surgery's image size, where it is loaded already.
    """
    progress.stage("verify", pictures.num_images)
    mode = surgery.recipe.mode
    config = read_patched_config(folder, fmt)
    module = loaded or module_of(surgery, folder, fmt)
    if mode == "native" and fmt in backends.LIBRARIES:
        return _verify_host(surgery, module, config["regsurgery"], fmt, pictures, progress)

    def run(images: Tensor) -> Artefact:
        if fmt in backends.LIBRARIES:
            outputs = surgery.loaded.call(module, images)
        else:
            outputs = module(*tensor_inputs(surgery.loaded, images))
        return Artefact(outputs, outputs)

    factor = onnx_program.INEXACT if fmt == "onnx" else 1.0
    least = with_unused_registers(surgery.traced, surgery.sites, surgery.plan.num_registers)
    return verify(*sides(surgery), run, pictures, unused=least, parity_factor=factor, progress=progress.advance)


def _verify_host(
    surgery: Surgery, module: nn.Module, block: dict[str, Any], fmt: str, pictures: ImageSet, progress: Progress
) -> Verdict:
    """A stock host of native mode against the edited graph.

    Hosts interpolate position embeddings each in their own way, so outputs are compared at the size that needs none.
    """
    host = backends.backend(fmt, "native")
    factor = 1.0 if block["exact"] else INEXACT
    own_size = (block["image_size"][0], block["image_size"][1])
    parity = (0.0, 0.0)
    same_size = own_size == surgery.traced.image_size
    if not same_size:
        parity = _parity_at(surgery, lambda images: host_outputs(host, module, images, block), own_size, pictures)

    def run(images: Tensor) -> Artefact:
        outputs = host_outputs(host, module, images, block)
        return Artefact(outputs, outputs if same_size else {})

    return verify(
        *sides(surgery),
        run,
        pictures,
        unused=with_unused_registers(surgery.traced, surgery.sites, surgery.plan.num_registers),
        parity=(parity[0], factor * parity[1]),
        parity_factor=factor,
        progress=progress.advance,
    )


@torch.no_grad()
def _parity_at(
    surgery: Surgery, run: Callable[[Tensor], dict[str, Tensor]], size: tuple[int, int], pictures: ImageSet
) -> tuple[float, float]:
    """Largest difference between edited graph and host at an image size, and what rounding allows."""
    own = surgery.loaded.own or surgery.loaded
    resized = at_size(replace(surgery, loaded=own), size)
    batch = next(pictures.some(2).batches(2, own.preprocess))
    images = F.interpolate(batch.float(), size, mode="bicubic", antialias=True).to(batch.dtype)
    expected, given = resized.graph_module(*tensor_inputs(own, images)), run(images)
    worst, limit = 0.0, 0.0
    for name, value in given.items():
        worst = max(worst, float((value - expected[name]).abs().max()))
        limit = max(limit, rounding(expected[name]))
    return worst, limit


def host_outputs(host: Any, module: nn.Module, images: Tensor, block: dict[str, Any]) -> dict[str, Tensor]:
    """The outputs of the original, as far as a stock host of native mode has them."""
    kinds = host.outputs(module, images, block["num_registers"])
    if "head" in kinds:
        kinds["unit_head"] = F.normalize(kinds["head"], dim=-1)
    return {name: kinds[kind] for name, kind in block["outputs"].items() if kind in kinds}


def verify_native(
    loaded: Loaded,
    recipe: Recipe,
    traced: Traced,
    sites: Sites,
    root: Path,
    fmt: str,
    pictures: ImageSet,
    progress: Progress,
) -> Verdict:
    """A folder of native mode, which is a stock checkpoint: it is loaded, traced and matched as one."""
    config = read_patched_config(root, fmt)
    block = config["regsurgery"]
    if fmt not in backends.LIBRARIES:
        surgery = restored_native(loaded, recipe, traced, sites, backends.backend(fmt).state(root))
        return verify_folder(surgery, root, fmt, pictures, progress)
    with tempfile.TemporaryDirectory(prefix="regsurgery-") as scratch:  # stored weights are read for as long as it is
        options = LoadOptions(max_memory=0) if loaded.stored else None
        stock = load_stock(root, fmt, config, options, Path(scratch))
        if loaded.own is not None:
            stock = backends.library(stock.library).at_size(stock, traced.image_size)
        original = Side(loaded, traced.graph_module, sites, sites.patches, slice(0, 0))
        patched = stock_side(stock, trace(stock, traced.image_size), sites, recipe, block["num_registers"], root)
        host = backends.backend(fmt, "native")

        def run(images: Tensor) -> Artefact:
            return Artefact(host_outputs(host, stock.model, images, block), stock.call(stock.model, images))

        progress.stage("verify", pictures.num_images)
        least = with_unused_registers(traced, sites, block["num_registers"])
        return verify(original, patched, run, pictures, unused=least, progress=progress.advance)


def load_stock(root: Path, fmt: str, config: dict[str, Any], options: LoadOptions | None, scratch: Path) -> Loaded:
    """The stock checkpoint that native mode wrote to `root`; `scratch`: an empty folder, needed while it is used."""
    if fmt == "open_clip":
        native_open_clip.relocate(root, scratch, config)
    return load_original(str(scratch) if fmt == "open_clip" else str(root), options, native=True)


def stock_side(
    stock: Loaded, stock_traced: Traced, sites: Sites, recipe: Recipe, num_registers: int, root: Path
) -> Side:
    """The stock model of native mode as the patched side; `sites` are the original's.

    Raises:
        CheckpointError: its tokens are not the original's and the registers.
    """
    stock_sites = match(stock_traced)
    behind = sites.num_prefix + num_registers
    if stock_sites.num_prefix != behind:
        raise CheckpointError(f"{root}: has {stock_sites.num_prefix} prefix tokens, expected {behind}; patch it again")
    return Side(
        stock,
        stock_traced.graph_module,
        stock_sites,
        stock_sites.patches,
        slice(sites.num_prefix, behind),
        detectors(stock_traced, stock_sites, recipe),
    )
