"""Images as they lie on a disk: folders that hide and link, suffixes, grey values of many bits, EXIF orientations."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regsurgery.errors import UserError
from regsurgery.evaluation.labels import labels_of
from regsurgery.evaluation.masks import upright_mask
from regsurgery.images.decoding import decode, orientation
from regsurgery.images.image_set import image_set
from regsurgery.images.opening import dataset_files

ORIENTATION = 274


def save(path: Path, format: str | None = None, size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, format)
    return path


def names(where: Path) -> list[str]:
    return [path.relative_to(where).as_posix() for path in dataset_files(where)[1]]


# --- folders ----------------------------------------------------------------------------------------------------------


def test_hidden_folders_are_skipped_at_every_depth(tmp_path: Path) -> None:
    for name in ("a.png", "b/c.png", ".thumbnails/a.png", "b/.ipynb_checkpoints/c-checkpoint.png"):
        save(tmp_path / name)
    assert names(tmp_path) == ["a.png", "b/c.png"]


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "x" / "a.png")
    save(tmp_path / "photos" / "b.png")
    (tmp_path / "photos" / "cat").symlink_to(tmp_path / "elsewhere" / "x")
    (tmp_path / "photos" / "up").symlink_to(tmp_path / "photos")
    (tmp_path / "elsewhere" / "x" / "back").symlink_to(tmp_path)
    assert sorted(os.path.basename(name) for name in names(tmp_path / "photos")) == ["a.png", "b.png"]
    assert "cat/a.png" in names(tmp_path / "photos"), "by the link's name, which is the class"


def test_suffixes_that_pillow_knows_and_files_without_one(tmp_path: Path) -> None:
    for name, format in {"a.jfif": "JPEG", "b.ppm": None, "c": "PNG", "d.avif": "AVIF", "e.jpg": "PNG"}.items():
        save(tmp_path / name, format)
    (tmp_path / "LICENSE").write_text("not a picture", "utf-8")
    (tmp_path / "f.dat").write_bytes((tmp_path / "c").read_bytes())
    assert names(tmp_path) == ["a.jfif", "b.ppm", "c", "d.avif", "e.jpg"]
    assert all(decode(tmp_path / name).size == (8, 6) for name in names(tmp_path))


def test_an_unknown_suffix_is_looked_into_where_nothing_else_is(tmp_path: Path) -> None:
    save(tmp_path / "a.data", "PNG")
    (tmp_path / "b.data").write_text("text", "utf-8")
    assert names(tmp_path) == ["a.data"]


# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.uint16, [0, 9 * 256, 65535], [0, 9, 255]),
        (np.int32, [0, 99, 255], [0, 99, 255]),
        (np.int32, [0, 9 * 256, 65535], [0, 9, 255]),
        (np.int32, [-(10**6), 0, 10**6], [0, 127, 255]),
        (np.float32, [0, 0.5, 1], [0, 127, 255]),
        (np.float32, [0, 99, 255], [0, 99, 255]),
        (np.float32, [-2, 0, 2], [0, 127, 255]),
        (np.float32, [3e5, 3e5, 3e5], [0, 0, 0]),
    ],
)
def test_grey_values_of_many_bits_are_scaled_to_their_range(
    dtype: type, values: list[float], expected: list[int], tmp_path: Path
) -> None:
    Image.fromarray(np.array([values], dtype)).save(tmp_path / "grey.tif")
    assert np.asarray(decode(tmp_path / "grey.tif"))[0, :, 0].tolist() == expected


def test_grey_values_that_are_no_numbers_are_a_reason(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "grey.tif")
    with pytest.raises(ValueError, match="not finite"):
        decode(tmp_path / "grey.tif")


def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    """A record of a parquet file may name one; reading it would not end."""
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="not a regular file"):
        decode(tmp_path / "a.png")


def test_a_picture_that_is_a_thread_is_skipped_with_the_reason(tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path / f"{number}.png")
    save(tmp_path / "long.png", size=(6, 400))
    said: list[str] = []
    images = image_set(tmp_path, say=said.append)
    assert decode(save(tmp_path / "panorama.png", size=(300, 6))).size == (300, 6)

    def preprocess(pictures: list[Image.Image]):
        import torch

        return torch.stack([torch.zeros(3, 2, 2) for _ in pictures])

    assert sum(len(batch) for batch in images.batches(8, preprocess)) == 4
    assert said == [f"skipped {tmp_path / 'long.png'}: 6x400 pixels: one side is over 50 times the other"]


def turned(path: Path, image: Image.Image, by: int) -> Path:
    """`image` as a camera saves it that was held so."""
    exif = Image.Exif()
    exif[ORIENTATION] = by
    image.save(path, exif=exif)
    return path


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.zeros((4, 6), np.uint8)
    pixels[0, 0], pixels[0, 5] = 1, 2
    return Image.fromarray(pixels)


@pytest.mark.parametrize("by", [1, 6, 8, 3])
def test_pictures_stand_upright(by: int, picture: Image.Image, tmp_path: Path) -> None:
    path = turned(tmp_path / "a.png", picture, by)
    times = {1: 0, 6: 3, 8: 1, 3: 2}[by]  # quarter turns, anticlockwise
    assert orientation(path) == by
    assert np.array_equal(np.asarray(decode(path))[..., 0], np.rot90(np.asarray(picture), times))


@pytest.mark.parametrize("by", [5, 6, 7, 8])
def test_masks_are_turned_as_their_pictures_are(by: int, picture: Image.Image, tmp_path: Path) -> None:
    image = decode(turned(tmp_path / "a.png", picture, by))
    picture.save(tmp_path / "before.png")
    image.convert("L").save(tmp_path / "after.png")
    turned(tmp_path / "own.png", picture, by)
    for name in ("before.png", "after.png", "own.png"):
        mask = upright_mask(tmp_path / name, image, by)
        assert np.array_equal(np.asarray(mask), np.asarray(image)[..., 0]), name


def test_a_mask_that_may_be_turned_or_not_is_named(picture: Image.Image, tmp_path: Path) -> None:
    image = decode(turned(tmp_path / "a.png", picture, 3))
    picture.save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask\.png: its image is turned by EXIF \(orientation 3\)"):
        upright_mask(tmp_path / "mask.png", image, 3)


# --- classes ----------------------------------------------------------------------------------------------------------


def test_folders_of_classes_win_over_numbers_in_file_names(tmp_path: Path) -> None:
    for name in ("cat/0001_a.png", "cat/0002_b.png", "dog/0003_a.png", "dog/0004_b.png"):
        save(tmp_path / name)
    said: list[str] = []

    def labels(num_classes: int | None, **known: int) -> list[int]:
        return list(labels_of(image_set(tmp_path, say=said.append), num_classes, known).values())

    assert labels(20, cat=7, dog=3) == [7, 7, 3, 3]
    assert said.pop() == "classes: the names of the folders; the numbers in the file names are others"
    assert labels(2) == [0, 0, 1, 1]
    assert said.pop() == "classes: the folders in their order; the numbers in the file names are others"
    assert labels(20) == [1, 2, 3, 4], "train/ and val/ are no classes"
    assert said.pop() == "classes: the number before _ in the file names"


def test_one_folder_or_a_year_says_nothing_where_files_have_numbers(tmp_path: Path) -> None:
    for name in ("0001_a.png", "0002_b.png", "0001_c.png", "0004_d.png"):
        save(tmp_path / "2012" / name)
    assert list(labels_of(image_set(tmp_path), 1000).values()) == [1, 1, 2, 4]
    for name in ("2012/0001_a.png", "2013/0002_a.png", "2013/0003_a.png", "2013/0004_a.png"):
        save(tmp_path / "years" / name)
    assert list(labels_of(image_set(tmp_path / "years"), 1000).values()) == [1, 2, 3, 4]
