"""What `regsurgery find` costs: time against a plain forward and the reference finder's way, memory against the images.

    python -m benchmarks.find --json benchmarks/find.json        # about a quarter of an hour on two cores
    python -m benchmarks.find --model vit_tiny_patch16_224 --images 40 --rounds 4 --few 40 --many 80    # under a minute

The model is a stock timm ViT with random weights into which register neurons are planted; the run fails unless `find`
finds exactly those. Seconds per image:

a  the stock model, whole, in batches
p  the stock model up to the settled block, the last one that `find` needs, in batches: the floor for b
b  the scoring pass of `find`, which stops after that block, in the same batches
c  the reference finder's way: one image at a time, forward hooks on every block, the arrays of every MLP activation,
   block output and attention map kept as numpy until the image is done. On a CPU the copy to the host costs nothing,
   so this is its lower bound.
d  `regsurgery.find` from loading to the recipe, its own decoding and preprocessing included

a, p, b and c see the same tensors and take turns, half of the rounds before d and half after it: a busy machine slows
all of them. Ratios are medians of the rounds' ratios, that of d is to the median of a. Compare ratios, not seconds. The
suite (`python -m benchmarks`) stops d behind the stage that sees every image.

Memory (on Linux) is the resident size of a fresh process that streams generated pictures through the scoring pass:
before the pass, and its peak during it, for a few images and for many. The peak is the kernel's VmHWM, set back before
the pass; `ru_maxrss` is that figure too, but the pass would hide behind the peaks of loading and of the process that
started this one.

Shape suffixes: T tokens, D width, H hidden units, L blocks, I images, M outliers of an image.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import regsurgery
from benchmarks.processes import measure_processes
from regsurgery.compiler.located import Located
from regsurgery.compiler.match import match
from regsurgery.compiler.planting import plant
from regsurgery.compiler.trace import tensor_inputs, trace
from regsurgery.evaluation.timing import ratio, turns
from regsurgery.frontends.load import load
from regsurgery.images.image_set import image_set
from regsurgery.interval import Estimate
from regsurgery.progress import Progress
from regsurgery.search.diagnosis import diagnose
from regsurgery.search.scores import Scorer, candidates
from regsurgery.search.selection import MAX_CANDIDATES
from regsurgery.search.shares import BATCH, PILOT_IMAGES

# Of the suite: model and images of the timing, its rounds; images of the memory runs; images and rounds of processes.
FORMS: dict[str, dict[str, Any]] = {
    "full": {"model": "vit_base_patch16_224", "images": 128, "rounds": 5, "memory": (64, 640), "processes": (240, 3)},
    "short": {"model": "vit_tiny_patch16_224", "images": 40, "rounds": 4, "memory": (), "processes": ()},
    "smoke": {"model": "vit_tiny_patch16_224", "images": 8, "rounds": 4, "memory": (8, 16), "processes": (16, 2)},
}
SMALL = "vit_tiny_patch16_224"  # whose memory, and whose processes, are looked at
PLANTED = {5: 3}  # block -> how many neurons
ROUND_BATCHES = 2
ROWS = {
    "a": "plain forward",
    "p": "plain forward up to block {settled_block}",
    "b": "find's scoring pass up to block {settled_block}",
    "c": "reference finder: one by one, hooks, numpy",
    "d": "find, all of it, {num_images} images",
}


def main() -> None:
    args = _arguments()
    load_before = os.getloadavg()[0]
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="regsurgery-") as scratch,
        ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as fresh,
    ):
        folder = Path(scratch) / args.model
        planted = fresh.submit(write_model, args.model, folder).result()
        figures: dict[str, Any] = {"model": args.model, "planted": planted}
        if args.part == "memory":  # time is that of an earlier run
            figures = json.loads(args.json.read_text("utf-8"))
        else:
            figures |= fresh.submit(measure_speed, folder, planted, args.images, args.rounds).result()
            figures["machine"] = {
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
            }
        counts = (args.few, args.many) if sys.platform == "linux" and args.part != "time" else ()
        block = figures["settled_block"]
        figures["memory"] = [fresh.submit(measure_memory, folder, block, count).result() for count in counts]
    print(_table(figures))
    if args.json:
        args.json.write_text(json.dumps(_rounded(figures), indent=2) + "\n", "utf-8")


def measure(form: str, device: str, seconds: float, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The suite's part `find`; yields the figures so far after every step, the last ones are the result."""
    settings = FORMS[form]
    spawn = multiprocessing.get_context("spawn")
    figures: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory(prefix="regsurgery-") as scratch,
        ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as fresh,
    ):
        planted, folders = {}, {}
        for name in dict.fromkeys((settings["model"], SMALL)):
            folders[name] = Path(scratch) / name
            planted[name] = fresh.submit(write_model, name, folders[name]).result()
        say("models written")
        name = settings["model"]
        task = fresh.submit(
            measure_speed, folders[name], planted[name], settings["images"], settings["rounds"], whole=False
        )
        figures["speed"] = task.result()
        say(f"scoring pass over a plain forward: {figures['speed']['ratios']['b']['value']:.3f}")
        yield figures
        if settings["memory"] and sys.platform == "linux":
            block = max(PLANTED)
            figures["memory"] = [
                fresh.submit(measure_memory, folders[SMALL], block, count).result() for count in settings["memory"]
            ]
            say("peak memory: " + ", ".join(f"{one['peak']:.0f} MB" for one in figures["memory"]))
            yield figures
        if settings["processes"]:
            figures["processes"] = measure_processes(folders[SMALL], *settings["processes"])
            say(f"two processes: {figures['processes']['speed_up']['value']:.2f} times as fast as one")
    yield figures


