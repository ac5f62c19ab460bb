"""Calibration of native mode: a few vectors learn, without labels, to give back the original's own outputs.

Only the register tokens and the register neurons' output columns are trained; every other weight stays. The loss is the
KL divergence from the original's classes where the model has logits, else what is missing to 1 of the cosines of its
main output and of the patches that were no outliers. Images that were held out decide when to stop, and whether
anything was gained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from regsurgery.comparison import Run, kl_divergence, main_output, output_cosine, probe_nodes
from regsurgery.families import LOGIT_OUTPUTS
from regsurgery.native import Native, NativeModel
from regsurgery.statistics import outliers, tap, token_norms
from regsurgery.trace import tensor_inputs

# Rates of Adam at the beginning; they fall to 0 on a cosine.
REGISTER_RATE = 0.02  # for the register tokens, in their root mean square
MIN_REGISTER_RATE = 0.05
COLUMN_RATE = 0.02  # for the output columns
STEPS = 60
STEP_IMAGES = 24  # images behind one step
PASS_IMAGES = 8  # of them, through the model at a time
CHECK_EVERY = 10  # steps between two looks at the held-out images
PATIENCE = 2  # looks without a gain before it stops
HELD_OUT = 0.2  # share of the images


@dataclass(frozen=True)
class Calibrated:
    """What calibration gained.

    Attributes:
        native: the better of the closed form and the trained weights.
        before, after: the loss on the held-out images.
        steps: how many steps the kept weights had; 0 where nothing was gained.
    """

    native: Native
    before: float
    after: float
    steps: int


def calibrate(
    model: NativeModel,
    native: Native,
    images: Tensor,
    *,
    seed: int,
    progress: Callable[[int], None] = lambda steps: None,
) -> Calibrated:
    """Train on `images` `[B, 3, H, W]`, a fifth of which is held out.

    Args:
        progress: called with the number of steps just done.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    num_held_out = max(1, round(HELD_OUT * len(images)))
    held_out, training = order[:num_held_out], order[num_held_out:]
    loss = _Loss(model, images)
    trained = _Trained(model, native)

    @torch.no_grad()
    def validate() -> float:
        parameters = trained.parameters()
        losses = [len(chunk) * float(loss(chunk, parameters)) for chunk in held_out.split(PASS_IMAGES)]
        return sum(losses) / num_held_out

    size = float(trained.register_tokens.detach().square().mean().sqrt())
    optimiser = torch.optim.Adam(
        [
            {"params": [trained.register_tokens], "lr": max(MIN_REGISTER_RATE, REGISTER_RATE * size)},
            {"params": list(trained.columns.values()), "lr": COLUMN_RATE},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    before = after = validate()
    best, kept, queue = native, 0, torch.empty(0, dtype=torch.int64)
    for step in range(1, STEPS + 1):
        if len(queue) < min(STEP_IMAGES, len(training)):
            queue = torch.cat((queue, training[torch.randperm(len(training), generator=generator)]))
        chosen, queue = queue[:STEP_IMAGES], queue[STEP_IMAGES:]
        optimiser.zero_grad()
        for chunk in chosen.split(PASS_IMAGES):
            (loss(chunk, trained.parameters()) * len(chunk) / len(chosen)).backward()
        optimiser.step()
        schedule.step()
        progress(1)
        if step % CHECK_EVERY:
            continue
        value = validate()
        if value < after:
            best, after, kept = replace(native, parameters=trained.parameters(detached=True)), value, step
        elif step >= kept + PATIENCE * CHECK_EVERY:
            break
    return Calibrated(best, before, after, kept)


class _Trained:
    """The leaves that are trained, in float32, and the parameters that they make."""

    def __init__(self, model: NativeModel, native: Native) -> None:
        self.model, self.native = model, native
        self.register_tokens = native.parameters[model.register_name].detach().float().clone().requires_grad_()
        self.columns = {
            block: model.parameter(native.parameters, mlp.down)[:, list(neurons)].float().clone().requires_grad_()
            for (block, neurons), mlp in zip(model.recipe.register_neurons.items(), model.mlps.values(), strict=True)
        }

    def parameters(self, *, detached: bool = False) -> dict[str, Tensor]:
        """Every changed parameter of the model, in its own dtype."""
        changed = dict(self.native.parameters)
        name = self.model.register_name
        changed[name] = self.register_tokens.to(changed[name].dtype)
        for block, neurons in self.model.recipe.register_neurons.items():
            down = self.model.mlps[block].down
            base_DH = self.model.parameter(self.native.parameters, down)
            index_K = torch.tensor(neurons, device=base_DH.device)
            changed[down] = base_DH.index_copy(1, index_K, self.columns[block].to(base_DH.dtype))
        return {name: value.detach().clone() for name, value in changed.items()} if detached else changed


class _Loss:
    """Distance of the edited model's outputs from the original's, which are computed once."""

    def __init__(self, model: NativeModel, images: Tensor) -> None:
        self.model, self.images = model, images
        self.main = main_output(model.traced.output_names)
        self.edited = _frozen(tap(model.graph_module, probe_nodes(model.sites)))
        original = tap(model.traced.graph_module, probe_nodes(model.sites))
        parts = []
        with torch.no_grad():
            for batch in images.split(PASS_IMAGES):
                parts.append(self._kept(*original(*tensor_inputs(model.loaded, batch))))
        self.original = [torch.cat(part) for part in zip(*parts, strict=True)]

    def _kept(self, outputs: Mapping[str, Tensor], taps: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What of a run the loss needs, one row an image."""
        if self.main in LOGIT_OUTPUTS:
            return (outputs[self.main],)
        patches = self.model.sites.patches
        inliers_BN = ~outliers(token_norms(taps["probe"])[:, patches])
        return outputs[self.main], taps["last"][:, patches], inliers_BN

    def __call__(self, chosen: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Mean over the images numbered `chosen`."""
        run: Run = self.model.run(self.edited, parameters, self.images[chosen])
        new_output = run[0][self.main]
        original = [part[chosen.to(part.device)] for part in self.original]
        if self.main in LOGIT_OUTPUTS:
            return kl_divergence(original[0], new_output).mean()
        output, patches_BND, inliers_BN = original
        patches, _ = self.model.sites.patched(self.model.recipe.num_registers)
        cosine_BN = F.cosine_similarity(patches_BND.float(), run[1]["last"][:, patches].float(), dim=-1)
        cosine_B = output_cosine(output, new_output)
        return 2 - cosine_BN[inliers_BN].mean() - cosine_B.mean()


def _frozen(graph_module: fx.GraphModule) -> fx.GraphModule:
    """`graph_module`, a tap, without gradients of its own parameters; those of graphs that it shares them with stay."""
    for module in graph_module.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)
    return graph_module
