"""Task `shift-map`: outliers moved to chosen places, by writing the register neurons' extremes there on purpose.

Shape suffixes: B batch, T tokens, H hidden units, K register neurons, N patches.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from regsurgery.compiler.comparison import has_classes, kl_divergence, main_output, output_cosine
from regsurgery.compiler.outliers import outliers, token_norms
from regsurgery.compiler.taps import tap
from regsurgery.compiler.trace import tensor_inputs
from regsurgery.errors import UserError
from regsurgery.evaluation.masks import opened_mask
from regsurgery.evaluation.result import Result
from regsurgery.interval import Figures, Values
from regsurgery.runtime.surgery import signed_peak
from regsurgery.verification.pair import Pair

if TYPE_CHECKING:
    from regsurgery.images.image_set import ImageSet
    from regsurgery.progress import Progress

ORIGINAL, REGISTER, PLACES = "original", "register", "places"
SAME = "same first class"


def evaluate(
    pair: Pair,
    images: ImageSet,
    *,
    progress: Progress,
    seed: int,
    where: str | None = None,
    mask: str | Path | None = None,
) -> Result:
    """Norms of the chosen patches and of all others, and the change of the output, with the neurons' extremes on the
    register (the patched model), and on the chosen patches (without a register; this is not a checkpoint).

    The protocol of Jiang et al., arXiv 2506.08010, against typographic attacks: an outlier patch keeps no information
    about its content, so an outlier that is moved onto the text hides it. Norms are after the last block but one.

    Args:
        where: `x,y,w,h` of a box in the model's input image, from the top left corner: fractions of its width and
            height if none is above 1, otherwise pixels. Patches whose centre is in it are chosen.
        mask: instead, an image that is white where patches are chosen; it is resized to the model's input.

    Raises:
        UserError: there is no recipe, not exactly one of `where` and `mask` is given, or it contains no patch.
    """
    neurons = _neurons(pair)
    rows, columns = pair.original.grid
    chosen_N = chosen_patches(where, mask, pair.original.image_size, (rows, columns))
    first, last = pair.sites.patches.start, pair.sites.patches.stop
    places = tuple((first + torch.nonzero(chosen_N)[:, 0]).tolist())
    probe = pair.sites.blocks[pair.sites.probe_block].output
    moved_graph = tap(moved(pair.traced.graph_module, pair, neurons, places), {"probe": probe})
    observe = pair.observer(blocks=[pair.sites.probe_block], what=["blocks"], outputs=True)
    main = main_output(pair.traced.output_names)

    figures = Figures(seed)
    norm_sums = {name: torch.zeros(last - first, dtype=torch.float64) for name in (ORIGINAL, REGISTER, PLACES)}
    progress.stage("shift-map", images.num_images)
    for batch in pair.batches(images):
        original, patched = observe(batch.pixels)
        with torch.no_grad():
            outputs, taps = moved_graph(*tensor_inputs(pair.loaded, batch.pixels))
        before_BN = token_norms(original.patches(pair.sites.probe_block)).cpu()
        norm_sums[ORIGINAL] += before_BN.double().sum(dim=0)
        values = []
        for target, tokens_BND, given in (
            (REGISTER, patched.patches(pair.sites.probe_block), patched.outputs),
            (PLACES, taps["probe"][:, first:last], outputs),
        ):
            after_BN = token_norms(tokens_BND).cpu()
            norm_sums[target] += after_BN.double().sum(dim=0)
            to = (("moved to", target),)
            both = [_of_images(norms_BN, chosen_N) for norms_BN in (before_BN, after_BN)]
            values += [(name, Values(both[0][name], both[1][name], to)) for name in both[0]]
            changes = _changes(original.outputs[main], given.get(main), main)
            values += [(name, Values(None, of_B, to, is_share=name == SAME)) for name, of_B in changes.items()]
        figures.add(len(batch.pixels), values)
        progress.advance(len(batch.pixels))
    maps = {name: (total / figures.num_images).reshape(rows, columns).numpy() for name, total in norm_sums.items()}
    details = _details(chosen_N, maps)
    return Result(figures.rows(), (f"{len(places)} of {rows * columns} patches chosen; output {main}",), details)


def _neurons(pair: Pair) -> dict[int, tuple[int, ...]]:
    if pair.recipe is None or not pair.recipe.register_neurons:
        raise UserError(f"{pair.folder}: has no register neurons to move outliers with; give a patched folder")
    return {block: tuple(listed) for block, listed in pair.recipe.register_neurons.items()}


def _details(chosen_N: Tensor, maps: dict[str, Any]) -> dict[str, Any]:
    rows, columns = maps[ORIGINAL].shape
    return {
        "chosen": torch.nonzero(chosen_N)[:, 0].tolist(),
        "grid": [rows, columns],
        "norm_maps": {name: np.round(map_NN, 2).tolist() for name, map_NN in maps.items()},
    }


def _of_images(norms_BN: Tensor, chosen_N: Tensor) -> dict[str, Tensor]:
    outlier_BN = outliers(norms_BN)
    return {
        "mean norm, chosen patches": norms_BN[:, chosen_N].mean(dim=1),
        "largest norm, other patches": norms_BN[:, ~chosen_N].amax(dim=1),
        "outliers, chosen patches": outlier_BN[:, chosen_N].sum(dim=1),
        "outliers, other patches": outlier_BN[:, ~chosen_N].sum(dim=1),
    }


def _changes(output: Tensor, changed: Tensor | None, name: str) -> dict[str, Tensor]:
    """How far the output of each image moved; empty if a stock host lacks that output."""
    if changed is None:
        return {}
    if not has_classes(name, output):
        return {"cosine to the original": output_cosine(output, changed)}
    return {
        "KL to the original": kl_divergence(output, changed),
        SAME: (output.argmax(-1) == changed.argmax(-1)).double(),
        "largest logit change": (output - changed).abs().amax(dim=-1),
    }


# --- the graph ------------------------------------------------------------------------------------------------------


def moved(
    graph_module: fx.GraphModule, pair: Pair, neurons: dict[int, tuple[int, ...]], places: tuple[int, ...]
) -> fx.GraphModule:
    """The original's graph, but each of `neurons` has its extreme at the tokens `places` and 0 on other patches."""
    graph = copy.deepcopy(graph_module.graph)
    by_name = {node.name: node for node in graph.nodes}
    patches = (pair.sites.patches.start, pair.sites.patches.stop)
    for block, listed in neurons.items():
        site = pair.sites.blocks[block]
        hidden, down = by_name[site.hidden], by_name[site.down]
        with graph.inserting_before(down):
            down.replace_input_with(hidden, graph.call_function(extremes_at, (hidden, listed, places, patches)))
    return fx.GraphModule(graph_module, graph)


