"""Dense tasks of `eval`, frozen features and `shift-map` on the patched demo; some of them on photos."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

import regsurgery
from regsurgery.cli.app import main
from regsurgery.errors import UserError
from regsurgery.evaluation import discovery
from regsurgery.evaluation.evaluate import evaluate
from regsurgery.evaluation.result import Evaluation, Result
from regsurgery.evaluation.tasks import task_module
from regsurgery.images.generated import dead_leaves
from regsurgery.images.image_set import image_set
from regsurgery.interval import Row
from regsurgery.progress import Progress
from regsurgery.recipe import Recipe
from regsurgery.verification.pair import Pair, open_pair
from tests.conftest import shared
from tests.unit.test_discovery import annotation, box, naive_box

BLOCK, BIAS, PATCH = 2, -0.2, 8
SIZES = ((96, 96), (130, 81), (130, 81), (86, 120), (96, 96), (96, 96))


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("discovery") / "patched"
    regsurgery.patch("demo", folder, recipe="demo", verification=False)
    return folder


@pytest.fixture(scope="module")
def pair(patched: Path) -> Iterator[Pair]:
    """Opened once: that takes longer than most tasks."""
    with open_pair(patched) as opened:
        yield opened


def figures(pair: Pair, task: str, images: Path, **settings: Any) -> tuple[Result, dict[str, Row]]:
    found = task_module(task).evaluate(pair, image_set(images), progress=Progress(), seed=0, **settings)
    return found, {row.name: row for row in found.rows}


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of three sizes, one of them without objects, and one that is no picture."""
    root = tmp_path_factory.mktemp("voc")
    (root / "JPEGImages").mkdir()
    (root / "Annotations").mkdir()
    for index, size in enumerate(SIZES):
        dead_leaves(random.Random(index), max(size)).crop((0, 0, *size)).save(root / "JPEGImages" / f"{index}.png")
        inside = (1, 1, size[0] // 2, size[1] // 2), (20, 8, 90, 70)
        objects = [f"<part>{box(1, 1, 9, 9)}</part>{box(*edges)}" for edges in inside] if index != 4 else []
        (root / "Annotations" / f"{index}.xml").write_text(annotation(*objects))
    (root / "JPEGImages" / "broken.png").write_bytes(b"no picture")
    (root / "Annotations" / "broken.xml").write_text(annotation(box(1, 1, 5, 5)))
    return root


def tell_apart(root: Path, per_class: int = 6) -> Path:
    """Red and blue noise, labelled by file name."""
    root.mkdir()
    rng = np.random.default_rng(0)
    for index in range(2 * per_class):
        pixels = rng.integers(0, 120, (96, 96, 3))
        pixels[..., 2 * (index % 2)] += 130
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(root / f"{index % 2:04d}_{index}.png")
    return root


def value(evaluation: Evaluation, name: str, side: str, **where: int | str) -> float:
    (row,) = evaluation.select(name, **where)
    return getattr(row, side).value


# --- lost -----------------------------------------------------------------------------------------------------------


@contextmanager
def keys_of(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    kept: list[torch.Tensor] = []
    keys = [module for name, module in model.named_modules() if name.endswith(("k_proj", "attention.key"))]
    hook = keys[BLOCK].register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        yield kept
    finally:
        hook.remove()


@torch.no_grad()
def expected_boxes(model: Any, root: Path) -> list[list[int]]:
    """The boxes of the written model, image by image, with a hook on the library's own module and LOST in loops."""
    drawn = []
    for index, (width, height) in enumerate(SIZES):
        rows, columns = height // PATCH, width // PATCH
        image = PIL.Image.open(root / "JPEGImages" / f"{index}.png").crop((0, 0, columns * PATCH, rows * PATCH))
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1
        with keys_of(model) as kept:
            model(pixels, interpolate_pos_encoding=True)
        features_ND = kept[0][0, 1 : 1 + rows * columns]
        drawn.append([PATCH * edge for edge in naive_box(features_ND, rows, columns, BIAS, 100)])
    return drawn


def test_lost_equals_loops_over_the_written_models(patched: Path, demo_folder: Path, voc: Path) -> None:
    from transformers import ViTForImageClassification

    evaluation = evaluate(patched, "lost", images=voc, block=BLOCK, kind=["keys"], bias=[BIAS])
    assert len(evaluation.rows) == 1
    assert evaluation.num_images == len(SIZES), "the broken one is left out"
    models = {"original": ViTForImageClassification.from_pretrained(demo_folder), "patched": regsurgery.load(patched)}
    expected = {name: expected_boxes(model.eval(), voc) for name, model in models.items()}
    assert expected["original"] != expected["patched"]
    shown = evaluation.details["boxes"]
    assert {each["image"]: each["original"] for each in shown} == dict(
        zip((f"{i}.png" for i in range(6)), expected["original"], strict=True)
    )
    assert [each["patched"] for each in shown] == expected["patched"]
    for side, boxes in expected.items():
        with_objects = [(np.array(drawn), each["objects"]) for drawn, each in zip(boxes, shown, strict=True)]
        hits = [discovery.found(drawn, np.array(objects)) for drawn, objects in with_objects if objects]
        estimate = getattr(evaluation["CorLoc"], side)
        assert (estimate.value, estimate.n) == (sum(hits) / 5, 5), "the picture without objects does not count"


def test_lost_sweeps_blocks_kinds_and_biases(patched: Path, voc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["regsurgery", "eval", "lost", str(patched), "--images", str(voc), "--num-images", "4", "--json"]
    assert run(command) == 0
    printed = json.loads(capsys.readouterr().out)
    settings = {tuple(figure["where"].values()) for figure in printed["figures"]}
    assert len(settings) == len(printed["figures"]) == 4 * 3 * 3
    assert settings >= {(0, "queries", "-0.4"), (3, "values", "0")}
    assert "best of 36 settings" in printed["notes"][0]


def test_lost_names_what_is_missing(pair: Pair, voc: Path, tmp_path: Path) -> None:
    folder = tell_apart(tmp_path / "JPEGImages", 2)
    with pytest.raises(UserError, match=r"Annotations/0000_0\.xml: no such annotation"):
        figures(pair, "lost", folder)
    with pytest.raises(UserError, match="'key' is not a kind of feature; choose from queries, keys, values"):
        figures(pair, "lost", voc, kind=["key"])


# --- foreground, rollout and correspondence --------------------------------------------------------------------------


def in_boxes() -> float:
    """The share of a picture's pixels that are in a box, mean over those with objects."""
    shares = []
    for index, (width, height) in enumerate(SIZES):
        canvas = np.zeros((height, width))
        canvas[: height // 2, : width // 2] = canvas[7:70, 19:90] = 1
        if index != 4:
            shares.append(canvas.mean())
    return float(np.mean(shares))


def test_foregrounds_and_rollout_are_measured_beside_chance(
    patched: Path, pair: Pair, voc: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["regsurgery", "eval", "foreground", str(patched), "--images", str(voc), "--block", "2", "--block", "-1"]
    assert run([*command, "--kind", "keys", "--method", "kmeans", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    by_setting = {(each["name"], *each["where"].values()): each for each in printed["figures"]}
    assert printed["num_images"] == len(SIZES) and len(printed["figures"]) == len(by_setting) == 2 * (1 + 2)
    assert ("foreground IoU", 3, "keys", "kmeans") in by_setting
    whole = by_setting["foreground IoU", "", "", "whole image"]
    assert whole["original"] == whole["patched"] and whole["original"]["n"] == 5
    assert whole["original"]["value"] == pytest.approx(in_boxes(), abs=0.02)
    for name in ("original", "patched"):
        assert 0 < by_setting["foreground IoU", 2, "keys", "kmeans"][name]["value"] < 1

    found, _ = figures(pair, "rollout", voc)
    maps = {(row.name, row.where["map"]): row for row in found.rows}
    assert len(maps) == 8 and found.num_images == len(SIZES)
    for (name, of), row in maps.items():
        assert row.original is not None and row.patched is not None and row.patched.n == 5
        if name == "to registers":
            assert row.original.value == 0 and row.patched.value > 0.001
        elif of == "uniform":
            assert row.original == row.patched
            assert row.original.value == pytest.approx(in_boxes(), abs=0.04), "middles of patches count"
        elif name == "in the boxes":
            assert row.original.value != row.patched.value


@torch.no_grad()
def expected_pck(model: Any, pixels: torch.Tensor) -> float:
    """Of patches of mirror images, with hooks and loops."""
    kept: list[torch.Tensor] = []
    hook = model.vit.layers[BLOCK].register_forward_hook(lambda module, args, output: kept.append(output))
    model(pixels), model(pixels.flip(-1))
    hook.remove()
    hits = []
    for image, mirrored in zip(*kept, strict=True):
        for patch in range(144):
            cosines = torch.cosine_similarity(mirrored[1 + patch][None], image[1:145], dim=-1)
            row, column = divmod(int(cosines.argmax()), 12)
            true_row, true_column = patch // 12, 11 - patch % 12
            hits.append(abs(row - true_row) + abs(column - true_column) <= 1)
    return float(np.mean(hits))


def test_correspondences_are_those_of_the_written_models(
    patched: Path, demo_folder: Path, pair: Pair, voc: Path
) -> None:
    from transformers import ViTForImageClassification

    images = image_set(voc / "JPEGImages")
    found, _ = figures(pair, "correspondence", voc / "JPEGImages", block=[BLOCK], kind=["tokens"])
    of = {(row.name, row.where["warp"]): row for row in found.rows}
    assert len(of) == 6
    pixels = torch.cat([batch.pixels for batch in pair.batches(images)])
    models = {"original": ViTForImageClassification.from_pretrained(demo_folder), "patched": regsurgery.load(patched)}
    for side, model in models.items():
        given = getattr(of["PCK, one patch", "mirror"], side)
        assert given.value == pytest.approx(expected_pck(model.eval(), pixels), abs=0.005) and given.n == len(SIZES)
    for warp in ("homography", "mirror"):
        near, tenth, outliers = (of[f"PCK, {name}", warp] for name in ("one patch", "a tenth", "outlier patches"))
        assert near.patched is not None and tenth.patched is not None and near.patched.value <= tenth.patched.value
        assert outliers.original is not None and outliers.patched is not None
        assert outliers.original.value < outliers.patched.value and outliers.patched.n < len(SIZES)


def test_settings_of_dense_tasks_that_do_not_exist_are_named(pair: Pair, voc: Path) -> None:
    with pytest.raises(UserError, match="there is no warp 'shear'; choose from homography, mirror"):
        figures(pair, "correspondence", voc, warp=["shear"])
    with pytest.raises(UserError, match="there is no method 'cut'; choose from kmeans, ncut"):
        figures(pair, "foreground", voc, method=["cut"])
    with pytest.raises(UserError, match="eval foreground: 'key' is not a kind of feature; choose from tokens, queries"):
        figures(pair, "foreground", voc, kind=["key"])
    with pytest.raises(UserError, match="block 9 does not exist"):
        figures(pair, "correspondence", voc, block=[9])


def run(command: list[str]) -> int:
    before, sys.argv = sys.argv, command
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    return int(ended.value.code or 0)


# --- probe and knn --------------------------------------------------------------------------------------------------


def test_probe_and_knn_tell_classes_apart_that_are(pair: Pair, tmp_path: Path) -> None:
    images = tell_apart(tmp_path / "images")
    for task, settings in (("probe", {}), ("knn", {"neighbours": 3}), ("knn", {"features": "mean", "train": images})):
        found, rows = figures(pair, task, images, **settings)
        accuracy = rows["accuracy"]
        assert accuracy.original is not None and accuracy.patched is not None
        assert (accuracy.original.value, accuracy.patched.value, accuracy.patched.n) == (1, 1, 12)
        assert accuracy.patched.low is not None and 0.7 < accuracy.patched.low < 0.8, "12 of 12 by Wilson"
        assert "2 classes, 6 of 12 images are of the largest" in found.notes[0]


def test_held_out_images_are_not_learnt_by_heart(pair: Pair, tmp_path: Path) -> None:
    """Labels that have nothing to do with the images: what is fitted on itself would still be right."""
    root = tmp_path / "images"
    root.mkdir()
    for index in range(24):
        dead_leaves(random.Random(index), 96).save(root / f"{random.Random(index).randrange(2):04d}_{index}.png")
    for task, settings in (("probe", {}), ("knn", {"neighbours": 1})):
        accuracy = figures(pair, task, root, **settings)[1]["accuracy"]
        assert accuracy.patched is not None and accuracy.patched.value < 0.8
    learnt = figures(pair, "knn", root, train=root, neighbours=1)[1]["accuracy"]
    assert learnt.original is not None and learnt.original.value == 1


def test_labels_that_cannot_be_learnt_are_refused(pair: Pair, tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for index in range(4):
        dead_leaves(random.Random(index), 96).save(root / f"{index:04d}_x.png")
    with pytest.raises(UserError, match=r"class 0 has one image.*--train"):
        figures(pair, "probe", root)
    with pytest.raises(UserError, match="every image has a different class"):
        figures(pair, "knn", root)
    with pytest.raises(UserError, match="'max' is not a feature"):
        figures(pair, "knn", root, features="max")


# --- segment --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with a bright and a dark side, VOC layout, and palette masks whose border is ignored."""
    root = tmp_path_factory.mktemp("halves")
    (root / "JPEGImages").mkdir()
    (root / "SegmentationClass").mkdir()
    rng = np.random.default_rng(0)
    for index in range(7):
        cut = int(rng.integers(30, 160))
        pixels = rng.integers(0, 80, (192, 192, 3))
        pixels[:, :cut] += 170
        mask = np.where(np.arange(192) < cut, 5, 12)[None].repeat(192, axis=0)
        mask[:, cut - 4 : cut + 4] = 255
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(root / "JPEGImages" / f"{index}.png")
        palette = PIL.Image.fromarray(mask.astype(np.uint8)).convert("P")
        palette.putpalette(rng.integers(0, 256, 768).tolist())
        palette.save(root / "SegmentationClass" / f"{index}.png")
    (root / "SegmentationClass" / "6.png").unlink()
    return root


@pytest.mark.parametrize("method", ["linear", "kmeans"])
def test_segment_reads_sides_off_patches(patched: Path, halves: Path, method: str) -> None:
    evaluation = evaluate(patched, "segment", images=halves, method=method)
    assert evaluation.num_images == 6, "masks are no images, and the picture without one is left out"
    assert set(evaluation.details["iou"]) == {"5", "12"}
    for name in ("mIoU", "pixel accuracy"):
        estimate = evaluation[name].patched
        assert estimate is not None and estimate.low is not None and estimate.n == 6
        assert 0.9 < estimate.low <= estimate.value <= 1


def test_segment_names_what_is_missing(pair: Pair, halves: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none has a mask"):
        figures(pair, "segment", tell_apart(tmp_path / "images", 2))
    for index in range(6):
        mask = PIL.Image.new("L", (192, 192) if index != 3 else (9, 9), 5)
        mask.save(tmp_path / f"{index}.png")
    with pytest.raises(UserError, match=r"3\.png: has 9x9 pixels"):
        figures(pair, "segment", halves, masks=tmp_path)
    PIL.Image.new("L", (192, 192), 5).save(tmp_path / "3.png")
    with pytest.raises(UserError, match="have 1 class"):
        figures(pair, "segment", halves, masks=tmp_path)


# --- shift-map ------------------------------------------------------------------------------------------------------


def test_outliers_go_where_they_are_sent(patched: Path, tmp_path: Path) -> None:
    png = tmp_path / "maps.png"
    evaluation = evaluate(patched, "shift-map", num_images=8, where="0.5,0,0.25,0.25", png=png)
    chosen = evaluation.details["chosen"]
    assert chosen == [12 * row + column for row in range(3) for column in range(6, 9)]
    norms = {
        side: value(evaluation, "mean norm, chosen patches", side, **{"moved to": "places"})
        for side in ("original", "patched")
    }
    assert norms["patched"] > 5 * norms["original"]
    on_register = value(evaluation, "mean norm, chosen patches", "patched", **{"moved to": "register"})
    assert on_register < 1.5 * norms["original"]
    assert value(evaluation, "outliers, other patches", "original", **{"moved to": "places"}) > 1
    assert value(evaluation, "outliers, chosen patches", "patched", **{"moved to": "places"}) > 6, "of 9 patches"
    for where in ("places", "register"):
        assert value(evaluation, "outliers, other patches", "patched", **{"moved to": where}) == 0
    assert value(evaluation, "KL to the original", "patched", **{"moved to": "places"}) > 0
    map_NN = np.array(evaluation.details["norm_maps"]["places"])
    assert set(np.argsort(map_NN.ravel())[-9:].tolist()) == set(chosen)
    assert PIL.Image.open(png).width > 1000


def test_an_unpatched_model_has_nothing_to_move() -> None:
    with pytest.raises(UserError, match="no register neurons"):
        evaluate("demo", "shift-map", num_images=4, where="0,0,0.5,0.5")


# --- photos ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 of the 91 photos of the most frequent size, so that one size is traced."""
    source, root = shared("images", "voc2007-subset"), tmp_path_factory.mktemp("photos") / "voc"
    (root / "JPEGImages").mkdir(parents=True)
    (root / "Annotations").symlink_to(source / "Annotations")
    found = [path for path in sorted((source / "JPEGImages").iterdir()) if PIL.Image.open(path).size == (500, 375)]
    for path in found[:40]:
        (root / "JPEGImages" / path.name).symlink_to(path)
    return root


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ViT-Ti in the paper's setting."""
    model, folder = str(shared("models", "vit-tiny-timm")), tmp_path_factory.mktemp("real") / "patched"
    regsurgery.patch(model, folder, recipe=Recipe({7: (417,)}), verification=False)
    return folder


@pytest.mark.real
def test_lost_finds_more_objects_on_photos_after_the_shift(real: Path, photos: Path) -> None:
    evaluation = evaluate(real, "lost", images=photos, block=8, kind=["keys"], bias=[-0.2])
    corloc = evaluation["CorLoc"]
    assert corloc.original is not None and corloc.patched is not None and corloc.difference is not None
    assert corloc.patched.n == 40
    assert corloc.difference.low is not None and corloc.difference.low > 0.1, corloc


@pytest.mark.real
def test_the_normalised_cut_of_photos_is_cut_off_outliers_before_the_shift(real: Path, photos: Path) -> None:
    found = evaluate(real, "foreground", images=photos, num_images=16, block=[8], kind=["values"], method=["ncut"])
    for name in ("CorLoc", "foreground IoU"):
        (row,) = found.select(name, method="ncut")
        assert row.original is not None and row.original.value < 0.1, row
        assert row.difference is not None and row.difference.low is not None and row.difference.low > 0.1, row
