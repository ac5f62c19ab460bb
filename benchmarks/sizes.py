"""Drift at other image sizes: registers that follow the number of patches, against fixed numbers of them.

    python benchmarks/sizes.py MODEL IMAGES --neurons 6:189 7:417 --json benchmarks/sizes.json

MODEL is patched once for every way, in mode shift; each folder is loaded by its own loader file and run beside the
original at every size, on every second photo of IMAGES by name: short side resized to 1.1 times the size, centre crop.
Figures: KL divergence to the original, mean and standard error, and the photos whose first class stays. Works for
classifiers of timm and transformers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from regsurgery.commands.patch import patch
from regsurgery.compiler.comparison import kl_divergence
from regsurgery.frontends.libraries import frontend
from regsurgery.frontends.load import load
from regsurgery.frontends.loaded import Loaded
from regsurgery.models import open_model
from regsurgery.options import LoadOptions
from regsurgery.recipe import Recipe
from regsurgery.verification.pair import normalisation, pixels_of
from regsurgery.verification.patched import read_patched_config, rebuilt

BATCH = 8
MARGIN = 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="folder of a classifier, in timm or transformers")
    parser.add_argument("images", type=Path, help="folder of photos")
    parser.add_argument("--neurons", nargs="+", default=["6:189", "7:417"], metavar="BLOCK:NEURON")
    parser.add_argument("--registers", nargs="+", type=int, default=[2, 3, 4], help="fixed numbers of them")
    parser.add_argument("--growing", nargs="+", type=int, default=[2, 3], help="numbers at the model's own size")
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 336, 448], help="pixels a side")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, beside other libraries'")
    args = parser.parse_args()
    loaded = load(args.model)
    photos = sorted(path for path in args.images.iterdir() if path.is_file())[::2]
    num_patches = _num_patches(args.model)
    ways = {f"R = {number}, growing": (number, num_patches) for number in args.growing}
    ways |= {f"R = {number}, fixed": (number, None) for number in args.registers}
    figures: dict[str, dict[str, Any]] = {}
    print(f"{loaded.library}, {len(photos)} photos{'':6}" + "".join(f"{size:>28}" for size in args.sizes))
    with tempfile.TemporaryDirectory(prefix="regsurgery-") as scratch:
        for index, (name, (number, per)) in enumerate(ways.items()):
            recipe = Recipe(
                _neurons(args.neurons), num_registers=number, num_patches=per, scale=(1.0,) * number
            )  # fmt: skip
            folder = Path(scratch) / str(index)
            patch(args.model, folder, recipe=recipe, verification=False)
            figures[name] = {str(size): _measured(loaded, folder, photos, size) for size in args.sizes}
            print(f"{name:28}" + "".join(f"{_text(found):>28}" for found in figures[name].values()), flush=True)
    if args.json:
        known = json.loads(args.json.read_text("utf-8")) if args.json.is_file() else {}
        args.json.write_text(json.dumps({**known, loaded.library: figures}, indent=2) + "\n", "utf-8")


def _neurons(listed: list[str]) -> dict[int, tuple[int, ...]]:
    pairs = sorted(tuple(map(int, pair.split(":"))) for pair in listed)
    return {block: tuple(neuron for at, neuron in pairs if at == block) for block, _ in pairs}


def _num_patches(model: str) -> int:
    sites = open_model(model, LoadOptions()).sites
    return sites.num_tokens - sites.num_prefix


@torch.no_grad()
def _measured(loaded: Loaded, folder: Path, photos: list[Path], size: int) -> dict[str, Any]:
    original = frontend(loaded.library).at_size(loaded, (size, size))
    config = read_patched_config(folder, loaded.library)
    patched = rebuilt(folder, config, loaded.library, stored=False, image_size=(size, size))
    mean_311, scale_311 = normalisation(loaded)
    divergences, same = [], 0
    for start in range(0, len(photos), BATCH):
        pixels = torch.stack([_cropped(path, size) for path in photos[start : start + BATCH]])
        images = (pixels - mean_311) * scale_311
        (before,), (after,) = (original.call(model, images).values() for model in (original.model, patched))
        divergences.append(kl_divergence(before, after))
        same += int((before.argmax(-1) == after.argmax(-1)).sum())
    values = torch.cat(divergences).double()
    return {
        "kl": float(values.mean()),
        "standard_error": float(values.std() / len(values) ** 0.5),
        "same": same,
        "images": len(values),
    }


def _cropped(path: Path, size: int) -> Tensor:
    image: Any = Image.open(path).convert("RGB")  # torchvision's functions take it, and say that they take tensors
    short = round(MARGIN * size)
    image = functional.resize(image, [short], interpolation=functional.InterpolationMode.BICUBIC)
    middle: Any = functional.center_crop(image, [size, size])
    return pixels_of(middle)


def _text(found: dict[str, Any]) -> str:
    return f"{found['kl']:.4f} ± {found['standard_error']:.4f}, {found['same']}/{found['images']}"


if __name__ == "__main__":
    main()
