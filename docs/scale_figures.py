"""The figures of docs/scale.md, which is a simulation on paper: `python docs/scale_figures.py`.

`--rehearsal` prints what `python -m benchmarks --only rehearsal` measured, from benchmarks/rehearsal.json.
`--decode MODEL DIR` measures instead, on this machine, the CPU seconds that one image of DIR takes to be read, decoded
and preprocessed for MODEL.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

IMAGES, BYTES = 14_197_122, 1.3e12  # ImageNet-22k (Fall 2011 release); the size of its JPEG files
GPUS, WORKERS = 64, 8  # one process a GPU; decoding workers of each, `image_set.MAX_WORKERS`
TAR_BYTES = 1e9  # of a WebDataset tar
PILOT = 32  # images
REHEARSAL = Path(__file__).resolve().parents[1] / "benchmarks" / "rehearsal.json"
COMMANDS = ("doctor", "find", "patch", "verify")
HEADER_BYTES, INDEX_SECONDS = 4100, 52e-6  # to look up one sample of a tar; measured, see docs/scale.md
ENTRY_BYTES = 45  # memory for one sample's name and place; measured, too
MODELS = {"ViT-B/16": (12, 3072), "ViT-L/14": (24, 4096), "ViT-g/14": (40, 6144)}  # blocks, hidden units
GPU_RATES = (100, 400, 1600)  # images/s of one GPU in the scoring pass: assumed
DECODE_SECONDS = (0.004, 0.008, 0.016)  # CPU seconds an image: assumed; measure yours with --decode


def statistics_bytes(hidden_sizes: list[int]) -> int:
    """Tensor data of a statistics file: three float64 sums a neuron of every scored block, and four counts."""
    return 8 * (3 * sum(hidden_sizes) + 4)


def shares() -> str:
    per_gpu, num_tars = IMAGES / GPUS, math.ceil(BYTES / TAR_BYTES)
    most_tars = math.ceil(num_tars / GPUS)
    largest = most_tars / num_tars * IMAGES
    rows = (
        ("images a GPU, mean", f"{per_gpu:,.0f}"),
        ("tars", f"{num_tars:,}"),
        ("tars of the largest part", f"{most_tars}"),
        ("images of the largest part", f"{largest:,.0f} ({largest / per_gpu - 1:+.1%})"),
        ("image bytes of the largest part", f"{most_tars * TAR_BYTES / 1e9:.1f} GB"),
        ("to index its tars, before that", f"{largest * HEADER_BYTES / 1e9:.2f} GB, {largest * INDEX_SECONDS:.0f} s"),
        ("memory of its index", f"{largest * ENTRY_BYTES / 1e6:.0f} MB"),
        ("image bytes of all parts", f"{BYTES / 1e12:.2f} TB, each image once"),
        ("pilot, in every part", f"the first image of {PILOT} tars"),
    )
    return table(("quantity", "value"), rows)


def hours() -> str:
    largest = math.ceil(math.ceil(BYTES / TAR_BYTES) / GPUS) * TAR_BYTES / BYTES * IMAGES
    rows = []
    for decode in DECODE_SECONDS:
        cells = []
        for rate in GPU_RATES:
            seconds = largest * (INDEX_SECONDS + max(1 / rate, decode / WORKERS))
            read = largest * BYTES / IMAGES / seconds
            limit = "decoding" if decode / WORKERS > 1 / rate else "GPU"
            cells.append(f"{seconds / 3600:.2f} h, {read / 1e6:.0f} MB/s ({limit})")
        rows.append((f"{1000 * decode:g} ms", *cells))
    return table(("CPU time an image", *(f"{rate} images/s a GPU" for rate in GPU_RATES)), rows)


def merges() -> str:
    rows = []
    for name, (blocks, hidden) in MODELS.items():
        size = statistics_bytes([hidden] * (blocks - 1))
        rows.append((name, f"{size / 1e6:.2f} MB", f"{GPUS * size / 1e6:.0f} MB"))
    return table(("model", "a statistics file, at most", f"read by the merge of {GPUS}"), rows)


def table(names: tuple[str, ...], rows: object) -> str:
    assert isinstance(rows, (list, tuple))
    lines = [names, ("---",) * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figures() -> dict[str, str]:
    return {"shares": shares(), "hours": hours(), "merges": merges()}


def rehearsal() -> str:
    rows = []
    for record in json.loads(REHEARSAL.read_text("utf-8")).values():
        steps = [record["steps"][command] for command in COMMANDS]
        most = {key: max(step[key] for step in steps) * 2**20 / 1e9 for key in ("peak_mb", "own_mb")}
        rows.append((
            f"{record['name']}, {record['dtype']}", f"{record['gigabytes']:.1f} GB",
            *(f"{step['seconds']:.0f} ({step['cpu_seconds']:.0f})" for step in steps),
            f"{most['peak_mb']:.1f} GB ({most['own_mb']:.1f})",
        ))  # fmt: skip
    return table(("model", "checkpoint", *(f"`{command}`" for command in COMMANDS), "memory"), rows)


def decode_seconds(model: str, where: Path) -> float:
    from regsurgery.frontends.load import load
    from regsurgery.images.decoding import decode
    from regsurgery.images.image_set import image_set

    preprocess, images = load(model).preprocess, image_set(where)
    contents = [content for _, content in images.source.items(images.chosen)]
    preprocess([decode(contents[0])])
    started = time.process_time()
    for content in contents:
        preprocess([decode(content)])
    return (time.process_time() - started) / len(contents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decode", nargs=2, metavar=("MODEL", "DIR"))
    parser.add_argument("--rehearsal", action="store_true")
    args = parser.parse_args()
    if args.decode:
        print(f"{1000 * decode_seconds(args.decode[0], Path(args.decode[1])):.1f} ms of CPU time an image")
    elif args.rehearsal:
        print(rehearsal())
    else:
        print("\n\n".join(figures().values()))


if __name__ == "__main__":
    main()