def _arguments() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm name (default: %(default)s)")
    parser.add_argument("--images", type=int, default=500, help="images of the whole find (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of a, p, b, c (default: %(default)s)")
    parser.add_argument("--few", type=int, default=100, help="images of the first memory run (default: %(default)s)")
    parser.add_argument("--many", type=int, default=2000, help="images of the second one (default: %(default)s)")
    parser.add_argument(
        "--part", choices=("all", "time", "memory"), default="all",
        help="memory: measure that anew and take the rest from --json (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser.parse_args()


def write_model(name: str, folder: Path) -> dict[int, list[int]]:
    """Write a timm checkpoint with random weights and planted register neurons; returns those, block -> neurons."""
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model(name, pretrained=False), str(folder), safe_serialization=True)
    loaded = load(str(folder))
    traced = trace(loaded)
    inputs = tensor_inputs(loaded, next(image_set(None, PILOT_IMAGES).batches(PILOT_IMAGES, loaded.preprocess)))
    planted = plant(traced, match(traced), inputs, PLANTED)
    save_file(loaded.model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return planted


# --- time -----------------------------------------------------------------------------------------------------------


def measure_speed(
    folder: Path, planted: dict[int, list[int]], num_images: int, num_rounds: int, *, whole: bool = True
) -> dict[str, Any]:
    """Seconds per image of every way; where not the `whole` of d is run, only its stages up to the search."""
    loaded = load(str(folder))
    traced = trace(loaded)
    sites = match(traced)
    pilot = image_set(None, PILOT_IMAGES)
    block = diagnose(Located(loaded, traced, sites), pilot, batch_size=BATCH).settled_block
    assert block is not None, "the planted neurons make outliers"
    scorer = Scorer(Located(loaded, traced, sites), block)
    batches = list(pilot.batches(BATCH, loaded.preprocess))[:ROUND_BATCHES]
    sums = scorer.new_sums()
    for batch in batches:
        scorer.add(sums, batch)
    reference = ReferenceFinder(copy.deepcopy(loaded.model), sums.threshold)
    ways: dict[str, Callable[[], object]] = {
        "a": partial(_run, loaded.model, batches),
        "p": partial(_run, partial(_forward_to, loaded.model, block), batches),
        "b": lambda: [scorer.add(scorer.new_sums(), batch) for batch in batches],
        "c": lambda: reference.scores(torch.cat(batches)),
    }
    images_a_round = sum(len(batch) for batch in batches)
    found_by_reference = _best(reference.scores(torch.cat(batches)), sum(len(listed) for listed in planted.values()))

    again = turns(ways, warm_up=1)
    rounds = list(islice(again, num_rounds // 2))
    if whole:
        stages = Stages()
        found = regsurgery.find(str(folder), folder.with_suffix(".yaml"), num_images=num_images, progress=stages)
        seconds = stages.seconds()
        neurons = {at: list(listed) for at, listed in found.recipe.register_neurons.items()}
    else:
        seconds = stages_until_search(folder, num_images)
        best = candidates(sums, scorer.columns_H, MAX_CANDIDATES)[: sum(map(len, planted.values()))]
        neurons = {at: sorted(one.neuron for one in best if one.block == at) for at in {one.block for one in best}}
    if neurons != planted:
        raise SystemExit(f"find found {neurons}, planted were {planted}: these timings mean nothing")
    rounds += islice(again, num_rounds - num_rounds // 2)
    rounds = [{name: taken / images_a_round for name, taken in one.items()} for one in rounds]

    medians = {name: statistics.median(one[name] for one in rounds) for name in ways}
    estimates = {name: ratio(rounds, name, "a") for name in ways if name != "a"}
    for name, total in (("scores", seconds["scores"]), *([("d", sum(seconds.values()))] if whole else [])):
        medians[name] = total / num_images
        estimates[name] = Estimate(medians[name] / medians["a"], None, None, 1)
    ratios = {"a": 1.0, **{name: one.value for name, one in estimates.items()}}
    return {
        "model": folder.name,
        "ratios": {name: one.as_dict() for name, one in estimates.items()},
        "found_by_reference": found_by_reference,
        "settled_block": block,
        "batch": BATCH,
        "images_a_round": images_a_round,
        "seconds_per_image": medians,
        "ratio_to_plain": ratios,
        "scoring_to_floor": statistics.median(one["b"] / one["p"] for one in rounds),
        "rounds": rounds,
        "find": {"images": num_images, "stages": seconds},
    }


@torch.no_grad()
def _run(model: Callable[[Tensor], object], batches: Sequence[Tensor]) -> None:
    for batch in batches:
        model(batch)


def _forward_to(model: nn.Module, block: int, images: Tensor) -> object:
    return model.forward_intermediates(  # type: ignore[operator]
        images, indices=[block], stop_early=True, output_fmt="NLC", intermediates_only=True
    )


class Stages(Progress):
    """When the stages of `find` began and ended; the stage `last` is not let begin."""

    def __init__(self, last: str | None = None) -> None:
        self.last = last
        self.began: list[tuple[str, float]] = []

    def stage(self, name: str, total: int | None = None, *, in_bytes: bool = False) -> None:
        self.began.append((name, time.perf_counter()))
        if name == self.last:
            raise Stopped

    def seconds(self) -> dict[str, float]:
        """Of every stage; the last one ends now."""
        ends = [began for _, began in self.began[1:]] + [time.perf_counter()]
        taken = {name: end - began for (name, began), end in zip(self.began, ends, strict=True)}
        return {name: seconds for name, seconds in taken.items() if name != self.last}


class Stopped(Exception):  # noqa: N818  nothing is wrong
    """The stages that are timed are over."""


def stages_until_search(folder: Path, num_images: int) -> dict[str, float]:
    """Seconds of the stages of `find` that come before the search, which takes as long for any number of images."""
    stages = Stages(last="search")
    with contextlib.suppress(Stopped):
        regsurgery.find(str(folder), num_images=num_images, progress=stages)
    return stages.seconds()


class ReferenceFinder:
    """How the paper's code scores neurons: hooks on everything, one image at a time.

    Args:
        model: gets hooks, and attention that makes its maps.
        threshold: norm above which a patch after the last but one block is an outlier.
    """

    def __init__(self, model: nn.Module, threshold: float) -> None:
        self.model, self.threshold = model, threshold
        self.hidden: list[np.ndarray] = []
        self.outputs: list[np.ndarray] = []
        self.maps: list[np.ndarray] = []
        for block in model.blocks:  # type: ignore[union-attr]
            block.attn.fused_attn = False
            block.mlp.act.register_forward_hook(partial(_keep, self.hidden))
            block.attn.attn_drop.register_forward_hook(partial(_keep, self.maps))
            block.register_forward_hook(partial(_keep, self.outputs))

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Mean over the images of the mean |activation| at their outliers, `[L, H]`."""
        scores_ILH, num_scored = None, 0
        for image in images:
            for kept in (self.hidden, self.outputs, self.maps):
                kept.clear()
            self.model(image[None])
            hidden_LTH = torch.from_numpy(np.concatenate(self.hidden))
            outputs_LTD = torch.from_numpy(np.concatenate(self.outputs))
            if scores_ILH is None:
                scores_ILH = torch.zeros(len(images), len(hidden_LTH), hidden_LTH.shape[-1])
            outliers_M = torch.where(outputs_LTD[-2].norm(dim=1) > self.threshold)[0]
            if len(outliers_M) == 0:
                continue
            for block, hidden_TH in enumerate(hidden_LTH):
                scores_ILH[num_scored, block] = hidden_TH[outliers_M].abs().mean(dim=0)
            num_scored += 1
        assert scores_ILH is not None and num_scored, "the planted neurons make outliers"
        return scores_ILH[:num_scored].mean(dim=0)


def _keep(kept: list[np.ndarray], module: nn.Module, args: object, output: Tensor) -> None:
    kept.append(output.detach().cpu().numpy())


def _best(scores_LH: Tensor, count: int) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for index in scores_LH.flatten().topk(count).indices.sort().values.tolist():
        found.setdefault(index // scores_LH.shape[1], []).append(index % scores_LH.shape[1])
    return found


# --- memory ---------------------------------------------------------------------------------------------------------


def measure_memory(folder: Path, last_block: int, num_images: int) -> dict[str, float]:
    """Stream `num_images` pictures through the scoring pass, in this process; sizes in MB."""
    loaded = load(str(folder))
    traced = trace(loaded)
    scorer = Scorer(Located(loaded, traced, match(traced)), last_block)
    sums = scorer.new_sums()
    before = _resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    for batch in image_set(None, num_images).batches(BATCH, loaded.preprocess):
        scorer.add(sums, batch)
    return {"images": sums.num_images, "before": before, "peak": _resident_mb("VmHWM")}


def _resident_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


# --- output ---------------------------------------------------------------------------------------------------------


def _table(figures: dict[str, Any]) -> str:
    machine, seconds, ratios = figures["machine"], figures["seconds_per_image"], figures["ratio_to_plain"]
    facts = {**figures, "num_images": figures["find"]["images"]}
    before, after = machine["load_average"]
    stages = ", ".join(f"{name} {value:.1f}" for name, value in figures["find"]["stages"].items())
    lines = [
        f"{figures['model']}, random weights, planted and found (block -> neurons): {figures['planted']}",
        f"{machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}; "
        f"load average {before} at the start, {after} at the end",
        "",
        f"{'batches of ' + str(figures['batch']):48}{'s/image':>9}{'to a':>7}",
        *(f"{name}  {text.format(**facts):45}{seconds[name]:9.4f}{ratios[name]:7.2f}" for name, text in ROWS.items()),
        f"{'b to p':55}{figures['scoring_to_floor']:9.2f}",
        f"Medians of {len(figures['rounds'])} rounds of {figures['images_a_round']} images.",
        "",
        f"Stages of d, seconds: {stages}",
        "",
        f"{'scoring pass, resident MB':25}{'before':>9}{'peak':>9}{'growth':>9}",
    ]
    lines += [
        f"{one['images']:>18} images{one['before']:9.0f}{one['peak']:9.0f}{one['peak'] - one['before']:9.0f}"
        for one in figures["memory"]
    ]
    if figures["memory"]:
        few, many = figures["memory"]
        lines.append(f"{'peak of the many above that of the few':43}{many['peak'] - few['peak']:9.0f}")
    return "\n".join(lines)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
