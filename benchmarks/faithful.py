"""How faithful is what `regsurgery patch` chooses: on unseen photos, not by its own figures.

    python -m benchmarks.faithful real MODEL MODEL … --search calibration --photos labelled --voc voc2007-subset
    python -m benchmarks.faithful PART MODEL --search calibration --photos labelled     # every other part

real     patch without a recipe, neurons found on photos and on generated pictures: KL divergence to the original, same
         first class, top-1 (labels are the numbers before `_` in file names), outlier tokens; with VOC, LOST
sizes    the same at 224, 336 and 448 pixels, every second photo, resized to 1.1 times the size and cropped
native   native mode: closed form and calibrated, with the chosen and with given numbers of registers
splits   ten random divisions of all photos: neurons found on one part, drift on the other, and the paper's setting
kinds    the kind of images: photos, crops of six of them, generated pictures (dead leaves). What is found on each, and
         how far shift and native mode, closed form and calibrated, drift on photos
planted  DINOv2-S with planted register neurons (`--plant`: a script that takes SRC OUT K BLOCKS SEED and prints where
         it planted them): are they found, and how near are the patches to those of the network before planting

Models are run by their own libraries: the original from its folder, the patched one from what was written. Norms are
read with hooks on the block outputs. Outliers: patches above 5 times the median of their image, after the last block
but one.

Shape suffixes: B images, N patches, C classes, D width.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms import v2

import regsurgery
from regsurgery.frontends.config import read_config
from regsurgery.frontends.load import load

BATCH = 25
SPLITS, SEEDS = 10, 10
SIZES = (224, 336, 448)
OUTLIER = 5.0


@dataclass(frozen=True)
class Seen:
    """What a classifier gives for B photos: logits `[B, C]` and patch norms `[B, N]`."""

    logits: Tensor
    norms: Tensor


def photos_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))


def pixels(paths: Sequence[Path], size: int, mean: Sequence[float], std: Sequence[float], ratio: float = 1.1) -> Tensor:
    """The photos, short side resized to `ratio` times `size` and cropped, normalised, `[B, 3, size, size]`."""
    transform = v2.Compose(
        [
            v2.Resize(round(ratio * size), v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(size),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(mean), list(std)),
        ]
    )
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


@torch.no_grad()
def run(library: str, model: nn.Module, source: Path, images: Tensor) -> Seen:
    """`model`, of the kind of the checkpoint `source`, on `images`."""
    blocks = _blocks(model)
    norms: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        tokens_BTD = output[0] if isinstance(output, tuple) else output
        norms.append(tokens_BTD.norm(dim=-1))

    handle = blocks[-2].register_forward_hook(hook)
    logits = torch.cat([_logits(library, model, source, batch) for batch in images.split(BATCH)])
    handle.remove()
    return Seen(logits, torch.cat(norms))


def _blocks(model: nn.Module) -> nn.ModuleList | nn.Sequential:
    """The list of transformer blocks: the longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    return max(lists, key=len)


def _logits(library: str, model: nn.Module, source: Path, images: Tensor) -> Tensor:
    if library == "timm":
        return model(images)
    if library == "transformers":
        own = tuple(images.shape[-2:]) == (SIZES[0], SIZES[0])
        return model(pixel_values=images, **({} if own else {"interpolate_pos_encoding": True})).logits
    head = load_file(source / "zero_shot_head.safetensors")
    return model.encode_image(images) @ head["class_embeddings"].T + head["class_bias"]  # type: ignore[operator]