def extremes_at(
    hidden_BTH: Tensor, neurons: tuple[int, ...], places: tuple[int, ...], patches: tuple[int, int]
) -> Tensor:
    """A copy of MLP activations in which each neuron's signed extreme over all tokens, of each image, is at `places`,
    and 0 at the other tokens from `patches[0]` to `patches[1]`; the prefix keeps its values.
    """
    index_K = torch.tensor(neurons, device=hidden_BTH.device)
    values_BTK = hidden_BTH.index_select(-1, index_K)
    peak_B1K = signed_peak(values_BTK)
    values_BTK[:, patches[0] : patches[1]] = 0
    values_BTK[:, list(places)] = peak_B1K
    return hidden_BTH.index_copy(-1, index_K, values_BTK)


# --- places ---------------------------------------------------------------------------------------------------------


def chosen_patches(where: str | None, mask: str | Path | None, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Which patches are chosen, bool `[N]`, row by row; see `evaluate`.

    Args:
        size: (height, width) of the model's input in pixels; `grid`: its rows and columns of patches.
    """
    if (where is None) == (mask is None):
        raise UserError("eval shift-map: give the places, with either --where x,y,w,h or --mask FILE")
    chosen_N = in_box(where, size, grid) if where is not None else _in_mask(Path(str(mask)), grid)
    if not chosen_N.any() or chosen_N.all():
        amount = "all patches are" if chosen_N.any() else "no patch is"
        raise UserError(f"eval shift-map: {amount} in {where or mask}; choose some of the {grid[0]}x{grid[1]} patches")
    return chosen_N


def in_box(where: str, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The patches whose centre is in the box `x,y,w,h`, bool `[N]`; see `evaluate`.

    Args:
        size: (height, width) of the image in pixels; `grid`: its rows and columns of patches.
    """
    try:
        left, top, width, height = (float(part) for part in where.split(","))
    except ValueError as error:
        raise UserError(f"--where {where}: expected four numbers, x,y,w,h") from error
    if max(left, top, width, height) > 1:
        left, width, top, height = left / size[1], width / size[1], top / size[0], height / size[0]
    rows_N1 = (torch.arange(grid[0])[:, None] + 0.5) / grid[0]
    columns_1N = (torch.arange(grid[1])[None] + 0.5) / grid[1]
    inside_NN = (rows_N1 >= top) & (rows_N1 < top + height) & (columns_1N >= left) & (columns_1N < left + width)
    return inside_NN.flatten()


def _in_mask(path: Path, grid: tuple[int, int]) -> Tensor:
    """The patches that are more than half white, bool `[N]`."""
    from PIL import Image

    squeezed = opened_mask(path).convert("L").resize((grid[1], grid[0]), Image.Resampling.BOX)
    return torch.from_numpy(np.array(squeezed) > 127).flatten()
