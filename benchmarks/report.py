"""`results.json` as `RESULTS.md`: figures of every part -> Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.goals import AGAIN, VERDICTS, Verdict, estimate
from benchmarks.suite import PARTS
from regsurgery.interval import Estimate

Figures = Mapping[str, Any]
MODES = ("shift", "native", "bias", "hooks")
ORDER = ("latency", "find", "patch", "rehearsal", "startup", "depth")
PACKAGES = ("python", "torch", "timm", "transformers", "onnxruntime")
HEAD = """\
# What it costs

Written by `python -m benchmarks`; the figures are in `results.json` beside it. Ratios are medians over rounds in which
everything that is compared runs in turns; brackets hold their 95 % interval (bootstrap over the rounds).
"""


def rendered(results: Mapping[str, Figures]) -> str:
    """The whole of `RESULTS.md`.

    Args:
        results: part, or `part (device)`, -> its record, see `suite.run_part`.
    """
    named = sorted(results.items(), key=lambda item: (ORDER.index(_part(item[0])), item[0]))
    sections = [HEAD, "## Goals\n", *_goals(named)]
    for key, record in named:
        sections += [f"## {_title(key)}\n", *_section(_part(key), record)]
    return "\n".join(sections).rstrip() + "\n"


def _part(key: str) -> str:
    return key.partition(" ")[0]


def _title(key: str) -> str:
    _, _, device = key.partition(" ")
    return f"{PARTS[_part(key)].title} {device}".rstrip()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


def shown(found: Estimate, unit: str = "", digits: int = 4) -> str:
    """A figure with its interval: `1.0052 [1.0031, 1.0070]`."""
    value = f"{found.value:.{digits}f}"
    if found.low is not None and found.high is not None:
        value += f" [{found.low:.{digits}f}, {found.high:.{digits}f}]"
    return f"{value} {unit}".rstrip()


def rounded(value: Any) -> Any:
    """Floats to five significant digits, in whatever holds them."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list) else value


def _goals(named: Sequence[tuple[str, Figures]]) -> Iterator[str]:
    rows = []
    for key, record in named:
        verdicts = VERDICTS.get(_part(key))
        if verdicts is None or record["figures"] is None:
            continue
        device = "" if record["device"] == "cpu" else f" ({record['device']}, batch 32 bf16)"
        rows += [goal_row(verdict, device) for verdict in verdicts(record["figures"])]
    yield table(("goal", "at most", "measured", ""), rows)


def goal_row(verdict: Verdict, where: str = "") -> tuple[str, str, str, str]:
    unit = verdict.unit
    found = "" if verdict.found is None else shown(verdict.found, unit)
    return verdict.goal + where, f"{verdict.limit:g} {unit}".rstrip(), found, verdict.word


def _section(part: str, record: Figures) -> Iterator[str]:
    yield _circumstances(record)
    if record["status"] != "ok":
        yield f"**Failed.** What was measured before stands below.\n\n```\n{record['error']}\n```\n"
    if record["figures"] is not None:
        yield from RENDERERS[part](record["figures"])


def _circumstances(record: Figures) -> str:
    machine, (before, after) = record["machine"], record["load_average"]
    packages = ", ".join(f"{name} {machine[name]}" for name in PACKAGES if machine.get(name))
    where = f"{record['gpu']}, " if record.get("gpu") else ""
    return (
        f"{where}{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; {packages}; load average "
        f"{before} before, {after} after; {record['form']} form, {record['seconds']:.0f} s.\n"
    )


# --- one function a part --------------------------------------------------------------------------------------------


