"""Task `latency`: what the patch costs in time and memory.

Original and patched model run as a user would run them, in turns (`timing.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from regsurgery.compiler.trace import tensor_inputs
from regsurgery.errors import UserError
from regsurgery.evaluation.result import Result
from regsurgery.evaluation.timing import MIN_ROUNDS, median, ratio, turns
from regsurgery.formats import LIBRARIES
from regsurgery.interval import Estimate, Row
from regsurgery.verification.pair import Pair
from regsurgery.verification.patched import reloaded

if TYPE_CHECKING:
    from regsurgery.images.image_set import ImageSet
    from regsurgery.progress import Progress

MEGABYTE = 1e6


def evaluate(pair: Pair, images: ImageSet, *, progress: Progress, seed: int, runs: int = 20, batch: int = 8) -> Result:
    """Milliseconds per image, their ratio, and the peak bytes of live tensors during one forward, without the weights;
    n is the number of pairs of runs. Figures are medians over the runs, with bootstrapped intervals.

    Args:
        runs: pairs of runs; `batch`: images in each.

    Raises:
        UserError: fewer than `MIN_ROUNDS` runs, or no images in a batch.
    """
    if runs < MIN_ROUNDS or batch < 1:
        raise UserError(f"{runs} runs of {batch} images: give at least {MIN_ROUNDS} runs of 1 image")
    device = next(pair.loaded.model.parameters()).device
    pixels = next(pair.batches(images.some(batch), batch)).pixels.to(device)
    original, patched = _runs(pair, pixels)
    progress.stage("latency", 2 * runs * len(pixels))
    rounds = []
    for taken in islice(turns({"original": original, "patched": patched}, device), runs):
        rounds.append(taken)
        progress.advance(2 * len(pixels))
    times_2R = np.array([[taken[name] for taken in rounds] for name in ("original", "patched")])
    before, after = (median(1000 * times_R / len(pixels), seed) for times_R in times_2R)
    rows = [
        Row("time", before, after, median(1000 * (times_2R[1] - times_2R[0]) / len(pixels), seed), unit="ms/image"),
        Row("time, patched over original", None, ratio(rounds, "patched", "original", seed)),
    ]
    peaks = [peak(run) for run in (original, patched)]
    rows.append(Row("peak memory of activations", _once(peaks[0]), _once(peaks[1]), unit="MB"))
    weights = _weights(pair)
    rows.append(Row("weights", _once(weights[0]), _once(weights[1]), unit="MB"))
    notes = [f"batches of {len(pixels)} on {device}, {torch.get_num_threads()} threads, {runs} pairs of runs"]
    if pair.format == "onnx":
        notes.append("the patched model runs in onnxruntime, the original in torch: the ratio is not only the patch's")
    return Result(rows, tuple(notes), num_images=len(pixels))


def _runs(pair: Pair, pixels: Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Both models as a user would run them: modules for a library's folders, graphs for programs."""
    loaded = pair.loaded
    if pair.is_same:
        return lambda: loaded.call(loaded.model, pixels), lambda: loaded.call(loaded.model, pixels)
    if pair.stock is not None:
        stock = pair.stock
        return lambda: loaded.call(loaded.model, pixels), lambda: stock.call(stock.model, pixels)
    root = Path(pair.folder)
    if pair.format not in LIBRARIES:
        module = reloaded(root, pair.format, trusted=pair.trusted)
        inputs = tensor_inputs(loaded, pixels)
        return lambda: pair.traced.graph_module(*inputs), lambda: module(*inputs)
    module = reloaded(root, pair.format, stored=loaded.stored, trusted=pair.trusted).to(pixels.device)
    return lambda: loaded.call(loaded.model, pixels), lambda: loaded.call(module, pixels)


def _once(size: float | None) -> Estimate | None:
    """A figure that is the same in every run, so it has no interval."""
    return None if size is None else Estimate(size, None, None, 1)


def _weights(pair: Pair) -> tuple[float, float]:
    sizes = []
    for subject in (pair.original, pair.patched):
        parameters = {id(value): value for value in subject.side.graph_module.parameters()}
        sizes.append(sum(value.numel() * value.element_size() for value in parameters.values()) / MEGABYTE)
    return sizes[0], sizes[1]


class _LiveBytes(TorchDispatchMode):
    """Bytes of live tensors that operators made, and their peak; the same in every run."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        given = {_storage(leaf)._cdata for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if not isinstance(leaf, Tensor):
                continue
            storage = _storage(leaf)
            if storage._cdata in given or storage._cdata in self.live:
                continue  # a view, or written in place
            self.live[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


@torch.no_grad()
def peak(run: Callable[[], Any]) -> float | None:
    """Peak megabytes of the tensors that `run` makes; None if torch operators make none (onnxruntime)."""
    with _LiveBytes() as bytes_:
        kept = run()
    del kept
    return bytes_.peak / MEGABYTE if bytes_.peak else None
