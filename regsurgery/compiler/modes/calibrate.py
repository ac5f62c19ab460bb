"""Calibration of native mode: a few vectors learn, without labels, to reproduce the original's own outputs.

Only what the register neurons write onto the register tokens is trained: one vector for every edited block, which goes
into their output columns; every other weight stays. Nothing before the first edited block changes, so its input is
computed once. The loss is the KL divergence from the original's classes if the model has logits, otherwise (1 - cosine)
of its main output and of the patches that were not outliers. Held-out images decide which weights are kept, and whether
anything was gained.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from regsurgery.compiler.comparison import (
    Run,
    has_classes,
    kl_divergence,
    main_output,
    moved,
    patch_cosines,
    probe_nodes,
)
from regsurgery.compiler.graph import starting_at
from regsurgery.compiler.modes.closed_form import Changed, Native, NativeModel, without_states
from regsurgery.compiler.outliers import outliers, token_norms
from regsurgery.compiler.taps import tap
from regsurgery.progress import Progress

RATE = 0.03  # of Adam, in units of the root mean square of what a block's neurons write; cosine decay to 0
STEPS = 60
STEP_IMAGES = 24  # images per step
PASS_IMAGES = 8  # images per forward pass
CHECK_EVERY = 10  # steps between two checks on the held-out images
# Training ends at a check whose loss is that many times the closed form's, if no earlier one was better. ViT-Ti, 42
# images: 0.0018 before, 0.0039 after 10 steps, 0.0044 after 20, and 0.0035 at the end.
HOPELESS = 2.0
HELD_OUT = 0.2  # share of the images
# Also train on crops of every image. ViT-Ti, 75 images, loss in training and on unseen photos: 0.0037 and 0.0090
# without, 0.0057 and 0.0076 with them (one register), 0.0029 and 0.0072, 0.0053 and 0.0060 (four).
CROPS = 3
SMALLEST_CROP = 0.6  # of a side


@dataclass(frozen=True)
class Calibrated:
    """The result of calibration.

    Attributes:
        native: the better of the closed form and the trained weights.
        before, after: the loss on the held-out images.
        steps: training steps of the kept weights; 0 if nothing was gained.
        stopped_after: how many steps were run, if an interrupt or the caller ended it early; else None.
    """

    native: Native
    before: float
    after: float
    steps: int
    stopped_after: int | None = None


def divided(num_images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the images to train on, and of those held out: a fifth, at least one."""
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
    num_held_out = max(1, round(HELD_OUT * num_images))
    return order[num_held_out:], order[:num_held_out]


