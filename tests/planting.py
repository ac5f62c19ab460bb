"""Ground truth for `find`: models whose register neurons were planted, among neurons that only look like some."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from regsurgery.compiler.match import match
from regsurgery.compiler.mlp import mlp_of
from regsurgery.compiler.outliers import token_norms
from regsurgery.compiler.planting import GAIN, PEAK, plant
from regsurgery.compiler.sites import Block, Sites
from regsurgery.compiler.taps import tap
from regsurgery.compiler.trace import Traced, tensor_inputs, trace
from regsurgery.frontends.load import load
from regsurgery.images.image_set import image_set

PLANTING_IMAGES = 32
OUTLIERS = 8.0  # per image at most, over all planted neurons


@dataclass(frozen=True)
class Truth:
    neurons: dict[int, tuple[int, ...]]
    distractors: dict[str, tuple[int, int]]  # kind -> (block, neuron)


def random_counts(seed: int, num_blocks: int) -> dict[int, int]:
    """1 to 30 neurons in 1 to 4 blocks, not the last two."""
    rng = random.Random(seed)
    blocks = sorted(rng.sample(range(num_blocks - 2), rng.randint(1, min(4, num_blocks - 2))))
    total = rng.randint(len(blocks), 30)
    cuts = sorted(rng.sample(range(1, total), len(blocks) - 1))
    return {block: b - a for block, a, b in zip(blocks, [0, *cuts], [*cuts, total], strict=True)}


@torch.no_grad()
def plant_model(folder: Path, counts: Mapping[int, int], seed: int) -> Truth:
    """Plant register neurons and one distractor of each kind into the transformers checkpoint `folder`."""
    loaded = load(str(folder))
    traced = trace(loaded)
    sites = match(traced)
    pictures = image_set(None, PLANTING_IMAGES)
    inputs = tensor_inputs(loaded, next(pictures.batches(PLANTING_IMAGES, loaded.preprocess)))
    rng = random.Random(seed)
    distractors: dict[str, tuple[int, int]] = {}
    for kind in (everywhere, at_the_prefix):  # first, for they change what later neurons see
        block = rng.choice(sorted(counts))
        taken = [neuron for at, neuron in distractors.values() if at == block]
        neuron = rng.choice([n for n in range(sites.blocks[block].hidden_size) if n not in taken])
        kind(traced, sites, sites.blocks[block], neuron, inputs)
        distractors[kind.__name__] = (block, neuron)
    firing = min(2.0, OUTLIERS / sum(counts.values()))
    planted = plant(traced, sites, inputs, counts, seed=seed, firing=firing, avoid=distractors.values())
    block = rng.choice(sorted(counts))
    taken = [*planted[block], *(neuron for at, neuron in distractors.values() if at == block)]
    neuron = rng.choice([n for n in range(sites.blocks[block].hidden_size) if n not in taken])
    without_output(traced, sites.blocks[block], neuron, planted[block][0])
    distractors["without_output"] = (block, neuron)
    loaded.model.save_pretrained(folder)  # type: ignore[operator]
    return Truth({block: tuple(neurons) for block, neurons in planted.items()}, distractors)


def plant_only(folder: Path, counts: Mapping[int, int], seed: int) -> dict[int, tuple[int, ...]]:
    """Plant register neurons and nothing else into the transformers checkpoint `folder`; gated MLPs too."""
    loaded = load(str(folder))
    traced = trace(loaded)
    sites = match(traced)
    pictures = image_set(None, PLANTING_IMAGES)
    inputs = tensor_inputs(loaded, next(pictures.batches(PLANTING_IMAGES, loaded.preprocess)))
    firing = min(2.0, OUTLIERS / sum(counts.values()))
    planted = plant(traced, sites, inputs, counts, seed=seed, firing=firing)
    loaded.model.save_pretrained(folder)  # type: ignore[operator]
    return {block: tuple(neurons) for block, neurons in planted.items()}


def everywhere(traced: Traced, sites: Sites, block: Block, neuron: int, inputs: list) -> None:
    """Large at every token, twice the planted peak: adds the same vector, of the median token norm, everywhere."""
    median = _median(traced, sites, block, inputs)
    up, bias, down = _parameters(traced, block)
    up[neuron] = 0
    bias[neuron] = 2 * PEAK
    column_D = torch.randn(sites.width, generator=torch.Generator().manual_seed(neuron))
    down[:, neuron] = column_D / column_D.norm() * median / (2 * PEAK)


def at_the_prefix(traced: Traced, sites: Sites, block: Block, neuron: int, inputs: list) -> None:
    """Fires at the class token only, and writes there as much as a planted neuron writes to a patch."""
    median = _median(traced, sites, block, inputs)
    up, bias, down = _parameters(traced, block)
    _, taps = tap(traced.graph_module, {"mlp": mlp_of(traced, block).source})(*inputs)
    prefix_BD = taps["mlp"][:, 0]
    patches_ND = taps["mlp"][:, sites.num_prefix :].flatten(0, 1)
    direction_D = torch.nn.functional.normalize(prefix_BD.mean(dim=0) - patches_ND.mean(dim=0), dim=0)
    low, high = float((patches_ND @ direction_D).max()), float((prefix_BD @ direction_D).min())
    assert high > low, "no direction keeps the class token apart from the patches"
    slope = 2 * PEAK / (high - low)
    up[neuron] = slope * direction_D
    bias[neuron] = -slope * (low + high) / 2
    column_D = torch.randn(sites.width, generator=torch.Generator().manual_seed(neuron))
    down[:, neuron] = column_D / column_D.norm() * GAIN * median / PEAK


def without_output(traced: Traced, block: Block, neuron: int, planted: int) -> None:
    """Fires exactly where a planted neuron does, and writes nothing."""
    up, bias, down = _parameters(traced, block)
    up[neuron], bias[neuron] = up[planted], bias[planted]
    down[:, neuron] = 0


def _median(traced: Traced, sites: Sites, block: Block, inputs: list) -> float:
    """Median patch norm after `block`."""
    _, taps = tap(traced.graph_module, {"stream": block.output})(*inputs)
    return float(token_norms(taps["stream"])[:, sites.num_prefix :].median())


def _parameters(traced: Traced, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias of the up projection, weight of the down projection."""
    mlp = mlp_of(traced, block)
    assert mlp.value is None and mlp.gate.bias is not None, "distractors are for plain MLPs"
    weight, bias, down = (traced.graph_module.get_parameter(n) for n in (mlp.gate.weight, mlp.gate.bias, mlp.down))
    return weight, bias, down


REAL_NEURON = 417  # the one register neuron of the real ViT-Ti, in block 7


def split_real_neuron(source: Path, folder: Path, shares: Sequence[float], least_used: Sequence[int]) -> list[int]:
    """Copy timm's real ViT-Ti from `source` to `folder`, its register neuron spread over several; these, ascending.

    Each has the same input row and bias and a share of the output column. The others take the place of neurons that the
    model hardly uses: `least_used` are their ranks by the norm of the output column.
    """
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    state = load_file(source / "model.safetensors")
    up, bias, down = (state[f"blocks.7.mlp.{name}"] for name in ("fc1.weight", "fc1.bias", "fc2.weight"))
    ranks = [neuron for neuron in down.norm(dim=0).argsort().tolist() if neuron != REAL_NEURON]
    neurons = [REAL_NEURON, *(ranks[rank] for rank in least_used)]
    column = down[:, REAL_NEURON].clone()
    for neuron, share in zip(neurons, shares, strict=True):
        up[neuron], bias[neuron], down[:, neuron] = up[REAL_NEURON], bias[REAL_NEURON], column * share / sum(shares)
    save_file(state, folder / "model.safetensors")
    return sorted(neurons)
