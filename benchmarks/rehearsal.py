"""A rehearsal at full size: the four commands, as a user gives them, on checkpoints of the shapes of published models.

    python -m benchmarks --only rehearsal --output DIR                            # hours on two cores, 30 GB of disk
    python -m benchmarks --only rehearsal --models internvit-6b --output DIR      # one of them

Every checkpoint is made with random weights and planted register neurons (`full_size.py`); `doctor` must see outliers,
`find` must name exactly the planted neurons, `patch` and `verify` must pass, with no outlier left. Each command is a
process of its own and gets the same few generated pictures. Its weights stay on disk where there are more than
`MAX_MEMORY`, whatever memory the machine has. A model's folders are removed after its turn.

What was measured is kept in `rehearsal.json` in DIR after every model: one that is there is not measured again. To
repeat it, remove it from there.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.full_size import PUBLISHED, SHAPES, SMOKE
from benchmarks.resident import run

NUM_IMAGES = 8
MAX_MEMORY = "6GB"
FORMS = {"full": PUBLISHED, "short": PUBLISHED[:1], "smoke": (SMOKE,)}
KEPT = "rehearsal.json"
LAST_LINES = 3  # of what a failed command said
Said = Mapping[str, Any]


def measure(
    form: str,
    device: str,
    seconds: float,
    say: Callable[[str], None],
    *,
    folder: str | None = None,
    models: Sequence[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """The suite's part `rehearsal`; yields the figures so far after every model, the last ones are the result.

    Args:
        folder: has `KEPT`, and the models while they are measured; by default a temporary one.
        models: names in `SHAPES`; by default those of the form.
    """
    with tempfile.TemporaryDirectory(prefix="regsurgery-") as scratch:
        root = Path(folder or scratch)
        root.mkdir(parents=True, exist_ok=True)
        kept = root / KEPT
        found: dict[str, Any] = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
        for name in models or FORMS[form]:
            if name in found and not found[name]["problems"]:
                say(f"{name}: measured before")
            else:
                found[name] = rehearse(name, root / f"rehearsal-{name}", lambda line, name=name: say(f"{name}: {line}"))
                kept.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
            yield _figures(found)


def _figures(found: Mapping[str, Any]) -> dict[str, Any]:
    models = {name: found[name] for name in SHAPES if name in found}
    failed = {name: "; ".join(record["problems"]) for name, record in models.items() if record["problems"]}
    return {"images": NUM_IMAGES, "max_memory": MAX_MEMORY, "models": models, "failed": failed}


def rehearse(name: str, root: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """One model from its making to `verify`, in the new folder `root`, which is removed; its record.

    The steps after one that failed are left out.
    """
    shape = SHAPES[name]
    record: dict[str, Any] = {
        "name": shape.name, "dtype": shape.dtype, "load_average": [round(os.getloadavg()[0], 2)],
        "planted": {}, "steps": {}, "problems": [],
    }  # fmt: skip
    shutil.rmtree(root, ignore_errors=True)  # of a run that was killed
    root.mkdir()
    try:
        for step, command in commands(name, root).items():
            cost = run([sys.executable, "-m", *command], root / f"{step}.stdout")
            record["steps"][step] = cost.as_dict()
            say(f"{step}: {cost.seconds:.0f} s, {cost.peak_mb:.0f} MB, exit status {cost.exit}")
            said = (root / f"{step}.stdout").read_text("utf-8")
            if cost.exit:
                lines = (root / f"{step}.stderr").read_text("utf-8").strip().splitlines()
                record["problems"].append(f"{step}: exit status {cost.exit}: {' | '.join(lines[-LAST_LINES:])}")
                break
            if step == "make":
                record["planted"] = json.loads(said)
                record |= _on_disk(root / "model")
                continue
            outcome, problem = OUTCOMES[step](json.loads(said), record["planted"])
            record["steps"][step]["outcome"] = outcome
            record["problems"] += [f"{step}: {problem}"] if problem else []
    finally:
        shutil.rmtree(root)
    record["load_average"].append(round(os.getloadavg()[0], 2))
    return record


def commands(name: str, root: Path) -> dict[str, list[str]]:
    """What is run, by step: module and arguments."""
    model, recipe, patched = (str(root / part) for part in ("model", "recipe.yaml", "patched"))
    common = ["--num-images", str(NUM_IMAGES), "--max-memory", MAX_MEMORY, "--json"]
    return {
        "make": ["benchmarks.full_size", name, model],
        "doctor": ["regsurgery", "doctor", model, *common],
        "find": ["regsurgery", "find", model, "-o", recipe, *common],
        "patch": ["regsurgery", "patch", model, "-o", patched, "--recipe", recipe, *common],
        "verify": ["regsurgery", "verify", patched, *common],
    }


def _on_disk(model: Path) -> dict[str, Any]:
    shards = list(model.glob("*.safetensors"))
    return {"gigabytes": sum(path.stat().st_size for path in shards) / 1e9, "shards": len(shards)}


# --- what a command found, and what is wrong with it; None if nothing is ----------------------------------------------


def _of_doctor(said: Said, planted: Said) -> tuple[str, str | None]:
    outcome = f"{said['outliers_per_image']:.2f} outliers an image from block {said['emergence_block']} on"
    first = min(map(int, planted))
    if said["verdict"] != "register_neurons":
        return outcome, f"the verdict is {said['verdict']}: {said['reason']}"
    return outcome, None if said["emergence_block"] == first else f"neurons were planted from block {first} on"


def _of_find(said: Said, planted: Said) -> tuple[str, str | None]:
    found, count = said["register_neurons"], sum(map(len, planted.values()))
    registers = f"{said['num_registers']} register{'s' if said['num_registers'] > 1 else ''}"
    if {block: sorted(neurons) for block, neurons in found.items()} != planted:
        return f"{_listed(found)}, {registers}", f"found {_listed(found)}; planted were {_listed(planted)}"
    return f"the {count} planted neurons and no other; {registers}", None


def _of_patch(said: Said, planted: Said) -> tuple[str, str | None]:
    return _of_verify(said["verify"], planted)


def _of_verify(said: Said, planted: Said) -> tuple[str, str | None]:
    outliers = said["outliers_per_image"]
    outcome = f"{outliers['original']:.2f} outliers an image before, {outliers['patched']:.2f} after"
    if not said["passed"]:
        return outcome, "; ".join(said["failures"])
    return outcome, "outliers are left" if outliers["patched"] else None


def _listed(neurons: Said) -> str:
    return " ".join(f"{block}:{neuron}" for block, listed in neurons.items() for neuron in listed)


OUTCOMES = {"doctor": _of_doctor, "find": _of_find, "patch": _of_patch, "verify": _of_verify}