def with_crops(images: Tensor, training: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """`images` `[N, 3, H, W]`, followed by `CROPS` random crops of each one numbered `training`, half of them mirrored,
    at the size of the images; and the numbers of everything to train on.
    """
    generator = torch.Generator().manual_seed(seed)
    size = images.shape[-2:]
    crops = []
    for number in training.repeat(CROPS).tolist():
        share, top, left, mirrored = torch.rand(4, generator=generator).tolist()
        share = SMALLEST_CROP + (1 - SMALLEST_CROP) * share
        height, width = (round(share * side) for side in size)
        top, left = round(top * (size[0] - height)), round(left * (size[1] - width))
        crop = images[number : number + 1, :, top : top + height, left : left + width]
        crop = F.interpolate(crop.float(), size, mode="bicubic", antialias=True).to(images)
        crops.append(crop.flip(-1) if mirrored < 0.5 else crop)
    return torch.cat((images, *crops)), torch.cat((training, torch.arange(len(images), len(images) + len(crops))))


def calibrate(
    model: NativeModel,
    native: Native,
    loss: Loss,
    division: tuple[Tensor, Tensor],
    *,
    seed: int,
    stop_after: int | None = None,
    progress: Progress,
) -> Calibrated:
    """Train on some images of `loss`; the others choose the weights.

    A KeyboardInterrupt ends the training; the best weights so far are returned.

    Args:
        division: the numbers of the images to train on, and of those that choose.
        stop_after: end after that many steps, as an interrupt would.
        progress: is told every step, the expected time after the first one, and an interrupt.
    """
    training, held_out = division
    generator = torch.Generator().manual_seed(seed)
    loss = loss.behind(min(model.mlps), native.parameters)
    trained = _Trained(model, native)
    optimiser = torch.optim.Adam(trained.groups())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    began = time.monotonic()
    before = loss.mean(held_out, native.parameters)
    checking = time.monotonic() - began
    best = Calibrated(native, before, before, 0)
    queue, done, last = torch.empty(0, dtype=torch.int64), 0, STEPS if stop_after is None else stop_after
    try:
        for step in range(1, last + 1):
            began = time.monotonic()
            if len(queue) < min(STEP_IMAGES, len(training)):
                queue = torch.cat((queue, training[torch.randperm(len(training), generator=generator)]))
            chosen, queue = queue[:STEP_IMAGES], queue[STEP_IMAGES:]
            optimiser.zero_grad()
            for chunk in chosen.split(PASS_IMAGES):
                (loss(chunk, trained.parameters()).sum() / len(chosen)).backward()
            optimiser.step()
            schedule.step()
            progress.advance(1)
            if step == 1:
                took = _duration(STEPS * (time.monotonic() - began) + STEPS / CHECK_EVERY * checking)
                progress.say(f"calibration: {last} steps, about {took} here; Ctrl-C keeps the best weights so far")
            checked = best
            if step % CHECK_EVERY == 0:
                parameters = trained.parameters(detached=True)
                value = loss.mean(held_out, parameters)
                if value < best.after:
                    checked = Calibrated(replace(native, parameters=parameters), before, value, step)
                if value > HOPELESS * before and not best.steps:
                    progress.say(f"calibration: ended after {step} steps, which made the closed form worse")
                    return best
            best, done = checked, step  # set together: running `done` steps again must give `best`
    except KeyboardInterrupt:
        progress.say(
            f"calibration: interrupted after {done} of {last} steps; the weights after step {best.steps} are kept"
        )
    return replace(best, stopped_after=done if done < STEPS else None)


def _duration(seconds: float) -> str:
    whole = max(1, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


class _Trained:
    """The trained vectors, float32 `[D]` for every edited block, and the parameters made from them."""

    def __init__(self, model: NativeModel, native: Native) -> None:
        self.model, self.native = model, native
        self.added = {
            block: torch.zeros(model.sites.width, device=activations_K.device, requires_grad=True)
            for block, activations_K in native.activations.items()
        }

    def groups(self) -> list[dict]:
        """Parameter groups of an optimiser; each rate is proportional to how much the block's neurons write."""
        groups = []
        for block, added_D in self.added.items():
            columns_DK = self._columns(block).double()
            written_D = columns_DK @ self.native.activations[block].to(columns_DK)
            groups.append({"params": [added_D], "lr": RATE * float(written_D.square().mean().sqrt())})
        return groups

    def _columns(self, block: int) -> Tensor:
        neurons = list(self.model.recipe.register_neurons[block])
        return self.model.parameter(self.native.parameters, self.model.mlps[block].down)[:, neurons]

    def parameters(self, *, detached: bool = False) -> dict[str, Tensor]:
        """Every changed parameter of the model, in its own dtype."""
        changed = dict(self.native.parameters)
        for block, neurons in self.model.recipe.register_neurons.items():
            down = self.model.mlps[block].down
            base_DH, added_D = self.model.parameter(self.native.parameters, down), self.added[block]
            activations_K = self.native.activations[block].to(added_D)
            columns_DK = self._columns(block).float()
            columns_DK = columns_DK + added_D[:, None] * (activations_K / activations_K.square().sum())
            index_K = torch.tensor(neurons, device=base_DH.device)
            changed[down] = base_DH.index_copy(1, index_K, columns_DK.to(base_DH.dtype))
        return {name: value.detach().clone() for name, value in changed.items()} if detached else changed


class Loss:
    """Distance of the edited model's outputs from the original's (computed once), on `images` `[N, 3, H, W]`.

    Attributes:
        images: the images it is measured on, referred to by number.
    """

    def __init__(self, model: NativeModel, images: Tensor) -> None:
        self.model, self.images = model, images
        self.main = main_output(model.traced.output_names)
        self.edited = _frozen(tap(model.graph_module, probe_nodes(model.sites)))
        self.entering: Tensor | None = None
        original = tap(model.traced.graph_module, probe_nodes(model.sites))
        with torch.no_grad():
            (runs,) = model.run_all(original, [({}, without_states(images.split(PASS_IMAGES)))])
            parts = [self._kept(*run) for run in runs]
        self.original = [torch.cat(part) for part in zip(*parts, strict=True)]

    @torch.no_grad()
    def behind(self, block: int, parameters: Mapping[str, Tensor]) -> Loss:
        """The same, with the input of `block` computed once; parameters of earlier blocks stay as in `parameters`."""
        if block == 0:
            return self
        entrance = self.model.sites.blocks[block - 1].output
        head = tap(self.model.graph_module, {"entering": entrance}, early_exit=True)
        cached = copy.copy(self)
        cached.edited = starting_at(self.edited, entrance)
        (runs,) = self.model.run_all(head, [(parameters, without_states(self.images.split(PASS_IMAGES)))])
        cached.entering = torch.cat([taps["entering"] for _, taps in runs])
        return cached

    def _kept(self, outputs: Mapping[str, Tensor], taps: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The part of a run that the loss needs, one row per image."""
        if has_classes(self.main, outputs[self.main]):
            return (outputs[self.main],)
        patches = self.model.sites.patches
        inliers_BN = ~outliers(token_norms(taps["probe"])[:, patches])
        return outputs[self.main], taps["last"][:, patches], inliers_BN

    def __call__(self, chosen: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The loss for each image numbered `chosen`, `[B]`."""
        images, *states = self._inputs(chosen)
        return self._distance(chosen, self.model.run(self.edited, parameters, images, *states))

    def _inputs(self, chosen: Tensor) -> tuple[Tensor, ...]:
        states = () if self.entering is None else (self.entering[chosen.to(self.entering.device)],)
        return (self.images[chosen], *states)

    def _distance(self, chosen: Tensor, run: Run) -> Tensor:
        new_output = run[0][self.main]
        original = [part[chosen.to(part.device)] for part in self.original]
        if has_classes(self.main, new_output):
            return kl_divergence(original[0], new_output)
        output, patches_BND, inliers_BN = original
        patches, _ = self.model.sites.patched(self.model.recipe.num_registers)
        cosine_BN = patch_cosines(patches_BND, run[1]["last"][:, patches])
        return moved(self.main, output, new_output, cosine_BN, inliers_BN).value

    @torch.no_grad()
    def means_behind(self, chosen: Tensor, changes: Sequence[Changed]) -> list[float]:
        """The mean over the images numbered `chosen` for each of `changes`, whose batches are of `PASS_IMAGES`."""
        last, chunks = max(self.model.mlps), chosen.split(PASS_IMAGES)
        graph = starting_at(self.edited, self.model.sites.blocks[last - 1].output) if last else self.edited
        jobs = [
            (change.parameters, [(self.images[c], *states) for c, states in zip(chunks, change.entering, strict=True)])
            for change in changes
        ]
        runs = self.model.run_all(graph, jobs) if jobs else []
        return [self._mean(chunks, each) for each in runs]

    def _mean(self, chunks: Sequence[Tensor], runs: Sequence[Run]) -> float:
        return float(torch.cat([self._distance(chunk, run) for chunk, run in zip(chunks, runs, strict=True)]).mean())

    @torch.no_grad()
    def mean(self, chosen: Tensor, parameters: Mapping[str, Tensor]) -> float:
        """The mean over the images numbered `chosen`."""
        chunks = chosen.split(PASS_IMAGES)
        (runs,) = self.model.run_all(self.edited, [(parameters, [self._inputs(chunk) for chunk in chunks])])
        return self._mean(chunks, runs)


def _frozen(graph_module: fx.GraphModule) -> fx.GraphModule:
    """`graph_module`, a tap, without gradients for its parameters; graphs that share them keep their gradients."""
    for module in graph_module.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)
    return graph_module
