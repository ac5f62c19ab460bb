"""What `regsurgery patch` and `verify` cost on a large checkpoint: time beside `cp -r`, memory, and readings of it.

    python -m benchmarks.write --gigabytes 12 --json benchmarks/write.json     # needs three times that on disk
    python -m benchmarks.write --gigabytes 0.5                                 # under a minute

The checkpoint is a transformers ViT as wide as InternViT-6B (3200, MLP 12800), below 0.5 GB a narrower one (1024, MLP
4096), with as many blocks as the size asks for, random float32 weights one shard a block, as `hf download --local-dir`
leaves one: the client of the Hub records the sha256 of every shard beside it. Before every run, its pages are dropped
from the cache of the system, where the system lets us, and a dry run loads the libraries, since twelve gigabytes copied
push them out (from 4 GB on; below, one dry run before all): the checkpoint is cold, torch and transformers are warm.
Every run is a fresh process; they take turns, and those that read every weight take theirs in the first round only:

cp        cp -r of the folder, and sync
copy      patch --no-verify with a recipe, shards copied: tracing, writing, fsync
link      the same with --link: hard links
hashed    copy, of a folder without the Hub's records: every shard is read, hashed and searched for NaN as well
verified  patch with --link and verification on 8 images, all of that and weights read from disk operator by operator
verify    verify of such a folder on 8 images, weights read from disk
native    patch --no-verify --mode native, fitted on 128 generated images, weights read from disk

Memory is the peak resident size (VmHWM) of the process. Reads are the bytes that it read (rchar), less those of `link`,
which reads no weights, over those of the weights; so what comes from the cache of the system counts, too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from regsurgery.errors import RegsurgeryError

WIDTH, NARROW, IMAGE, PATCH = 3200, 1024, 56, 14
NARROW_BELOW = 0.5  # GB
PUSHED_OUT_FROM = 4.0  # GB
# Of the suite: sizes in GB and rounds; 12 GB, which takes half an hour, only with `--large`.
FORMS = {"full": ((0.1, 1.0), 2), "short": ((0.1,), 1), "smoke": ((0.02,), 1)}
RECORDED = Path(__file__).with_name("write.json")
ONCE = ("hashed", "verified", "verify", "native")
COMMAND_RUN = """
import atexit, re, sys, time
from pathlib import Path
from regsurgery.__main__ import run

def tell():
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    read = re.search(r"rchar: (\\d+)", Path("/proc/self/io").read_text())
    print(time.process_time(), peak[1], read[1], file=sys.stderr)

atexit.register(tell)
sys.argv = ["regsurgery", *sys.argv[1:]]
run()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=12.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the files go; by default a temporary folder")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures there")
    args = parser.parse_args()
    report = compare(args.gigabytes, args.rounds, args.folder)
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(form: str, device: str, seconds: float, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The suite's part `patch`; yields the figures so far after every size, the last ones are the result."""
    sizes, rounds = FORMS[form.removesuffix("-large")]
    figures: dict[str, Any] = {"sizes": []}
    if RECORDED.is_file():
        figures["recorded"] = json.loads(RECORDED.read_text("utf-8"))
    for gigabytes in (*sizes, *([12.0] if form.endswith("-large") else [])):
        figures["sizes"].append(compare(gigabytes, rounds, None))
        say(f"{gigabytes} GB: {figures['sizes'][-1]['copy']['seconds']:.1f} s")
        yield figures


def compare(gigabytes: float, rounds: int, parent: Path | None) -> dict[str, Any]:
    """Medians of every run, for a checkpoint of that size; its files go into a new folder in `parent`."""
    with tempfile.TemporaryDirectory(prefix="regsurgery-", dir=parent) as scratch:
        root = Path(scratch)
        source = root / "source"
        make(source, gigabytes)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        recipe = root / "recipe.yaml"
        recipe.write_text("schema: 1\nregister_neurons: {0: [417]}\n")
        common = ["patch", str(source), "--recipe", str(recipe), "-q", "-o"]
        copy, stored = [*common, str(root / "out"), "--no-verify"], ["--max-memory", "0"]
        few = ["--num-images", "8", *stored]
        runs: dict[str, list[str]] = {
            "copy": copy,
            "link": [*copy, "--link"],
            "hashed": copy,
            "verified": [*common, str(root / "out"), "--link", *few],
            "verify": ["verify", str(root / "linked"), "-q", *few],
            "native": [*copy, "--mode", "native", *stored],
        }
        run(*common, str(root / "linked"), "--no-verify", "--link")
        always = gigabytes >= PUSHED_OUT_FROM
        if not always:
            warm(source)
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in ("cp", *runs)}
        for _ in range(rounds):
            prepare(source, warm_too=always)
            figures["cp"].append(copied(source, root / "out"))
            for name, command in runs.items():
                if name in ONCE and figures[name]:
                    continue
                recorded = (source / ".cache", root / "records")
                if name == "hashed":
                    recorded[0].rename(recorded[1])
                prepare(source, warm_too=always)
                figures[name].append(ran(root / "out", command))
                if name == "hashed":
                    recorded[1].rename(recorded[0])
    return {
        "gigabytes": round(size / 1e9, 2),
        "blocks": blocks(gigabytes),
        "machine": {"cores": os.cpu_count(), "load_average": [round(value, 2) for value in os.getloadavg()[:2]]},
        **{name: summary(values, figures, size) for name, values in figures.items()},
    }


