"""Bias mode: constants in attention instead of register tokens."""

from __future__ import annotations

import torch

from regsurgery.compiler.modes.operation import BATCH, Operation
from regsurgery.compiler.passes.pipeline import apply_passes
from regsurgery.compiler.passes.plan import plan_surgery
from regsurgery.compiler.surgery import Surgery, perform
from regsurgery.compiler.taps import tap
from regsurgery.compiler.trace import tensor_inputs


@torch.no_grad()
def operate(operation: Operation) -> Surgery:
    """Clear the neurons, and give every head one constant key and value.

    They are stored as the row of attention input that produces them: the mean over the images of the register's input
    there after the exact shift. Projections are linear, so its key and value are the means of the register's. Jiang
    et al., arXiv 2506.08010, "attention bias".

    Raises:
        RecipeError: a block or neuron of the recipe does not exist in the model.
        UnsupportedModelError: the projections of an attention do not read a common norm.
    """
    recipe, located = operation.recipe, operation.located
    sites = located.sites
    surgery = perform(located, recipe)
    blocks = surgery.plan.constant_blocks
    shifted, _ = apply_passes(located.traced, plan_surgery(sites, recipe.as_single_shift()))
    nodes = {str(block): sites.blocks[block].attention_input for block in blocks}
    tapped = tap(shifted, nodes, early_exit=True)
    _, registers = sites.patched(1)
    sums_LD, num_images = torch.zeros(len(blocks), sites.width, dtype=torch.float64), 0
    for batch in operation.fit_images.batches(BATCH, located.loaded.preprocess):
        _, taps = tapped(*tensor_inputs(located.loaded, batch))
        sums_LD += torch.stack([taps[name][:, registers].double().sum(dim=(0, 1)).cpu() for name in nodes])
        num_images += len(batch)
    if blocks:
        constants_LD = surgery.graph_module.get_parameter(surgery.added_name)
        constants_LD.copy_(sums_LD / num_images)
    operation.progress.say(
        f"bias: {len(blocks)} attentions with a constant key and value, averaged over {num_images} images"
    )
    return surgery
