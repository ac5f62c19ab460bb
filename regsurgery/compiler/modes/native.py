"""Native mode: recipe, sites and images -> the surgery of a stock model with register tokens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from regsurgery.compiler.graph import set_parameter
from regsurgery.compiler.located import Located
from regsurgery.compiler.match import match
from regsurgery.compiler.modes.calibrate import PASS_IMAGES, STEPS, Loss, calibrate, divided, with_crops
from regsurgery.compiler.modes.closed_form import MARKER_NORMS, FirstLook, Native, NativeModel, closed_form
from regsurgery.compiler.modes.operation import BATCH, Operation
from regsurgery.compiler.passes.plan import plan_surgery
from regsurgery.compiler.surgery import Surgery, check_fit, common_block
from regsurgery.compiler.trace import trace
from regsurgery.images.image_set import ImageSet
from regsurgery.recipe import Recipe


def operate(operation: Operation) -> Surgery:
    """The closed form, plus calibration if it is wanted and helps.

    Raises:
        RecipeError: a block or neuron of the recipe does not exist in the model.
        UnsupportedModelError: the model's MLPs cannot be edited like this, or the register cannot be told apart.
    """
    located, recipe, progress = operation.located, operation.recipe, operation.progress
    check_fit(recipe, located.sites)
    fit = operation.fit_images
    pixels = torch.cat(list(fit.batches(BATCH, located.loaded.preprocess)))
    model = NativeModel(located, recipe)
    training, held_out = divided(len(pixels), operation.seed)
    progress.stage("closed form", len(MARKER_NORMS))
    train, unseen = pixels[training].split(BATCH), pixels[held_out].split(PASS_IMAGES)
    loss, *look = model.side_by_side([partial(Loss, model, pixels), *FirstLook.calls(model, train)], len(pixels))
    drift = partial(loss.means_behind, held_out)
    native = closed_form(model, train, unseen, FirstLook(*look), drift, progress=progress.advance)
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
    if operation.calibrate:
        native, facts["calibration"] = _calibrated(operation, model, native, pixels, (training, held_out))
    plan = plan_surgery(located.sites, recipe)
    sizes = {"width": located.sites.width, "num_prefix": located.sites.num_prefix}
    block = {**common_block(located.loaded, recipe, plan), **sizes, "fit": facts}
    return _edited_surgery(located, recipe, model.graph_module, native.parameters, block)


def _calibrated(
    operation: Operation, model: NativeModel, native: Native, pixels: Tensor, division: tuple[Tensor, Tensor]
) -> tuple[Native, dict[str, Any]]:
    """`native` after calibration, or unchanged if that does not help; and what happened."""
    training, held_out = division
    stop_after, progress = operation.stop_after, operation.progress
    pixels, training = with_crops(pixels, training, operation.seed)
    progress.stage("calibration", STEPS if stop_after is None else stop_after)
    calibrated = calibrate(
        model,
        native,
        Loss(model, pixels),
        (training, held_out),
        seed=operation.seed,
        stop_after=stop_after,
        progress=progress,
    )
    steps, outcome = calibrated.steps, f"{calibrated.steps} steps kept"
    found: dict[str, Any] = {"loss_before": calibrated.before, "loss_after": calibrated.after}
    if calibrated.stopped_after is not None:
        found["stopped_after"] = calibrated.stopped_after
    check = operation.check
    if check is not None and steps:
        found["check"] = _checked_on(check, model, native, calibrated.native)
        values = f"{found['check']['loss_before']:.4f} -> {found['check']['loss_after']:.4f}"
        if found["check"]["loss_after"] >= found["check"]["loss_before"]:
            steps, outcome = 0, f"not on {check.note}: {values}; the closed form is kept"
        else:
            outcome = f"{steps} steps kept; on {check.note} {values}"
    progress.say(f"calibration: loss on held-out images {calibrated.before:.4f} -> {calibrated.after:.4f} ({outcome})")
    return calibrated.native if steps else native, {"steps": steps, **found}


def _checked_on(check: ImageSet, model: NativeModel, native: Native, trained: Native) -> dict[str, Any]:
    """The loss of the closed form and of the trained weights on `check`."""
    pixels = torch.cat(list(check.batches(BATCH, model.loaded.preprocess)))
    loss, every = Loss(model, pixels), torch.arange(len(pixels))
    return {
        "images": check.note,
        "loss_before": loss.mean(every, native.parameters),
        "loss_after": loss.mean(every, trained.parameters),
    }


def restored_native(located: Located, recipe: Recipe, state: Mapping[str, Tensor]) -> Surgery:
    """The surgery of a native-mode program, from its tensors `state`."""
    graph_module = NativeModel(located, recipe).graph_module
    edit = {name: state[name] for name, _ in graph_module.named_parameters() if name in state}
    return _edited_surgery(located, recipe, graph_module, edit, {})


def at_size(surgery: Surgery, size: tuple[int, int]) -> Surgery:
    """The same native surgery, traced at another image size (height, width)."""
    traced = trace(surgery.loaded, size)
    located = Located(surgery.loaded, traced, match(traced))
    graph_module = NativeModel(located, surgery.recipe).graph_module
    return _edited_surgery(located, surgery.recipe, graph_module, surgery.edit, surgery.config_block)


def _edited_surgery(
    located: Located,
    recipe: Recipe,
    graph_module: fx.GraphModule,
    edit: Mapping[str, Tensor],
    config_block: dict[str, Any],
) -> Surgery:
    for name, value in edit.items():
        set_parameter(graph_module, name, nn.Parameter(value, requires_grad=False))
    return Surgery(located, recipe, plan_surgery(located.sites, recipe), graph_module, config_block, edit=dict(edit))
