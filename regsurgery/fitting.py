"""Modes whose weights are fitted on images: recipe, sites and images -> the surgery."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from regsurgery.calibration import ImageSet
from regsurgery.distill import STEPS, calibrate
from regsurgery.graph import set_parameter
from regsurgery.loading import Loaded
from regsurgery.native import NativeModel, closed_form
from regsurgery.passes.plan import plan_surgery
from regsurgery.recipe import Recipe
from regsurgery.sites import Sites
from regsurgery.surgery import Surgery, check_fit, common_block
from regsurgery.trace import Traced

if TYPE_CHECKING:
    from regsurgery.pipeline import Progress

FIT_IMAGES = 128  # at most that many images, of more evenly spread ones
BATCH = 8


def perform_native(
    loaded: Loaded,
    recipe: Recipe,
    traced: Traced,
    sites: Sites,
    images: ImageSet,
    *,
    calibration: bool,
    seed: int,
    progress: Progress,
) -> Surgery:
    """Native mode: the closed form, and calibration where it is wanted and pays.

    Raises:
        RecipeError: a block or neuron of the recipe does not exist in the model.
        UnsupportedModelError: the model's MLPs cannot be edited so, or the register cannot be told apart.
    """
    check_fit(recipe, sites)
    fit = images.some(FIT_IMAGES)
    batches = list(fit.batches(BATCH, loaded.preprocess))
    model = NativeModel(loaded, traced, sites, recipe)
    native = closed_form(model, batches)
    facts = {"images": fit.note, "num_images": sum(map(len, batches)), "margin": native.margin,
             "marker_norm": native.marker_norm}  # fmt: skip
    progress.say(f"native: margin {native.margin:.2f}, marker norm {native.marker_norm:.1f}, {fit.note}")
    if calibration:
        progress.stage("calibration", STEPS)
        calibrated = calibrate(model, native, torch.cat(batches), seed=seed, progress=progress.advance)
        native = calibrated.native
        facts["calibration"] = {
            "steps": calibrated.steps,
            "loss_before": calibrated.before,
            "loss_after": calibrated.after,
        }
        progress.say(
            f"calibration: loss on held-out images {calibrated.before:.4f} -> {calibrated.after:.4f} "
            f"({calibrated.steps} steps kept)"
        )
    for name, value in native.parameters.items():
        set_parameter(model.graph_module, name, nn.Parameter(value, requires_grad=False))
    block = {**common_block(loaded, recipe), "width": sites.width, "num_prefix": sites.num_prefix, "native": facts}
    return Surgery(
        loaded,
        recipe,
        traced,
        sites,
        plan_surgery(sites, recipe),
        model.graph_module,
        block,
        edit=native.parameters,
    )
