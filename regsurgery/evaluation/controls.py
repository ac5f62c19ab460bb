"""Task `controls`: is it these neurons, and does the register matter?

Jiang et al., arXiv 2506.08010: other neurons must have no effect, and clearing the register neurons without a register
to take their values must do harm.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regsurgery.compiler.comparison import main_output
from regsurgery.compiler.outliers import outliers, token_norms
from regsurgery.compiler.passes.pipeline import apply_passes
from regsurgery.compiler.passes.plan import plan_surgery
from regsurgery.errors import UserError
from regsurgery.evaluation.fidelity import drift, shared_output
from regsurgery.evaluation.result import Result
from regsurgery.interval import Figures, Values
from regsurgery.recipe import Recipe
from regsurgery.verification.observing import Observation, Observer, Subject
from regsurgery.verification.pair import Pair
from regsurgery.verification.side import Side

if TYPE_CHECKING:
    from regsurgery.images.image_set import ImageSet
    from regsurgery.progress import Progress

PATCHED, PAPER, RANDOM, ZEROED = "patched", "paper's setting", "random neurons", "zeroed, no register"


def evaluate(pair: Pair, images: ImageSet, *, progress: Progress, seed: int, draws: int = 3) -> Result:
    """The patched model, and controls made from the original: the paper's setting (the smallest set of neurons, one
    register), if `find` chose another; the same number of random neurons of the same blocks, shifted onto the same
    number of registers (mean over the draws); and the register neurons cleared on all tokens without any register.

    Outlier tokens are counted after the last block but one, above 5 times the median.

    Args:
        draws: number of sets of random neurons.

    Raises:
        UserError: there are no register neurons to compare with.
    """
    if pair.recipe is None or not pair.recipe.register_neurons:
        raise UserError(f"{pair.folder}: has no register neurons to compare random ones with; give a patched folder")
    if draws < 1:
        raise UserError(f"{draws} draws of random neurons: give at least one")
    chosen = pair.recipe.register_neurons
    drawn = _drawn(pair, chosen, random.Random(seed), draws)
    probe = pair.sites.probe_block
    observe = pair.observer(blocks=(probe,), what=("blocks",), outputs=True)
    paper, count = pair.recipe.papers_setting(), pair.recipe.num_registers
    controls = {
        **({} if paper is None else {PAPER: [_observer(pair, paper)]}),
        RANDOM: [_observer(pair, Recipe(neurons, num_registers=count, scale=(1.0,) * count)) for neurons in drawn],
        ZEROED: [_observer(pair, Recipe(chosen, num_registers=0, scale=(), fill="zero", prefix="fill"))],
    }
    figures = Figures(seed)
    progress.stage("controls", images.num_images)
    for batch in pair.batches(images):
        original, patched = observe(batch.pixels)
        main = shared_output(pair, original.outputs, patched.outputs)
        before_B = _outliers(original, probe)
        looked = {PATCHED: [patched], **{name: [one(batch.pixels) for one in ones] for name, ones in controls.items()}}
        values: list[tuple[str, Values]] = []
        for name, seen in looked.items():
            where = (("control", name),)
            after_B = _mean_of([_outliers(one, probe) for one in seen])
            own = main if name == PATCHED else main_output(tuple(original.outputs))
            moved = [drift(own, original.outputs, one.outputs) for one in seen]
            values.append(("outliers per image", Values(before_B, after_B, where)))
            values += [(figure, Values(None, _mean_of([one[figure] for one in moved]), where)) for figure in moved[0]]
        figures.add(len(batch.pixels), values)
        progress.advance(len(batch.pixels))
    listed = [{str(block): list(neurons) for block, neurons in neurons.items()} for neurons in drawn]
    return Result(figures.rows(), details={"random_neurons": listed})


def _drawn(
    pair: Pair, chosen: Mapping[int, Sequence[int]], rng: random.Random, draws: int
) -> list[dict[int, tuple[int, ...]]]:
    """`draws` sets of as many neurons of the same blocks, excluding the chosen ones."""
    sets = []
    for _ in range(draws):
        neurons: dict[int, tuple[int, ...]] = {}
        for block, own in chosen.items():
            others = sorted(set(range(pair.sites.blocks[block].hidden_size)) - set(own))
            neurons[block] = tuple(sorted(rng.sample(others, min(len(own), len(others)))))
        sets.append(neurons)
    return sets


def _observer(pair: Pair, recipe: Recipe) -> Observer:
    """An observer of the original with `recipe` applied, like the pair's."""
    plan = plan_surgery(pair.sites, recipe)
    graph_module, _ = apply_passes(pair.traced, plan)
    side = Side(pair.loaded, graph_module, pair.sites, *pair.sites.patched(plan.num_registers))
    subject = Subject(side, "shift", pair.traced.image_size, side.patches, side.registers)
    return Observer(subject, blocks=(pair.sites.probe_block,), what=("blocks",), outputs=True)


def _outliers(seen: Observation, block: int) -> Tensor:
    return outliers(token_norms(seen.patches(block))).sum(dim=1).double()


def _mean_of(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(values)).mean(dim=0)