def figures(original: Seen, patched: Seen, num_patches: int, prefix: int, labels: Tensor | None) -> dict[str, float]:
    """The figures of a patched classifier; its patches stand after `prefix` prefix tokens, registers included."""
    kl_B = F.kl_div(
        patched.logits.log_softmax(-1), original.logits.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    norms_BN = patched.norms[:, prefix : prefix + num_patches]
    found = {
        "KL": float(kl_B.mean()),
        "se": float(kl_B.std() / len(kl_B) ** 0.5),
        "same": float((original.logits.argmax(-1) == patched.logits.argmax(-1)).float().mean()),
        "outliers": float((norms_BN > OUTLIER * norms_BN.median(dim=1, keepdim=True).values).float().sum(dim=1).mean()),
    }
    if labels is not None:
        found["top-1"] = float((patched.logits.argmax(-1) == labels).float().mean())
    return found


@dataclass(frozen=True)
class Subject:
    """A classifier, its photos, and what it gives for them.

    Attributes:
        preprocess: photos -> pixels, the model's own at its size.
    """

    source: Path
    library: str
    photos: tuple[Path, ...]
    images: Tensor
    labels: Tensor
    seen: Seen

    @classmethod
    def of(cls, source: Path, photos: Path) -> Subject:
        loaded = load(str(source))
        paths = tuple(photos_of(photos))
        images = torch.cat([loaded.preprocess([Image.open(path).convert("RGB")]) for path in paths])
        labels = torch.tensor([int(path.name.partition("_")[0]) for path in paths])
        return cls(source, loaded.library, paths, images, labels, run(loaded.library, loaded.model, source, images))

    def compare(self, model: nn.Module, prefix: int = 1) -> dict[str, float]:
        """`model`, patched, on the photos."""
        num_patches = self.seen.norms.shape[1] - 1
        return figures(self.seen, run(self.library, model, self.source, self.images), num_patches, prefix, self.labels)


def real(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for source in args.models:
        subject = Subject.of(source, args.photos)
        top_1 = float((subject.seen.logits.argmax(-1) == subject.labels).float().mean())
        print(f"{source.name}: {len(subject.photos)} photos, top-1 of the original {top_1:.3f}")
        for name, given in (("photos", {"images": args.search}), ("generated pictures", {}),
                            ("paper's setting", {"images": args.search, "smallest": True})):  # fmt: skip
            folder = args.scratch / f"{source.name}-{name.partition(' ')[0]}"
            started = time.perf_counter()
            result = regsurgery.patch(str(source), folder, **given)
            row = {
                "neurons": _text_of(result.recipe),
                "registers": result.recipe.num_registers,
                "fill": result.recipe.fill,
                **subject.compare(regsurgery.load(folder)),
                "seconds": time.perf_counter() - started,
            }
            if args.voc is not None:
                kept = regsurgery.evaluate(folder, "lost", images=args.voc, block=8, kind=["keys"], bias=[-0.2]).rows
                row["LOST"] = next(one.patched.value for one in kept if one.patched is not None)
            found[f"{source.name}, {name}"] = row
            _print(name, row)
    return found


def sizes(args: argparse.Namespace) -> dict[str, Any]:
    (source,) = args.models
    paths = photos_of(args.photos)[::2]
    library, _, _ = read_config(source)
    folder = args.scratch / "sizes"
    result = regsurgery.patch(str(source), folder, images=args.search)
    print(f"{source.name}: {_text_of(result.recipe)}, {result.recipe.num_registers} registers; {len(paths)} photos")
    found: dict[str, Any] = {}
    for size in SIZES:
        images = pixels(paths, size, (0.5,) * 3, (0.5,) * 3)
        models = _at_any_size(library, source, folder)
        original, patched = (run(library, model, source, images) for model in models)
        found[str(size)] = figures(original, patched, original.norms.shape[1] - 1, 1, None)
        _print(f"{size} pixels", found[str(size)])
    return found


def _at_any_size(library: str, source: Path, folder: Path) -> tuple[nn.Module, nn.Module]:
    """Original and patched model, which take any image size."""
    if library == "timm":
        import timm

        original = timm.create_model(f"local-dir:{source}", pretrained=True, dynamic_img_size=True).eval()
        code: dict[str, Any] = {"__name__": "patched", "__file__": str(folder / "modeling_regsurgery.py")}
        exec((folder / "modeling_regsurgery.py").read_text("utf-8"), code)
        return original, code["load"](str(folder), dynamic_img_size=True).eval()
    return load(str(source)).model, regsurgery.load(folder)


def native(args: argparse.Namespace) -> dict[str, Any]:
    import timm

    (source,) = args.models
    subject = Subject.of(source, args.photos)
    found: dict[str, Any] = {}
    for name, given in (("closed form", {"calibrate": False}), ("calibrated", {"calibrate": True}),
                        ("calibrated, 2 registers", {"calibrate": True, "num_registers": 2}),
                        ("calibrated, 4 registers", {"calibrate": True, "num_registers": 4})):  # fmt: skip
        folder = args.scratch / name.replace(" ", "-").replace(",", "")
        started = time.perf_counter()
        result = regsurgery.patch(str(source), folder, images=args.search, mode="native", format="timm", **given)
        seconds = time.perf_counter() - started
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        count = result.recipe.num_registers
        found[name] = {"registers": count, **subject.compare(model, 1 + count), "seconds": seconds}
        _print(name, found[name])
    return found


def splits(args: argparse.Namespace) -> dict[str, Any]:
    (source,) = args.models
    everything = [*photos_of(args.search), *photos_of(args.photos)]
    loaded = load(str(source))
    images = torch.cat([loaded.preprocess([Image.open(path).convert("RGB")]) for path in everything])
    original = run(loaded.library, loaded.model, source, images)
    num_patches = original.norms.shape[1] - 1
    found: dict[str, Any] = {}
    for seed in range(SPLITS):
        order = random.Random(seed).sample(range(len(everything)), len(everything))
        searched, held_out = sorted(order[: len(photos_of(args.search))]), sorted(order[len(photos_of(args.search)) :])
        pool = args.scratch / f"split-{seed}"
        pool.mkdir()
        for number in searched:
            (pool / everything[number].name).symlink_to(everything[number].resolve())
        recipe = regsurgery.find(str(source), images=pool).recipe
        row: dict[str, Any] = {"neurons": _text_of(recipe), "registers": recipe.num_registers, "fill": recipe.fill}
        kept = Seen(original.logits[held_out], original.norms[held_out])
        settings = {"chosen": recipe, "paper": recipe.papers_setting() or recipe}
        for name, setting in settings.items():
            folder = args.scratch / f"split-{seed}-{name}"
            regsurgery.patch(str(source), folder, recipe=setting, verification=False)
            patched = run(loaded.library, regsurgery.load(folder), source, images[held_out])
            row |= {f"{name} {key}": value for key, value in figures(kept, patched, num_patches, 1, None).items()}
        found[f"split {seed}"] = row
        _print(f"split {seed}", row)
    worse = sum(row["chosen KL"] > row["paper KL"] for row in found.values())
    sets = [row["neurons"] for row in found.values()]
    same = max(sets.count(one) for one in sets)
    print(f"worse than the paper's setting in {worse} of {SPLITS}; the same neurons in {same} of {SPLITS}")
    return {**found, "worse": worse, "same": same}


def kinds(args: argparse.Namespace) -> dict[str, Any]:
    crops = args.scratch / "crops"
    _write_crops(photos_of(args.search), crops)
    found: dict[str, Any] = {}
    for source in args.models:
        loaded = load(str(source))
        images = torch.cat([loaded.preprocess([Image.open(path).convert("RGB")]) for path in photos_of(args.photos)])
        original = _output(loaded.model, images)
        print(f"{source.name}: {len(images)} photos")
        for kind, given in (("photos", args.search), ("crops of six photos", crops), ("generated pictures", None)):
            recipe = regsurgery.find(str(source), images=given).recipe
            row: dict[str, Any] = {"neurons": _text_of(recipe), "registers": recipe.num_registers}
            for name, how in (
                ("shift", {}),
                ("closed form", {"mode": "native", "calibrate": False}),
                ("calibrated", {"mode": "native", "calibrate": True}),
            ):
                folder = args.scratch / f"{source.name}-{kind.partition(' ')[0]}-{name.partition(' ')[0]}"
                regsurgery.patch(str(source), folder, recipe=recipe, images=given, verification=False, **how)
                row[name] = _drift(original, _output(regsurgery.load(folder), images))
                fit = read_config(folder)[2]["regsurgery"].get("fit") or {}
                if fit.get("calibration"):
                    row |= {"steps kept": fit["calibration"]["steps"], "check": fit["calibration"].get("check")}
            found[f"{source.name}, {kind}"] = row
            _print(kind, row)
    return found


def _write_crops(paths: Sequence[Path], folder: Path, num_photos: int = 6, num_crops: int = 96) -> None:
    """Random crops, a fifth to all of the area, half of them mirrored, of evenly spread photos."""
    folder.mkdir()
    rng = random.Random(0)
    sources = [Image.open(paths[n * len(paths) // num_photos]).convert("RGB") for n in range(num_photos)]
    for number in range(num_crops):
        source = sources[number % num_photos]
        side = (0.2 + 0.8 * rng.random()) ** 0.5
        width, height = round(side * source.width), round(side * source.height)
        left, top = rng.randint(0, source.width - width), rng.randint(0, source.height - height)
        crop = source.crop((left, top, left + width, top + height))
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        crop.save(folder / f"{number:03}.png")


@torch.no_grad()
def _output(model: nn.Module, images: Tensor) -> Tensor:
    """Logits `[B, C]` of a classifier, else class token and patches `[B, 1 + N, D]`, registers left out."""
    found = []
    for batch in images.split(BATCH):
        output: Any = model(batch)
        if not isinstance(output, Tensor):
            output = output.logits if "logits" in output else output.last_hidden_state
        if output.ndim == 3:
            grid = (batch.shape[-1] // 14) * (batch.shape[-2] // 14)
            output = torch.cat((output[:, :1], output[:, -grid:]), dim=1)
        found.append(output)
    return torch.cat(found)


def _drift(original: Tensor, patched: Tensor) -> float:
    """KL divergence of classes, or what is missing to 1 of the mean cosine of the class token and of the patches."""
    if original.ndim == 2:
        return float(
            F.kl_div(patched.log_softmax(-1), original.log_softmax(-1), reduction="batchmean", log_target=True)
        )
    cosine_BT = F.cosine_similarity(original, patched, dim=-1)
    return float(2 - cosine_BT[:, 0].mean() - cosine_BT[:, 1:].mean())


def planted(args: argparse.Namespace) -> dict[str, Any]:
    (source,) = args.models
    paths = photos_of(args.photos)[::3]
    before = load(str(source))
    images = torch.cat([before.preprocess([Image.open(path).convert("RGB")]) for path in paths]).float()
    truth_BND = _patches(before.model.float(), images)
    found: dict[str, Any] = {}
    for seed in args.seeds:
        rng = random.Random(seed)
        blocks = sorted(rng.sample(range(4, 9), rng.randint(1, 3)))
        count = max(1, rng.randint(1, 12) // len(blocks))  # the tool plants as many in every block
        folder = args.scratch / f"planted-{seed}"
        command = [sys.executable, args.plant, source, folder, count, ",".join(map(str, blocks)), seed]
        printed = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
        there = {(b, n) for b, listed in ast.literal_eval(printed.partition("planted ")[2]).items() for n in listed}
        recipe = regsurgery.find(str(folder), images=args.search).recipe
        chosen = {(b, n) for b, listed in recipe.register_neurons.items() for n in listed}
        row: dict[str, Any] = {
            "planted": len(there),
            "blocks": len(blocks),
            "missed": len(there - chosen),
            "others": len(chosen - there),
            "registers": recipe.num_registers,
            "fill": recipe.fill,
        }
        settings = {"chosen": recipe, "paper": recipe.papers_setting() or recipe}
        if chosen - there:
            without = {b: tuple(n for n in ns if (b, n) in there) for b, ns in recipe.register_neurons.items()}
            settings["without others"] = regsurgery.Recipe(
                {b: n for b, n in without.items() if n},
                num_registers=recipe.num_registers,
                scale=recipe.scale,
                fill=recipe.fill,
            )
        cosines = {"planted": F.cosine_similarity(_patches(load(str(folder)).model, images), truth_BND, dim=-1)}
        drifts = {}
        own_BND = _patches(load(str(folder)).model, images)
        for name, setting in settings.items():
            output = args.scratch / f"planted-{seed}-{name.replace(' ', '-')}"
            regsurgery.patch(str(folder), output, recipe=setting, verification=False)
            cured_BND = _patches(regsurgery.load(output), images)
            cosines[name] = F.cosine_similarity(cured_BND, truth_BND, dim=-1)
            drifts[name] = F.cosine_similarity(cured_BND, own_BND, dim=-1)
        for name, cosine_BN in cosines.items():
            row[f"truth, {name}"] = float(cosine_BN.mean())
        gain_B = (cosines["chosen"] - cosines["paper"]).mean(dim=1)
        row["nearer by"], row["se"] = float(gain_B.mean()), float(gain_B.std() / len(gain_B) ** 0.5)
        if chosen - there:
            gain_B = (drifts["chosen"] - drifts["without others"]).mean(dim=1)
            row["others gain"], row["others se"] = float(gain_B.mean()), float(gain_B.std() / len(gain_B) ** 0.5)
        found[f"seed {seed}"] = row
        _print(f"seed {seed}", row)
    return found


@torch.no_grad()
def _patches(model: nn.Module, images: Tensor) -> Tensor:
    outputs = [model(pixel_values=batch).last_hidden_state[:, 1:] for batch in images.split(BATCH)]
    return torch.cat(outputs)


def _text_of(recipe: regsurgery.Recipe) -> str:
    return " ".join(f"{block}:{neuron}" for block, listed in recipe.register_neurons.items() for neuron in listed)


def _print(name: str, row: dict[str, Any]) -> None:
    cells = [f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()]
    print(f"  {name:24} " + "; ".join(cells), flush=True)


PARTS = {"real": real, "sizes": sizes, "native": native, "splits": splits, "kinds": kinds, "planted": planted}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--search", type=Path, required=True, help="photos to search and fit on")
    parser.add_argument("--photos", type=Path, required=True, help="photos to measure on; none of the others")
    parser.add_argument("--voc", type=Path, help="VOC images and boxes, for LOST")
    parser.add_argument("--plant", type=Path, help="planted: the script that plants")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(SEEDS), help="planted: which (default: 0 to 9)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures there, beside those of other parts"
    )
    args = parser.parse_args()
    kept = json.loads(args.json.read_text("utf-8")) if args.json and args.json.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="regsurgery-") as scratch:
        args.scratch = Path(scratch)
        found = PARTS[args.part](args)
        kept[args.part] = {**kept.get(args.part, {}), **found}  # seeds may be run one by one
    if args.json:
        args.json.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