def _latency(figures: Figures) -> Iterator[str]:
    yield (
        "`shift`, `native`, `bias`: the folder that `regsurgery patch` writes, as it is loaded. `hooks`: the same as "
        "`shift` by forward hooks, whose outputs were compared with it first. `original again`: the original once "
        "more, as if it were another model; nothing is known better than that ratio is 1. Programs (`pt2`, `onnx`) of "
        "the original come from the same exporter. Modules share equal weights, so that it does not matter where these "
        "lie in memory. Random weights; `bias` adds no token; `native` of ViT-L is the class that it writes, unfitted. "
        "All factors times each other would take hours: the full form has every value of every factor, and what the "
        "goals are about. A row ends when its seconds are used up or its intervals are narrow enough.\n"
    )
    rows = []
    for group in figures["groups"]:
        cells = [_ratio(group, mode) for mode in (AGAIN, *MODES)]
        rows.append((*_group(group), str(group["rounds"]), f"{group['original']['ms']:.1f}", *cells))
    yield table(("model", "runs as", "batch", "dtype", "rounds", "original, ms", AGAIN, *MODES), rows)
    yield "Floor of `shift` and `native`: multiplications with one register over those without:\n"
    yield table(figures["floors"], [[f"{floor:.4f}" for floor in figures["floors"].values()]])
    yield "Peak of the bytes that live tensors take during a forward, over that of the original:\n"
    yield table(
        ("model", "runs as", "batch", "dtype", "original, MB", *MODES),
        [
            (*_group(group), f"{group['original']['peak_mb']:.1f}", *(_memory(group, mode) for mode in MODES))
            for group in figures["groups"]
            if group["original"]["peak_mb"]
        ],
    )
    differ = [group["hooks_differ_by"] for group in figures["groups"] if group["hooks_differ_by"] is not None]
    if differ:
        yield f"`hooks` and `shift` differ by at most {max(differ):.1e} of the largest output.\n"
    if figures["not_run"]:
        yield f"Not run, since the time was up: {', '.join(figures['not_run'])}.\n"
    if figures["failed"]:
        yield "Failed:\n"
        yield "\n".join(f"- {name}: `{error}`" for name, error in figures["failed"].items()) + "\n"
    for group in figures["groups"]:
        for mode, profile in group["profiles"].items():
            yield from _profile(group, mode, profile)


def _group(group: Figures) -> tuple[str, str, str, str]:
    model = group["name"].partition(f" {group['backend']} ")[0]
    return model, group["backend"], str(group["batch"]), group["dtype"]


def _ratio(group: Figures, mode: str) -> str:
    return shown(estimate(group["modes"][mode]["ratio"])) if mode in group["modes"] else ""


def _memory(group: Figures, mode: str) -> str:
    found = group["modes"].get(mode)
    return f"{found['peak_mb'] / group['original']['peak_mb']:.4f}" if found and found["peak_mb"] else ""


def _profile(group: Figures, mode: str, profile: Figures) -> Iterator[str]:
    yield (
        f"Where the time of a missed goal goes: `{mode}`, {group['name']}. Milliseconds of one forward under torch's "
        f"profiler, by operator (its own time), those that differ most; {profile['original_ms']:.1f} ms in all for the "
        f"original, {profile['patched_ms']:.1f} ms patched.\n"
    )
    yield table(
        ("operator", "original, ms", "patched, ms", "more, ms", "calls"),
        [
            (
                f"`{row['operator']}`",
                f"{row['original_ms']:.2f}",
                f"{row['patched_ms']:.2f}",
                f"{row['patched_ms'] - row['original_ms']:+.2f}",
                f"{row['original_calls']} → {row['patched_calls']}",
            )
            for row in profile["operators"]
        ],
    )


WAYS = {
    "a": "plain forward, batches of {batch}",
    "p": "plain forward up to block {settled_block}",
    "b": "scoring pass of `find`",
    "scores": "stage of `find` that sees every image, pictures and preprocessing included",
    "d": "`find`, all of it",
    "c": "reference finder: one by one, hooks, numpy",
}


def _find(figures: Figures) -> Iterator[str]:
    speed = figures.get("speed")
    if speed:
        rounds = len(speed["rounds"])
        yield f"{speed['model']}, random weights, planted register neurons, which were found; {rounds} rounds.\n"
        rows = []
        for way, text in WAYS.items():
            if way not in speed["seconds_per_image"]:
                continue
            ratio = "1" if way == "a" else shown(estimate(speed["ratios"][way]))
            rows.append((text.format(**speed), f"{1 / speed['seconds_per_image'][way]:.2f}", ratio))
        yield table(("", "images/s", "time over a plain forward"), rows)
        reference, scoring = (speed["seconds_per_image"][way] for way in ("c", "b"))
        yield f"The reference's way takes {reference / scoring:.2f} times as long as the scoring pass.\n"
    if figures.get("memory"):
        yield "Resident memory of a fresh process that streams pictures through the scoring pass (ViT-Ti/16):\n"
        yield table(
            ("images", "before, MB", "peak, MB"),
            [(f"{one['images']:.0f}", f"{one['before']:.0f}", f"{one['peak']:.0f}") for one in figures["memory"]],
        )
    processes = figures.get("processes")
    if processes:
        together, apart = (estimate(processes[name]) for name in ("two_over_half", "apart_over_half"))
        yield (
            f"Two gloo processes, each with one thread and one core, take {processes['images']} images (ViT-Ti/16) "
            f"{shown(estimate(processes['speed_up']), digits=2)} times as fast as one: {shown(together, digits=2)} of "
            f"half its time. Two searches at once that know nothing of each other take {shown(apart, digits=2)} of it, "
            "with half of the images each: that is what the machine has to give.\n"
        )


