"""Part `depth`: how long tracing, matching and the passes take for narrow ViTs of more and more blocks.

The slope of the logarithms is the exponent: 1 where twice the blocks take twice as long.

Shape suffix: L depths.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from regsurgery.compiler.located import Located
from regsurgery.compiler.match import match
from regsurgery.compiler.surgery import perform
from regsurgery.compiler.trace import trace
from regsurgery.evaluation.timing import median, turns
from regsurgery.frontends.load import load
from regsurgery.frontends.loaded import Loaded
from regsurgery.recipe import Recipe

WIDTH = 64
RECIPE = Recipe({1: (3, 5)})
STEPS = ("trace", "match", "passes")
FORMS = {"full": ((6, 12, 24, 48), 4), "short": ((6, 12, 24), 2), "smoke": ((2, 4), 2)}  # depths, rounds


def measure(form: str, device: str, seconds: float, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yields the figures once; rounds stop where the time is up."""
    depths, num_rounds = FORMS[form]
    until = time.monotonic() + seconds
    taken: dict[str, list[dict[str, float]]] = {step: [] for step in STEPS}
    with tempfile.TemporaryDirectory(prefix="regsurgery-") as scratch:
        loaded = {str(depth): _model(Path(scratch) / str(depth), depth) for depth in depths}
        steps: dict[str, dict[str, float]] = {step: {} for step in STEPS}
        ways = {name: partial(_compile, one, steps, name) for name, one in loaded.items()}
        ways[str(depths[0])]()  # imports
        for _ in islice(turns(ways, warm_up=0), num_rounds):
            for step in STEPS:
                taken[step].append(dict(steps[step]))
            say(", ".join(f"{name} blocks {steps['trace'][name]:.2f} s" for name in ways))
            if time.monotonic() > until:
                break
    medians = {step: {name: median([one[name] for one in rounds]).value if len(rounds) > 1 else rounds[0][name]
                      for name in ways} for step, rounds in taken.items()}  # fmt: skip
    yield {
        "width": WIDTH,
        "rounds": len(taken["trace"]),
        "seconds": medians,
        "exponents": {step: exponent(depths, list(medians[step].values())) for step in STEPS},
    }


def exponent(depths_L: Sequence[float], seconds_L: Sequence[float]) -> float:
    """The slope of log seconds over log depth, by least squares."""
    return float(np.polyfit(np.log(depths_L), np.log(seconds_L), 1)[0])


def _model(folder: Path, depth: int) -> Loaded:
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        image_size=32,
        patch_size=8,
    )
    transformers.utils.logging.disable_progress_bar()
    transformers.ViTModel(config).save_pretrained(folder)
    return load(str(folder))


def _compile(loaded: Loaded, steps: Mapping[str, dict[str, float]], name: str) -> None:
    marks = [time.perf_counter()]
    traced = trace(loaded)
    marks.append(time.perf_counter())
    sites = match(traced)
    marks.append(time.perf_counter())
    perform(Located(loaded, traced, sites), RECIPE)
    marks.append(time.perf_counter())
    for step, began, ended in zip(STEPS, marks, marks[1:], strict=False):
        steps[step][name] = ended - began
