"""Register neurons planted into a model, for the demo and for test models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regsurgery.compiler.mlp import Mlp, mlp_of
from regsurgery.compiler.outliers import token_norms
from regsurgery.compiler.sites import Sites
from regsurgery.compiler.taps import tap
from regsurgery.compiler.trace import Traced

FIRING = 2.0  # patches per image on which one planted neuron fires, on average
PEAK = 20.0  # activation of a planted neuron on the patch that suits it best
GAIN = 40.0  # norm that this activation writes, in median token norms


@dataclass(frozen=True)
class Bed:
    """What neurons are planted into: a model, or its graph, that can be read block by block.

    Attributes:
        module: holds the parameters.
        mlps: of each block.
        num_prefix: tokens before the patches.
        look: block -> the input of its MLP and the stream after it, both `[B, T, D]`, as the model is at that moment.
    """

    module: nn.Module
    mlps: Mapping[int, Mlp]
    num_prefix: int
    look: Callable[[int], tuple[Tensor, Tensor]]


def plant(
    traced: Traced,
    sites: Sites,
    inputs: list[Tensor],
    counts: Mapping[int, int],
    *,
    seed: int = 0,
    firing: float = FIRING,
    avoid: Collection[tuple[int, int]] = (),
) -> dict[int, list[int]]:
    """`plant_into` a traced model, whose graph runs on `inputs`: those for the images that decide directions and
    thresholds.
    """
    mlps = {block: mlp_of(traced, sites.blocks[block]) for block in counts}

    def look(block: int) -> tuple[Tensor, Tensor]:
        nodes = {"mlp": mlps[block].source, "stream": sites.blocks[block].output}
        _, taps = tap(traced.graph_module, nodes, early_exit=True)(*inputs)
        return taps["mlp"], taps["stream"]

    bed = Bed(traced.graph_module, mlps, sites.num_prefix, look)
    return plant_into(bed, counts, seed=seed, firing=firing, avoid=avoid)


@torch.no_grad()
def plant_into(
    bed: Bed,
    counts: Mapping[int, int],
    *,
    seed: int = 0,
    firing: float = FIRING,
    avoid: Collection[tuple[int, int]] = (),
) -> dict[int, list[int]]:
    """Turn `counts[block]` random neurons of each block into content-driven register neurons, in place.

    A neuron's input row becomes a threshold on a principal direction of the patches' up-projection inputs that no
    prefix token comes near; its output column becomes a random direction of `GAIN` median token norms. In a gated MLP,
    the gate becomes the threshold, and the value a constant 1 (if both are in one projection, the gate comes first).

    Args:
        firing: patches per image on which each neuron fires, on average.
        avoid: `(block, neuron)` not to be taken.

    Returns:
        block -> ascending indices of its planted neurons.
    """
    generator = torch.Generator().manual_seed(seed)
    planted: dict[int, list[int]] = {}
    for block, count in sorted(counts.items(), reverse=True):  # so that no neuron reacts to another one's outliers
        mlp = bed.mlps[block]
        mlp_BTD, stream_BTD = bed.look(block)
        tokens_BTD = mlp_BTD.float()
        median = float(token_norms(stream_BTD)[:, bed.num_prefix :].median())
        directions = _directions(tokens_BTD, bed.num_prefix, count, firing)
        down_DH = bed.module.get_parameter(mlp.down)
        width, hidden_size = down_DH.shape
        drawn = torch.randperm(hidden_size, generator=generator).tolist()
        neurons = sorted([neuron for neuron in drawn if (block, neuron) not in avoid][:count])
        for neuron, (direction_D, threshold, top) in zip(neurons, directions, strict=True):
            slope = PEAK / (top - threshold)
            for projection, row_D, constant in (
                (mlp.gate, slope * direction_D, -slope * threshold),
                (mlp.value, torch.zeros(width), 1.0),
            ):
                if projection is not None:
                    assert projection.bias is not None, "planting needs a linear with a bias"
                    bed.module.get_parameter(projection.weight)[projection.offset + neuron] = row_D
                    bed.module.get_parameter(projection.bias)[projection.offset + neuron] = constant
            out_D = torch.randn(width, generator=generator)
            down_DH[:, neuron] = out_D / out_D.norm() * (GAIN * median / PEAK)
        planted[block] = neurons
    return dict(sorted(planted.items()))


def _directions(tokens_BTD: Tensor, num_prefix: int, count: int, firing: float) -> list[tuple[Tensor, float, float]]:
    """Unit directions, each with the threshold that `firing` patches per image exceed and its largest value."""
    patches_ND = tokens_BTD[:, num_prefix:].flatten(0, 1)
    _, _, principal = torch.linalg.svd(patches_ND - patches_ND.mean(dim=0), full_matrices=False)
    share = 1 - firing / (tokens_BTD.shape[1] - num_prefix)
    found = []
    for axis_D in principal:
        for direction_D in (axis_D, -axis_D):
            values_N = (patches_ND @ direction_D).sort().values
            threshold, top = float(values_N[int(share * len(values_N))]), float(values_N[-1])
            prefix = tokens_BTD[:, :num_prefix] @ direction_D
            spread = top - threshold
            if len(found) < count and (prefix.numel() == 0 or float(prefix.max()) < threshold - spread):
                found.append((direction_D, threshold, top))
                break
    if len(found) < count:
        raise ValueError(f"only {len(found)} of {count} directions keep clear of the prefix tokens")
    return found
