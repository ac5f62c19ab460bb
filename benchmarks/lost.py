"""Unsupervised object discovery with LOST: CorLoc of timm vision transformers, original against patched.

    python benchmarks/lost.py original=DIR native=DIR shift=DIR --images voc2007-subset

Each DIR is a timm folder: a stock one (native mode is stock), or one of mode shift or bias with its loader file. Images
are taken at their own size, cut to whole patches. Features are the keys or values of one of the last four blocks, at
length 1; their similarities plus a bias make the graph. CorLoc: share of the images whose box has an IoU of 0.5 or more
with one of the objects'. Source: Simeoni et al., Localizing Objects with Self-Supervised Transformers and no Labels,
arXiv 2109.14279, section 3; the bias is that of Jiang et al., arXiv 2506.08010.

Shape suffixes: N patches, D width.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from scipy import ndimage
from timm.data.config import resolve_model_data_config
from torch import Tensor
from torchvision.transforms import v2

LAST_BLOCKS = 4
BIASES = (0.0, -0.2, -0.4)
SEED_NEIGHBOURS = 100  # k of LOST
MIN_IOU = 0.5
KINDS = ("keys", "values")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="in VOC layout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    args = parser.parse_args()
    figures = {name: corloc(folder, args.images) for name, _, folder in (given.partition("=") for given in args.models)}
    settings = list(next(iter(figures.values())))
    print(f"{'CorLoc':28}" + "".join(f"{name:>12}" for name in figures))
    for setting in settings:
        print(f"{setting:28}" + "".join(f"{figures[name][setting]:12.1f}" for name in figures))
    print(f"{'best':28}" + "".join(f"{max(figures[name].values()):12.1f}" for name in figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


@torch.no_grad()
def corloc(folder: str, images: Path) -> dict[str, float]:
    """CorLoc in per cent for every block, kind of feature and bias."""
    model = _model(Path(folder))
    data = resolve_model_data_config(model)
    normalise = v2.Normalize(list(data["mean"]), list(data["std"]))
    patch = model.patch_embed.patch_size[0]
    depth = len(model.blocks)
    kept: dict[int, Tensor] = {}
    for index in range(depth - LAST_BLOCKS, depth):
        model.blocks[index].attn.qkv.register_forward_hook(
            lambda module, inputs, output, index=index: kept.__setitem__(index, output[0])
        )
    hits: dict[str, list[bool]] = {}
    for path in sorted(images.rglob("*.jpg")):
        pixels = v2.functional.to_dtype(v2.functional.pil_to_tensor(Image.open(path).convert("RGB")), scale=True)
        height, width = (size // patch for size in pixels.shape[1:])
        model(normalise(pixels[:, : height * patch, : width * patch])[None])
        objects = _objects(images, path.stem)
        for (index, qkv_TD), kind in itertools.product(kept.items(), KINDS):
            features_TD = qkv_TD.chunk(3, dim=-1)[1 + KINDS.index(kind)]
            first = model.num_prefix_tokens  # registers of mode shift are behind the patches
            features_ND = torch.nn.functional.normalize(features_TD[first : first + height * width], dim=-1)
            for bias in BIASES:
                box = lost(features_ND @ features_ND.T + bias, height, width)
                found = any(_iou([edge * patch for edge in box], other) >= MIN_IOU for other in objects)
                hits.setdefault(f"block {index} {kind}, bias {bias}", []).append(found)
    return {setting: 100 * float(np.mean(found)) for setting, found in hits.items()}


def lost(similarity_NN: Tensor, height: int, width: int) -> list[int]:
    """The box `[left, top, right, bottom]`, in patches, that LOST draws; its seed is similar to the fewest patches."""
    degrees_N = (similarity_NN.clone().fill_diagonal_(0) > 0).sum(dim=1)
    order_N = degrees_N.argsort(stable=True)
    seed = int(order_N[0])
    candidates = order_N[:SEED_NEIGHBOURS]
    similar = candidates[similarity_NN[seed, candidates] > 0]
    mask = (similarity_NN[similar].sum(dim=0) > 0).reshape(height, width).numpy()
    regions: Any = ndimage.label(mask)[0]
    row, column = divmod(seed, width)
    if regions[row, column] == 0:
        return [column, row, column + 1, row + 1]
    rows, columns = np.where(regions == regions[row, column])
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def _model(folder: Path) -> Any:
    loader = folder / "modeling_regsurgery.py"
    if not loader.is_file():
        return timm.create_model(f"local-dir:{folder}", pretrained=True, dynamic_img_size=True).eval()
    spec = importlib.util.spec_from_file_location("modeling_regsurgery", loader)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(folder, dynamic_img_size=True)


def _objects(images: Path, stem: str) -> list[list[float]]:
    annotation = next(images.rglob(f"{stem}.xml"))
    edges = ("xmin", "ymin", "xmax", "ymax")
    return [[float(box.findtext(edge, "0")) for edge in edges] for box in ET.parse(annotation).iter("bndbox")]


def _iou(one: list[float], other: list[float]) -> float:
    sides = [max(0.0, min(one[2 + i], other[2 + i]) - max(one[i], other[i])) for i in (0, 1)]
    shared = sides[0] * sides[1]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return shared / (areas[0] + areas[1] - shared)


if __name__ == "__main__":
    main()
