"""Modes whose weights are fitted on images: recipe, sites and images -> the surgery."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from regsurgery.calibration import ImageSet
from regsurgery.distill import STEPS, Drift, calibrate, divided, with_crops
from regsurgery.graph import set_parameter
from regsurgery.loading import Loaded
from regsurgery.match import match
from regsurgery.native import MARKER_NORMS, Native, NativeModel, closed_form
from regsurgery.passes import apply_passes
from regsurgery.passes.plan import plan_surgery
from regsurgery.recipe import Recipe
from regsurgery.sites import Sites
from regsurgery.statistics import tap
from regsurgery.surgery import Surgery, check_fit, common_block, perform
from regsurgery.trace import Traced, tensor_inputs, trace

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
    check: ImageSet | None = None,
    stop_after: int | None = None,
    seed: int,
    progress: Progress,
) -> Surgery:
    """Native mode: the closed form, and calibration where it is wanted and pays.

    Args:
        check: keep what calibration gained only where it gains on these images, of another kind than `images`, too.
        stop_after: end calibration after that many steps, as an interrupt does.

    Raises:
        RecipeError: a block or neuron of the recipe does not exist in the model.
        UnsupportedModelError: the model's MLPs cannot be edited so, or the register cannot be told apart.
    """
    check_fit(recipe, sites)
    fit = images.some(FIT_IMAGES)
    pixels = torch.cat(list(fit.batches(BATCH, loaded.preprocess)))
    model = NativeModel(loaded, traced, sites, recipe)
    drift = Drift(model, pixels)
    training, held_out = divided(len(pixels), seed)
    progress.stage("closed form", len(MARKER_NORMS))
    train, unseen = pixels[training].split(BATCH), pixels[held_out].split(BATCH)
    native = closed_form(model, train, unseen, partial(drift.mean, held_out), progress=progress.advance)
    facts: dict[str, Any] = {
        "images": fit.note,
        "num_images": len(pixels),
        "margin": native.margin,
        "marker_norm": native.marker_norm,
        "calibration": None,
    }
    progress.say(
        f"native: margin {native.margin:.2f}, marker norm {native.marker_norm:.1f}, from {facts['num_images']} images"
    )
    if calibration:
        pixels, training = with_crops(pixels, training, seed)
        drift = Drift(model, pixels)
        progress.stage("calibration", STEPS if stop_after is None else stop_after)
        calibrated = calibrate(
            model,
            native,
            drift,
            training,
            held_out,
            seed=seed,
            stop_after=stop_after,
            progress=progress.advance,
            say=progress.say,
        )
        steps, outcome = calibrated.steps, f"{calibrated.steps} steps kept"
        found: dict[str, Any] = {"loss_before": calibrated.before, "loss_after": calibrated.after}
        if calibrated.stopped_after is not None:
            found["stopped_after"] = calibrated.stopped_after
        if check is not None and steps:
            found["check"] = _checked_on(check, model, native, calibrated.native)
            values = f"{found['check']['loss_before']:.4f} -> {found['check']['loss_after']:.4f}"
            if found["check"]["loss_after"] >= found["check"]["loss_before"]:
                steps, outcome = 0, f"not on {check.note}: {values}; the closed form is kept"
            else:
                outcome = f"{steps} steps kept; on {check.note} {values}"
        if steps:
            native = calibrated.native
        facts["calibration"] = {"steps": steps, **found}
        progress.say(
            f"calibration: loss on held-out images {calibrated.before:.4f} -> {calibrated.after:.4f} ({outcome})"
        )
    plan = plan_surgery(sites, recipe)
    block = {**common_block(loaded, recipe, plan), "width": sites.width, "num_prefix": sites.num_prefix, "fit": facts}
    return _edited_surgery(loaded, recipe, traced, sites, model.graph_module, native.parameters, block)


def _checked_on(check: ImageSet, model: NativeModel, native: Native, trained: Native) -> dict[str, Any]:
    """The loss of the closed form and of the trained weights on `check`."""
    pixels = torch.cat(list(check.batches(BATCH, model.loaded.preprocess)))
    drift, every = Drift(model, pixels), torch.arange(len(pixels))
    return {
        "images": check.note,
        "loss_before": drift.mean(every, native.parameters),
        "loss_after": drift.mean(every, trained.parameters),
    }


@torch.no_grad()
def perform_bias(
    loaded: Loaded, recipe: Recipe, traced: Traced, sites: Sites, images: ImageSet, *, progress: Progress
) -> Surgery:
    """Mode bias: the neurons cleared, and for every head one constant key and value.

    They are given as the row of attention input that makes them: the mean over the images of what the register has
    there after the exact shift. Projections are linear, so its key and value are the means of the register's. Jiang
    et al., arXiv 2506.08010, "attention bias".

    Raises:
        RecipeError: a block or neuron of the recipe does not exist in the model.
        UnsupportedModelError: an attention whose projections read no common norm.
    """
    surgery = perform(loaded, recipe, traced, sites)
    blocks = surgery.plan.constant_blocks
    fit = images.some(FIT_IMAGES)
    shifted, _ = apply_passes(traced, plan_surgery(sites, recipe.as_single_shift()))
    nodes = {str(block): sites.blocks[block].attention_input for block in blocks}
    tapped = tap(shifted, nodes, early_exit=True)
    _, registers = sites.patched(1)
    sums_LD, num_images = torch.zeros(len(blocks), sites.width, dtype=torch.float64), 0
    for batch in fit.batches(BATCH, loaded.preprocess):
        _, taps = tapped(*tensor_inputs(loaded, batch))
        sums_LD += torch.stack([taps[name][:, registers].double().sum(dim=(0, 1)).cpu() for name in nodes])
        num_images += len(batch)
    if blocks:
        constants_LD = surgery.graph_module.get_parameter(surgery.added_name)
        constants_LD.copy_(sums_LD / num_images)
    progress.say(f"bias: {len(blocks)} attentions with a constant key and value, means over {num_images} images")
    return surgery


def restored_native(
    loaded: Loaded, recipe: Recipe, traced: Traced, sites: Sites, state: Mapping[str, Tensor]
) -> Surgery:
    """The surgery behind a program of native mode, whose tensors `state` has."""
    graph_module = NativeModel(loaded, traced, sites, recipe).graph_module
    edit = {name: state[name] for name, _ in graph_module.named_parameters() if name in state}
    return _edited_surgery(loaded, recipe, traced, sites, graph_module, edit, {})


def at_size(surgery: Surgery, size: tuple[int, int]) -> Surgery:
    """The same native surgery, traced at another image size (height, width)."""
    traced = trace(surgery.loaded, size)
    sites = match(traced)
    graph_module = NativeModel(surgery.loaded, traced, sites, surgery.recipe).graph_module
    return _edited_surgery(
        surgery.loaded, surgery.recipe, traced, sites, graph_module, surgery.edit, surgery.config_block
    )


def _edited_surgery(
    loaded: Loaded,
    recipe: Recipe,
    traced: Traced,
    sites: Sites,
    graph_module: fx.GraphModule,
    edit: Mapping[str, Tensor],
    config_block: dict[str, Any],
) -> Surgery:
    for name, value in edit.items():
        set_parameter(graph_module, name, nn.Parameter(value, requires_grad=False))
    return Surgery(
        loaded, recipe, traced, sites, plan_surgery(sites, recipe), graph_module, config_block, edit=dict(edit)
    )
