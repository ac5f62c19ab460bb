"""Stock checkpoints of native mode: how they are loaded, the places of their tokens, and their outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from regsurgery.backends import native_open_clip
from regsurgery.backends.formats import backend
from regsurgery.compiler.match import match
from regsurgery.compiler.sites import Sites
from regsurgery.compiler.trace import Traced
from regsurgery.errors import CheckpointError
from regsurgery.formats import STOCK_CODE
from regsurgery.frontends.libraries import frontend
from regsurgery.frontends.load import load
from regsurgery.frontends.loaded import Loaded
from regsurgery.options import LoadOptions
from regsurgery.recipe import Recipe
from regsurgery.verification.patched import PatchedFolder
from regsurgery.verification.side import Side, detectors


def host_outputs(host: Any, module: nn.Module, images: Tensor, block: dict[str, Any]) -> dict[str, Tensor]:
    """Those of the original's outputs that a stock host of native mode has."""
    kinds = host.outputs(module, images, block["num_registers"])
    if "head" in kinds:
        kinds["unit_head"] = F.normalize(kinds["head"], dim=-1)
    return {name: kinds[kind] for name, kind in block["outputs"].items() if kind in kinds}


def load_stock(opened: PatchedFolder, original: Loaded, options: LoadOptions, scratch: Path) -> Loaded:
    """The stock checkpoint that native mode wrote; `scratch`: an empty folder, needed while it is in use."""
    root, fmt = opened.root, opened.format
    if fmt in STOCK_CODE:
        return backend(fmt).stand_in(original, root, opened.config, options.device_map)
    if fmt == "open_clip":
        native_open_clip.relocate(root, scratch, opened.config)
    known = {path.name: digest for path, digest in opened.files.digests.items() if path.parent == root}
    return load(str(scratch) if fmt == "open_clip" else str(root), options, native=True, known=known)


def stock_at_size(stock: Loaded, fmt: str, size: tuple[int, int]) -> Loaded:
    """A stock checkpoint for images of another size (height, width)."""
    return stock.resized(stock.model, size) if fmt in STOCK_CODE else frontend(stock.library).at_size(stock, size)


def stock_side(
    stock: Loaded, stock_traced: Traced, sites: Sites, recipe: Recipe, num_registers: int, root: Path
) -> Side:
    """The stock model of native mode as the patched side; `sites` are the original's.

    Raises:
        CheckpointError: its tokens are not the original's plus the registers.
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