def blocks(gigabytes: float) -> int:
    return max(1, round(gigabytes * 1e9 / (4 * 12 * width(gigabytes) ** 2)))  # float32; an MLP four times as wide


def width(gigabytes: float) -> int:
    return NARROW if gigabytes < NARROW_BELOW else WIDTH


def make(folder: Path, gigabytes: float) -> None:
    """Write the checkpoint shard by shard; at no time more than one block is in memory."""
    import torch
    import transformers
    from huggingface_hub import _local_folder
    from safetensors.torch import load_file, save_file

    from regsurgery.checkpoints.sums import sha256

    wide = width(gigabytes)
    transformers.utils.logging.disable_progress_bar()
    config = transformers.ViTConfig(
        hidden_size=wide, intermediate_size=4 * wide, num_attention_heads=wide // 128,
        image_size=IMAGE, patch_size=PATCH,
        num_hidden_layers=1, dtype="float32", architectures=["ViTModel"],
    )  # fmt: skip
    torch.manual_seed(0)
    one = folder.with_name("one-block")
    transformers.ViTModel(config).save_pretrained(one)
    state = load_file(one / "model.safetensors")
    shutil.rmtree(one)
    folder.mkdir()
    config.num_hidden_layers = blocks(gigabytes)
    config.save_pretrained(folder)
    inside = {name: value for name, value in state.items() if ".layer.0." in name}
    assert inside, "names of a block"
    outside = {name: value for name, value in state.items() if name not in inside}
    total = config.num_hidden_layers + 1
    weight_map: dict[str, str] = {}
    for number in range(total):
        shard = f"model-{number + 1:05}-of-{total:05}.safetensors"
        if number == 0:
            tensors = outside
        else:
            tensors = {
                name.replace(".layer.0.", f".layer.{number - 1}."): 0.02 * torch.randn_like(value)
                if value.ndim == 2 else value
                for name, value in inside.items()
            }  # fmt: skip
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for path in folder.glob("*.safetensors"):
        _local_folder.write_download_metadata(folder, path.name, "0" * 40, sha256(path))


def warm(folder: Path) -> None:
    """A dry run, which brings the libraries into the cache of the system."""
    recipe = ["--recipe", str(folder.with_name("recipe.yaml"))]
    run("patch", str(folder), *recipe, "-q", "-o", str(folder.with_name("dry")), "--no-verify", "--dry-run")


def prepare(folder: Path, *, warm_too: bool) -> None:
    """Nothing unwritten, the libraries in the cache of the system, no page of the folder there."""
    os.sync()
    if warm_too:
        warm(folder)
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copied(source: Path, out: Path) -> dict[str, float]:
    started = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    seconds = time.monotonic() - started
    os.sync()
    synced = time.monotonic() - started
    shutil.rmtree(out)
    return {"seconds": seconds, "with_sync": synced}


def ran(out: Path, command: list[str]) -> dict[str, float]:
    started = time.monotonic()
    found = run(*command)
    seconds = time.monotonic() - started
    if out.exists():
        shutil.rmtree(out)
    return {"seconds": seconds, **found}


def run(*command: str) -> dict[str, float]:
    """Run it; its CPU seconds, its peak memory in MB, and the bytes that it read."""
    done = subprocess.run([sys.executable, "-c", COMMAND_RUN, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RegsurgeryError(f"{command[0]} failed: {done.stderr[-2000:]}")
    cpu, peak, read = done.stderr.split()[-3:]
    return {"cpu_seconds": float(cpu), "peak_mb": int(peak) / 1024, "read": float(read)}


def summary(values: list[dict[str, float]], figures: dict[str, list[dict[str, float]]], size: int) -> dict[str, Any]:
    found: dict[str, Any] = {key: round(statistics.median(v[key] for v in values), 2) for key in values[0]}
    pairs = zip(values, figures["cp"], strict=False)  # of ONCE there are fewer
    found["of_cp"] = round(statistics.median(v["seconds"] / c["seconds"] for v, c in pairs), 3)
    if "read" in found:
        least = statistics.median(v["read"] for v in figures["link"])
        found["reads"] = round((found.pop("read") - least) / size, 2)
    return found


def show(report: dict[str, Any]) -> None:
    print(f"{report['gigabytes']} GB, {report['blocks']} blocks; medians")
    for name in ("cp", "copy", "link", *ONCE):
        row = report[name]
        more = f"{row['with_sync']:.1f} s with sync" if name == "cp" else (
            f"CPU {row['cpu_seconds']:.1f} s, peak {row['peak_mb']:.0f} MB, weights read {row['reads']:.2f} times"
        )  # fmt: skip
        print(f"{name:10} {row['seconds']:8.1f} s   {row['of_cp']:.2f} of cp   {more}")


if __name__ == "__main__":
    main()