RUNS = {
    "cp": "`cp -r`",
    "copy": "`patch --no-verify`, shards copied",
    "link": "`patch --no-verify --link`",
    "hashed": "copied, without the Hub's records: every shard read and hashed",
    "verified": "`--link`, verified on 8 images",
    "verify": "`verify` on 8 images",
    "native": "`patch --no-verify --mode native`",
}


def _patch(figures: Figures) -> Iterator[str]:
    for size in figures["sizes"]:
        yield from _size(size, "")
    if figures.get("recorded"):
        recorded = ", recorded by `python -m benchmarks.write --gigabytes 12 --json benchmarks/write.json`"
        yield from _size(figures["recorded"], recorded)


def _size(size: Figures, note: str) -> Iterator[str]:
    yield f"{size['gigabytes']} GB in {size['blocks']} blocks{note}; fresh processes, medians:\n"
    columns = (("seconds", 2), ("of_cp", 2), ("cpu_seconds", 2), ("peak_mb", 0), ("reads", 2))
    rows = [(text, size[run]) for run, text in RUNS.items() if run in size]
    yield table(
        ("", "s", "of `cp`", "CPU s", "peak memory, MB", "weights read, times"),
        [(text, *(f"{row[key]:.{digits}f}" if key in row else "" for key, digits in columns)) for text, row in rows],
    )


def _startup(figures: Figures) -> Iterator[str]:
    yield f"{figures['rounds']} fresh processes each, in turns.\n"
    yield table(
        ("", "s", "over an empty Python, s"),
        [
            (f"`{name}`", shown(estimate(row["seconds"]), digits=3), f"{row['over']:+.3f}")
            for name, row in figures["runs"].items()
        ],
    )


def _depth(figures: Figures) -> Iterator[str]:
    steps = list(figures["seconds"])
    depths = list(figures["seconds"][steps[0]])
    yield (
        f"Seconds for ViTs of width {figures['width']}, medians of {figures['rounds']} rounds; the exponent is the "
        "slope of the logarithms.\n"
    )
    yield table(
        ("", *(f"{depth} blocks" for depth in depths), "exponent"),
        [
            (step, *(f"{figures['seconds'][step][depth]:.3f}" for depth in depths), f"{figures['exponents'][step]:.2f}")
            for step in steps
        ],
    )


def _rehearsal(figures: Figures) -> Iterator[str]:
    yield (
        "Checkpoints of the shapes of published models, random weights, planted register neurons. Each command is a "
        f"process of its own, on {figures['images']} generated pictures, with `--max-memory {figures['max_memory']}`: "
        "the weights of larger checkpoints stay on disk and are read operator by operator. Memory is the most that the "
        "command and its workers have resident at one time; `own` leaves out pages of mapped files, which the system "
        "can take back. CPU seconds are those of all threads: where they are few beside the seconds times the threads, "
        "the machine did other work. The load average of every model's turn is in its first row. What was measured "
        "before is not measured again: load and seconds above are of the last run.\n"
    )
    yield table(
        ("model", "step", "exit", "s", "CPU s", "memory, MB", "own, MB", "outcome"),
        [row for record in figures["models"].values() for row in _steps(record)],
    )
    if figures["failed"]:
        yield "Failed:\n"
        yield "\n".join(f"- {name}: `{problem}`" for name, problem in figures["failed"].items()) + "\n"


def _steps(record: Figures) -> Iterator[tuple[str, ...]]:
    """One row for every step of a model, the making of its checkpoint first."""
    for step, cost in record["steps"].items():
        what, outcome = "", cost.get("outcome", "")
        if step == "make":
            before, after = record["load_average"]
            what = f"{record['name']}, {record['dtype']}; load average {before} before, {after} after"
            if "gigabytes" in record:
                blocks = " and ".join(record["planted"])
                count = sum(map(len, record["planted"].values()))
                outcome = f"{record['gigabytes']:.2f} GB in {record['shards']} files; {count} neurons in {blocks}"
        yield (
            what, step, str(cost["exit"]), f"{cost['seconds']:.0f}", f"{cost['cpu_seconds']:.0f}",
            f"{cost['peak_mb']:.0f}", f"{cost['own_mb']:.0f}", outcome,
        )  # fmt: skip


RENDERERS: dict[str, Callable[[Figures], Iterator[str]]] = {
    "latency": _latency,
    "find": _find,
    "patch": _patch,
    "rehearsal": _rehearsal,
    "startup": _startup,
    "depth": _depth,
}
