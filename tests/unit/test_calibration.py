from __future__ import annotations

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from regsurgery.errors import UserError
from regsurgery.evaluation.masks import read_mask
from regsurgery.images.decoding import decode, orientation
from regsurgery.images.generated import Generated
from regsurgery.images.image_set import DEFAULT_GENERATED, IN_PROCESS, MIN_IMAGES, ImageSet, image_set
from regsurgery.images.opening import open_source
from regsurgery.images.sources import Item

MANY = IN_PROCESS + 13


def picture(number: int) -> bytes:
    """A PNG whose pixels tell its number."""
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (number, 255 - number, 7)).save(file, "PNG")
    return file.getvalue()


def pixels(images: list[Image.Image]) -> Tensor:
    """`[B, 3, H, W]`, bytes."""
    return torch.stack([torch.tensor(list(image.tobytes())).view(image.height, image.width, 3) for image in images]
                       ).permute(0, 3, 1, 2).to(torch.uint8)  # fmt: skip


def numbers(batch: Tensor) -> list[int]:
    """Which pictures a batch holds."""
    for number, image in zip(batch[:, 0, 0, 0].tolist(), batch, strict=True):
        assert image.equal(pixels([Image.open(io.BytesIO(picture(number)))])[0])
    return batch[:, 0, 0, 0].tolist()


def read(images: ImageSet, size: int = 8) -> list[int]:
    return [number for batch in images.batches(size, pixels) for number in numbers(batch)]


def folder_of(folder: Path, count: int, broken: dict[int, bytes] | None = None) -> Path:
    """A new folder with PNG files in the order of their numbers; of those in `broken`, the given bytes."""
    folder.mkdir(parents=True)
    for number in range(count):
        content = (broken or {}).get(number, picture(number))
        (folder / f"{number:03}.png").write_bytes(content)
    return folder


def cut_jpeg() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((200, 200), 90).save(file, "JPEG")
    return file.getvalue()[:-2000]


def huge_bmp() -> bytes:
    """A picture that claims to have more pixels than Pillow dares to read."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "BMP")
    content = bytearray(file.getvalue())
    content[18:26] = (60_000).to_bytes(4, "little") * 2
    return bytes(content)


BROKEN = {"garbage": b"garbage", "empty": b"", "cut": cut_jpeg(), "huge": huge_bmp()}


@pytest.fixture
def three_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))


# --- A folder of pictures -------------------------------------------------------------------------------------------


def test_a_folder_is_read_recursively_in_name_order(tmp_path):
    for number, name in enumerate(["A.PNG", "b/a.jpeg", "b/c/d.tif", "b.webp", "z.gif"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(number))
    (tmp_path / "labels.csv").write_text("no picture", "utf-8")
    (tmp_path / "b" / "._a.jpeg").write_bytes(b"what macOS leaves beside files")
    images = image_set(tmp_path)
    assert read(images) == [0, 1, 2, 3, 4]
    assert [Path(name).relative_to(tmp_path).as_posix() for name, _ in images.source.items(range(5))] == [
        "A.PNG", "b/a.jpeg", "b/c/d.tif", "b.webp", "z.gif"]  # fmt: skip
    assert images.note == f"5 images of {tmp_path.name}"


def test_the_folder_of_the_moment_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(folder_of(tmp_path / "photos", 4))
    assert image_set(".").note == "4 images of photos"


def test_some_of_a_folder_are_spread_evenly(tmp_path):
    images = image_set(folder_of(tmp_path / "images", 20), 5)
    assert read(images) == [0, 4, 8, 12, 16]
    assert images.num_images == 5
    assert read(images.some(2)) == [0, 8]
    assert images.some(5) is images and images.some(6) is images
    assert read(image_set(tmp_path / "images", 100)) == list(range(20))


def test_modes_that_are_not_rgb(tmp_path):
    shades = Image.frombytes("I;16", (4, 1), b"".join((256 * shade).to_bytes(2, "little") for shade in (0, 9, 99, 255)))
    images = {"shades.png": shades, "shades.tif": shades, "cmyk.jpg": Image.new("CMYK", (4, 1), (0, 0, 0, 255)),
              "palette.gif": Image.new("P", (4, 1)), "alpha.webp": Image.new("RGBA", (4, 1))}  # fmt: skip
    for name, image in images.items():
        image.save(tmp_path / name)
        assert decode(tmp_path / name).mode == "RGB"
    for name in ("shades.png", "shades.tif"):
        assert decode(tmp_path / name).tobytes() == bytes([0, 0, 0, 9, 9, 9, 99, 99, 99, 255, 255, 255])


@pytest.mark.filterwarnings("error")
def test_damaged_metadata_are_no_matter():
    file = io.BytesIO()
    Image.new("RGB", (4, 1)).save(file, "TIFF", description="any")
    entry = (270).to_bytes(2, "little") + (2).to_bytes(2, "little")
    content = file.getvalue().replace(entry + (4).to_bytes(4, "little"), entry + (10**6).to_bytes(4, "little"))
    with pytest.warns(UserWarning, match="Tag data larger than file"):
        Image.open(io.BytesIO(content))
    assert decode(content).size == (4, 1)


def damaged_dds() -> bytes:
    """Pillow's decoder raises a NotImplementedError on it, and others on damaged files of other formats."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "DDS")
    content = bytearray(file.getvalue())
    content[80:84] = bytes(4)  # the flags of its pixel format
    with pytest.raises(NotImplementedError):
        Image.open(io.BytesIO(content)).load()
    return bytes(content)


@pytest.mark.parametrize("read", [decode, orientation, read_mask])
def test_whatever_a_decoder_raises_the_image_is_unreadable(read, tmp_path):
    (tmp_path / "image.dds").write_bytes(damaged_dds())
    with pytest.raises((ValueError, UserError), match=r"damaged [(]Unknown pixel format"):
        read(tmp_path / "image.dds")


@pytest.mark.parametrize("count", [0, -1])
def test_no_images_asked_for(tmp_path, count):
    with pytest.raises(UserError, match=f"^{count} images were asked for"):
        image_set(folder_of(tmp_path / "images", 4), count)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/none: no such folder of images"):
        image_set(tmp_path / "none")


def test_a_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(UserError, match=rf"^{tmp_path}: no images in it \(looked for .*\.bmp, .*\.png, .*\.parquet"):
        image_set(tmp_path)
    with pytest.raises(UserError, match=rf"^{tmp_path}/notes.txt: no images in it"):
        image_set(tmp_path / "notes.txt")


@pytest.mark.parametrize("count, named", [(1, "1 image in it"), (MIN_IMAGES - 1, "3 images in it")])
def test_a_folder_that_is_too_small(tmp_path, count, named):
    with pytest.raises(UserError, match=f"^{tmp_path}/images: {named}, at least 4 are needed"):
        image_set(folder_of(tmp_path / "images", count))
    assert read(image_set(folder_of(tmp_path / "enough", MIN_IMAGES))) == [0, 1, 2, 3]


# --- Worker processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 8, 45, 100])
def test_workers_give_the_same_batches(tmp_path, monkeypatch, three_workers, size):
    images = image_set(folder_of(tmp_path / "images", MANY, {5: b"garbage", 30: b""}))

    def traced(pictures: list[Image.Image]) -> Tensor:
        return torch.cat([pixels(pictures).int(), torch.full((1, 3, 1, 6), os.getpid(), dtype=torch.int32)], dim=2)

    with_workers = list(images.numbered_batches(size, traced))
    pids = {pid for _, batch in with_workers for pid in batch[:, 0, -1, 0].tolist()}
    assert os.getpid() not in pids and len(pids) <= 3
    monkeypatch.setattr("regsurgery.images.image_set.IN_PROCESS", MANY)
    without = list(images.numbered_batches(size, traced))
    assert {pid for _, batch in without for pid in batch[:, 0, -1, 0].tolist()} == {os.getpid()}
    assert [number for number, _ in with_workers] == [number for number, _ in without]
    for (_, left), (_, right) in zip(with_workers, without, strict=True):
        assert left[:, :, :-1].equal(right[:, :, :-1])
    assert [n for _, b in without for n in numbers(b[:, :, :-1].to(torch.uint8))] == [
        n for n in range(MANY) if n not in (5, 30)
    ]


@dataclass
class Counting:
    """Counts how many of its items were taken."""

    count: int
    taken: int = 0
    random_access = False

    def __len__(self) -> int:
        return self.count

    def items(self, chosen: range | tuple[int, ...]) -> Iterator[Item]:
        for number in chosen:
            self.taken += 1
            yield str(number), picture(number % 256)

    def fingerprint(self) -> str:
        return ""


def test_workers_are_only_so_far_ahead(three_workers):
    source = Counting(800)
    batches = ImageSet("", source, range(800)).batches(8, pixels)
    for done in range(1, 50):
        next(batches)
        assert source.taken <= 8 * (done + 3 * 2)
    batches.close()
    assert source.taken < 800


def test_workers_need_no_shared_memory(tmp_path, monkeypatch):
    share = torch.UntypedStorage._share_fd_cpu_

    def told(storage: torch.UntypedStorage) -> object:
        (tmp_path / "shared").touch()
        return share(storage)

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", told)
    assert len(read(ImageSet("", Counting(MANY), range(MANY)))) == MANY
    assert not (tmp_path / "shared").exists()


def test_reading_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert len(read(ImageSet("", Counting(MANY), range(MANY)))) == MANY
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_preprocessing_stays(dtype):
    images = ImageSet("", Counting(MANY), range(MANY))
    batches = list(images.batches(8, lambda pictures: pixels(pictures).to(dtype)))
    assert {batch.dtype for batch in batches} == {dtype}
    assert [number for batch in batches for number in numbers(batch.to(torch.uint8))] == list(range(MANY))


# --- Broken images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("count", [12, MANY])
def test_a_broken_image_is_left_out_and_said_once(tmp_path, content, count):
    said: list[str] = []
    images = image_set(folder_of(tmp_path / "images", count, {3: content}), say=said.append)
    name = str(tmp_path / "images" / "003.png")
    assert images.broken == {} and said == []
    first = [numbers(batch) for batch in images.batches(4, pixels)]
    assert first[:3] == [[0, 1, 2], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert list(images.broken) == [name] and images.broken[name]
    assert said == [f"skipped {name}: {images.broken[name]}"]
    assert read(images) == [number for batch in first for number in batch]
    assert read(images.some(8)) == [number for number in (i * count // 8 for i in range(8)) if number != 3]
    assert len(said) == 1


def test_reasons_are_for_people(tmp_path):
    images = image_set(folder_of(tmp_path / "images", 12, {0: b"garbage", 3: cut_jpeg(), 5: huge_bmp()}))
    read(images)
    assert [reason.split("(")[0].strip() for reason in images.broken.values()] == [
        "not an image format that Pillow knows", "image file is truncated", "Image size"]  # fmt: skip


def test_an_image_that_vanishes(tmp_path):
    images = image_set(folder_of(tmp_path / "images", 5))
    (tmp_path / "images" / "001.png").unlink()
    assert read(images) == [0, 2, 3, 4]
    assert "No such file" in images.broken[str(tmp_path / "images" / "001.png")]


@pytest.mark.parametrize("count", [28, 44])
def test_a_whole_broken_batch_keeps_its_number(tmp_path, count):
    images = image_set(folder_of(tmp_path / "images", count, dict.fromkeys((*range(4, 8), 13), b"garbage")))
    batches = {number: numbers(batch) for number, batch in images.numbered_batches(4, pixels)}
    assert list(batches) == [0, *range(2, count // 4)]
    assert batches[0] == [0, 1, 2, 3] and batches[2] == [8, 9, 10, 11] and batches[3] == [12, 14, 15]


@pytest.mark.parametrize("processes", [1, 2, 3, 20])
@pytest.mark.parametrize("count", [30, MANY])
def test_processes_share_out_the_batches(tmp_path, processes, count):
    images = image_set(folder_of(tmp_path / "images", count, dict.fromkeys((*range(4, 8), 13), b"garbage")))
    alone = {number: numbers(batch) for number, batch in images.numbered_batches(4, pixels)}
    shares = [
        {n: numbers(batch) for n, batch in images.numbered_batches(4, pixels, first=rank, step=processes)}
        for rank in range(processes)
    ]
    for rank, share in enumerate(shares):
        assert list(share) == [number for number in alone if number % processes == rank]
    assert {number: batch for share in shares for number, batch in share.items()} == alone
    assert sum(map(len, shares)) == len(alone)


def test_a_killed_pass_goes_on_where_it_was(tmp_path):
    images = image_set(folder_of(tmp_path / "images", 30, {1: b"garbage"}))
    whole = [(number, numbers(batch)) for number, batch in images.numbered_batches(4, pixels)]
    rest = [(number, numbers(batch)) for number, batch in images.numbered_batches(4, pixels, first=5)]
    assert rest == whole[5:] and rest


@pytest.mark.parametrize("count, readable", [(6, 3), (6, 0), (MANY, 3)])
def test_too_few_readable_images(tmp_path, count, readable):
    broken = dict.fromkeys(range(readable, count), b"garbage")
    images = image_set(folder_of(tmp_path / "images", count, broken))
    batches = images.batches(4, pixels)
    with pytest.raises(UserError) as raised:
        list(batches)
    assert str(raised.value).startswith(f"{readable} of {count} images can be read, at least 4 are needed: ")
    assert f"{tmp_path}/images/{readable:03}.png: not a readable image (not an image format" in str(raised.value)
    assert len(str(raised.value)) < 1000
    assert len(images.broken) == count - readable


def test_just_enough_readable_images(tmp_path):
    images = image_set(folder_of(tmp_path / "images", 20, dict.fromkeys(range(4, 20), b"garbage")))
    assert read(images) == [0, 1, 2, 3]


def test_images_that_broke_in_another_pass_do_not_count(tmp_path):
    images = image_set(folder_of(tmp_path / "images", 100, {n: b"garbage" for n in range(100) if n % 4}))
    assert read(images) == list(range(0, 100, 4))
    assert read(images.some(10)) == [0, 20, 40, 60, 80]


# --- Dataset files --------------------------------------------------------------------------------------------------


def hf_parquet(folder: Path, contents: list[bytes]) -> None:
    import datasets

    half = len(contents) // 2
    for shard, part in enumerate((contents[:half], contents[half:])):
        columns = {
            "label": list(range(len(part))),
            "image": [{"bytes": c, "path": f"{i}.png"} for i, c in enumerate(part)],
        }
        features = datasets.Features({"label": datasets.Value("int64"), "image": datasets.Image()})
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"train-{shard}.parquet")


def bytes_parquet(folder: Path, contents: list[bytes], shards: int = 2) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    size = -(-len(contents) // shards)
    for start in range(0, len(contents), size):
        part = contents[start : start + size]
        table = pa.table({"md5": [b"\1\2\3"] * len(part), "jpg": part, "label": ["a"] * len(part)})
        pyarrow.parquet.write_table(table, folder / f"part-{start:03}.parquet", row_group_size=3)


def struct_parquet(folder: Path, contents: list[bytes]) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.table({"label": [1] * len(contents), "image": [{"bytes": c, "path": None} for c in contents]})
    pyarrow.parquet.write_table(table, folder / "all.parquet", row_group_size=5)


def saved_arrow(folder: Path, contents: list[bytes]) -> None:
    import datasets

    columns = {"image": [{"bytes": c, "path": None} for c in contents], "label": list(range(len(contents)))}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict(columns, features=features)
    data.save_to_disk(folder, num_shards=2)
    # What `map` leaves beside the data.
    (folder / "cache-0123456789abcdef.arrow").write_bytes((folder / "data-00000-of-00002.arrow").read_bytes())


def feather_arrow(folder: Path, contents: list[bytes]) -> None:
    import pyarrow as pa

    table = pa.table({"label": [1] * len(contents), "image": contents})
    with pa.OSFile(str(folder / "all.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def tars(folder: Path, contents: list[bytes]) -> None:
    half = len(contents) // 2
    for shard, part in enumerate((contents[:half], contents[half:])):
        members = [(f"{i:03}.png", c) if suffix == "png" else (f"{i:03}.cls", b"7") for i, c in enumerate(part)
                   for suffix in ("cls", "png")]  # fmt: skip
        write_tar(folder / f"shard-{shard}.tar", dict(members))


def webdataset_tars(folder: Path, contents: list[bytes]) -> None:
    import webdataset

    with webdataset.ShardWriter(f"{folder}/shard-%06d.tar", maxcount=5, verbose=0) as writer:
        for number, content in enumerate(contents):
            writer.write({"__key__": f"{number:06}", "png": content, "json": {"n": number}, "txt": "a caption"})


Write = Callable[[Path, list[bytes]], None]
STREAMED: dict[str, Write] = {"hf parquet": hf_parquet, "bytes parquet": bytes_parquet,
                              "struct parquet": struct_parquet, "saved arrow": saved_arrow,
                              "feather arrow": feather_arrow}  # fmt: skip
WRITERS: dict[str, Write] = {**STREAMED, "tar": tars, "webdataset tar": webdataset_tars}
every_kind = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
every_suffix = pytest.mark.parametrize("write", [bytes_parquet, saved_arrow, feather_arrow, tars])


@every_kind
@pytest.mark.parametrize("count", [11, MANY])
def test_dataset_files_hold_the_same_images(tmp_path, write, count):
    write(tmp_path, [picture(number) for number in range(count)])
    images = image_set(tmp_path)
    assert images.num_images == len(images.source) == count
    assert read(images) == list(range(count))
    assert read(images) == list(range(count))
    share = list(images.numbered_batches(4, pixels, first=1, step=2))
    assert [(n, numbers(batch)) for n, batch in share[:1]] == [(1, [4, 5, 6, 7])]
    assert images.broken == {}


@every_kind
def test_one_dataset_file(tmp_path, write):
    write(tmp_path, [picture(number) for number in range(11)])
    files = sorted(path for path in tmp_path.iterdir() if path.suffix in (".parquet", ".arrow", ".tar"))
    file = next(path for path in files if not path.name.startswith("cache-"))
    images = image_set(file)
    assert read(images) == list(range(images.num_images)) and images.num_images in (5, 6, 11)
    assert images.note == f"{images.num_images} images of {file.name}"


@pytest.mark.parametrize("write", STREAMED.values(), ids=STREAMED)
def test_some_of_a_stream_are_the_first(tmp_path, write):
    write(tmp_path, [picture(number) for number in range(20)])
    images = image_set(tmp_path, 12)
    assert read(images) == list(range(12))
    assert read(images.some(4)) == [0, 1, 2, 3]


def test_some_of_a_tar_are_spread_evenly(tmp_path):
    tars(tmp_path, [picture(number) for number in range(20)])
    assert read(image_set(tmp_path, 5)) == [0, 4, 8, 12, 16]


@pytest.mark.parametrize("write", [hf_parquet, struct_parquet, saved_arrow, tars])
def test_chosen_records(tmp_path, write):
    write(tmp_path, [picture(number) for number in range(20)])
    source = open_source(tmp_path)
    assert [decode(content).getpixel((0, 0))[0] for _, content in source.items((2, 9, 10, 19))] == [2, 9, 10, 19]  # type: ignore[index]


@every_kind
@pytest.mark.parametrize("content", [b"garbage", cut_jpeg()], ids=["garbage", "cut"])
def test_a_broken_record_is_left_out(tmp_path, write, content):
    said: list[str] = []
    write(tmp_path, [content if number == 8 else picture(number) for number in range(12)])
    images = image_set(tmp_path, say=said.append)
    assert read(images, 4) == [number for number in range(12) if number != 8]
    assert read(images, 4) == [number for number in range(12) if number != 8]
    (name,) = images.broken
    assert Path(name.split(": ")[0]).is_file() and name.startswith(str(tmp_path))
    assert said == [f"skipped {name}: {images.broken[name]}"]
    assert read(images.some(6)) == ([0, 2, 4, 6, 10] if images.source.random_access else [0, 1, 2, 3, 4, 5])


def test_a_broken_record_is_counted_within_its_file(tmp_path):
    bytes_parquet(tmp_path, [b"garbage" if number == 8 else picture(number) for number in range(12)])
    images = image_set(tmp_path)
    read(images)
    assert list(images.broken) == [f"{tmp_path}/part-006.parquet: record 2"]


@every_kind
def test_too_few_readable_records(tmp_path, write):
    write(tmp_path, [picture(number) if number < 3 else b"garbage" for number in range(12)])
    images = image_set(tmp_path)
    with pytest.raises(UserError, match=rf"^3 of 12 images can be read, .*{tmp_path}/.*: not a readable image"):
        read(images)


@every_suffix
def test_too_few_records(tmp_path, write):
    write(tmp_path, [picture(number) for number in range(3)])
    with pytest.raises(UserError, match=f"^{tmp_path}: 3 images in it, at least 4 are needed"):
        image_set(tmp_path)


def test_records_without_an_image(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    (tmp_path / "beside.png").write_bytes(picture(3))
    records = [None, {"bytes": None, "path": None}, {"bytes": b"", "path": ""}, {"bytes": None, "path": "beside.png"}]
    table = pa.table({"image": records + [{"bytes": picture(n), "path": "x"} for n in range(4, 60)]})
    pyarrow.parquet.write_table(table, tmp_path / "all.parquet")
    images = image_set(tmp_path / "all.parquet")
    assert read(images) == list(range(3, 60))
    assert list(images.broken.values()) == ["empty"] * 3


def test_the_first_column_that_holds_images(tmp_path):
    import datasets

    small = [{"bytes": picture(number), "path": None} for number in range(4)]
    columns = {"sound": [b"bytes"] * 4, "photo": small, "mask": [{"bytes": picture(200), "path": None}] * 4}
    features = datasets.Features(sound=datasets.Value("binary"), photo=datasets.Image(), mask=datasets.Image())
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
    assert read(image_set(tmp_path)) == [0, 1, 2, 3]


def test_shards_with_other_columns_beside_the_image(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    for shard, beside in enumerate(({"label": [1, 2, 3]}, {"label": ["a", "b", "c"], "more": [b"x"] * 3})):
        table = pa.table({"image": [picture(3 * shard + n) for n in range(3)], **beside})
        pyarrow.parquet.write_table(table, tmp_path / f"{shard}.parquet")
    assert read(image_set(tmp_path)) == list(range(6))


@every_suffix
def test_names_that_look_like_patterns(tmp_path, write):
    folder = tmp_path / ".hidden" / "photos [2] *?"
    folder.mkdir(parents=True)
    write(folder, [picture(number) for number in range(8)])
    assert read(image_set(folder)) == list(range(8))


def test_a_relative_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    bytes_parquet(tmp_path / "here", [picture(number) for number in range(8)])
    monkeypatch.chdir(tmp_path)
    assert read(image_set("here")) == list(range(8))


def test_samples_of_a_tar(tmp_path):
    photo = io.BytesIO()
    Image.new("RGB", (6, 5)).save(photo, "JPEG")
    members = {
        "readme.txt": b"no image",
        "./x/000.cls": b"a word, not a number",
        "./x/000.png": picture(0),
        "./x/000.mask.png": picture(99),
        "./x/._001.png": b"what macOS leaves beside files",
        "./x/001.json": b"{broken",
        "./x/002.txt": b"\xff no UTF-8",
        "./x/002.PNG": picture(1),
        "./y/002.webp": picture(2),
        "./y/003.pth": b"no tensor",
        "./y/004.seg.png": picture(3),
        "./y/004.txt": b"",
    }
    write_tar(tmp_path / "a.tar", members)
    images = image_set(tmp_path / "a.tar")
    assert images.num_images == 4
    assert read(images) == [0, 1, 2, 3]
    assert [name for name, _ in images.source.items(range(4))] == [
        f"{tmp_path}/a.tar: ./{name}" for name in ("x/000.png", "x/002.PNG", "y/002.webp", "y/004.seg.png")
    ]


def test_a_tar_without_images(tmp_path):
    write_tar(tmp_path / "a.tar", {"000.txt": b"none", "folder.png/x": b""})
    with pytest.raises(UserError, match=f"^{tmp_path}: 0 images in it"):
        image_set(tmp_path)


@pytest.mark.parametrize("where", ["in a header", "in an image", "in a file's padding", "to nothing", "all garbage",
                                   "garbage between", "compressed"])  # fmt: skip
def test_a_broken_tar(tmp_path, where):
    tars(tmp_path, [picture(number) for number in range(12)])
    path = tmp_path / "shard-1.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    content = path.read_bytes()
    end = {"in a header": last.offset + 100, "in an image": last.offset_data + 20, "to nothing": 0,
           "in a file's padding": last.offset_data + last.size + 1}.get(where)  # fmt: skip
    content = content[:end]
    if where == "all garbage":
        content = b"garbage" * 1000
    if where == "garbage between":
        content = content[: last.offset] + b"\1" * 512 + content[last.offset + 512 :]
    if where == "compressed":
        content = gzip.compress(content)
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: cannot be read as tar: .") as raised:
        image_set(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("write", STREAMED.values(), ids=STREAMED)
@pytest.mark.parametrize("kept", [0, 4, 0.5, 0.99])
def test_a_cut_dataset_file(tmp_path, write, kept, capfd):
    write(tmp_path, [picture(number) for number in range(12)])
    path = max(path for path in tmp_path.iterdir() if path.suffix in (".parquet", ".arrow"))
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    capfd.readouterr()
    with pytest.raises(UserError, match=f"^{path}: cannot be read as {path.suffix[1:]}: .") as raised:
        image_set(tmp_path)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def damage(path: Path, row_group: int) -> None:
    """Garble the images of one row group of what `bytes_parquet` wrote; the file's own table of contents stays."""
    import pyarrow.parquet

    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(row_group).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 64] = b"\xff" * 64
    path.write_bytes(content)


def test_a_parquet_that_is_damaged_within(tmp_path):
    bytes_parquet(tmp_path, [picture(number) for number in range(24)])
    damage(tmp_path / "part-012.parquet", 1)
    batches = image_set(tmp_path).batches(4, pixels)
    assert [number for _ in range(3) for number in numbers(next(batches))] == list(range(12))
    with pytest.raises(UserError, match=f"^{tmp_path}/part-012.parquet: cannot be read as parquet: .") as raised:
        list(batches)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("row_group", [0, 5])
def test_a_damaged_parquet_ends_the_workers(tmp_path, three_workers, row_group):
    bytes_parquet(tmp_path, [picture(number) for number in range(80)])
    damage(tmp_path / "part-040.parquet", row_group)
    with pytest.raises(UserError, match=f"^{tmp_path}/part-040.parquet: cannot be read as parquet: ."):
        read(image_set(tmp_path))
    assert multiprocessing.active_children() == []


def test_columns_without_images(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    bytes_parquet(tmp_path, [picture(number) for number in range(8)])
    pyarrow.parquet.write_table(pa.table({"text": ["x"] * 9, "label": [1] * 9}), tmp_path / "zz.parquet")
    with pytest.raises(UserError, match=f"^{tmp_path}/zz.parquet: has no column of images; .* text, label$"):
        image_set(tmp_path)
    with pytest.raises(UserError, match=f"^{tmp_path}/zz.parquet: has no column of images; .* text, label$"):
        image_set(tmp_path / "zz.parquet")


@pytest.mark.parametrize("write", [bytes_parquet, saved_arrow, feather_arrow])
def test_a_dataset_file_without_records(tmp_path, write):
    if write is saved_arrow:
        import pyarrow as pa

        with (
            pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
            pa.ipc.new_stream(file, pa.schema({"image": pa.binary()})),
        ):
            pass
    else:
        write(tmp_path, [picture(0)])
        (path,) = tmp_path.iterdir()
        write(tmp_path, []) if write is feather_arrow else empty_parquet(path)
    with pytest.raises(UserError, match=f"^{tmp_path}.*: (has )?no "):
        image_set(tmp_path)


def empty_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"image": pa.array([], pa.binary())}), path)


def test_the_kind_with_the_most_bytes_counts(tmp_path):
    folder_of(tmp_path / "photos", 12)
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"label": [1, 2]}), tmp_path / "photos" / "metadata.parquet")
    (tmp_path / "photos" / "011.png").write_bytes(picture(11) + bytes(10_000))
    assert read(image_set(tmp_path / "photos")) == list(range(12))
    (tmp_path / "dataset").mkdir()
    bytes_parquet(tmp_path / "dataset", [picture(number) for number in range(8)])
    (tmp_path / "dataset" / "thumbnail.png").write_bytes(picture(200))
    assert read(image_set(tmp_path / "dataset")) == list(range(8))


@pytest.mark.parametrize("write", [hf_parquet, saved_arrow])
def test_the_library_that_is_not_there(tmp_path, monkeypatch, write):
    write(tmp_path, [picture(number) for number in range(8)])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/.*: .*needs the library datasets: pip install 'regsurgery\[data\]'"
    ):
        image_set(tmp_path)


@pytest.mark.parametrize("write", [tars, webdataset_tars])
def test_tars_need_no_library(tmp_path, monkeypatch, write):
    write(tmp_path, [picture(number) for number in range(8)])
    for library in ("datasets", "pyarrow", "webdataset"):
        monkeypatch.setitem(sys.modules, library, None)
    assert read(image_set(tmp_path)) == list(range(8))


STREAM = """
import sys
from pathlib import Path

def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        print(event, args)
        raise OSError("no network")

sys.addaudithook(refuse)
from regsurgery.images.opening import open_source

print(len(list(open_source(Path(sys.argv[1])).items(range(8)))))
"""


@pytest.mark.parametrize("write", [bytes_parquet, saved_arrow])
def test_streaming_leaves_no_files_and_calls_nobody(tmp_path, write):
    folders = {name: tmp_path / name for name in ("data", "tmp", "home")}
    for folder in folders.values():
        folder.mkdir()
    write(folders["data"], [picture(number) for number in range(8)])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    environment |= {"HOME": str(folders["home"]), "TMPDIR": str(folders["tmp"])}
    done = subprocess.run([sys.executable, "-c", STREAM, folders["data"]], capture_output=True, text=True,
                          env=environment, cwd=Path(__file__).parents[2])  # fmt: skip
    assert (done.stdout, done.stderr) == ("8\n", "")
    assert [path for name in ("tmp", "home") for path in folders[name].rglob("*") if path.is_file()] == []


# --- Fingerprints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [None, bytes_parquet, saved_arrow, tars])
def test_a_fingerprint_tells_files_apart(tmp_path, write):
    def made(name: str) -> Path:
        folder = tmp_path / name
        if write is None:
            return folder_of(folder, 8)
        folder.mkdir()
        write(folder, [picture(number) for number in range(8)])
        return folder

    folder = made("a")
    before = open_source(folder).fingerprint()
    assert open_source(folder).fingerprint() == before
    assert open_source(folder.parent / "." / "a").fingerprint() == before
    fingerprints = {before}
    first, *_ = sorted(path for path in folder.iterdir() if path.suffix in (".png", ".parquet", ".arrow", ".tar")
                       and not path.name.startswith("cache-"))  # fmt: skip
    facts = first.stat()

    os.utime(first, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1_000_000_000))
    fingerprints.add(open_source(folder).fingerprint())
    os.utime(first, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert open_source(folder).fingerprint() == before

    moved = first.rename(first.with_stem("0 renamed"))
    fingerprints.add(open_source(folder).fingerprint())
    first = moved.rename(first)
    assert open_source(folder).fingerprint() == before

    if write is None:
        first.write_bytes(first.read_bytes() + b"more")
        os.utime(first, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        fingerprints.add(open_source(folder).fingerprint())
        first.unlink()
        fingerprints.add(open_source(folder).fingerprint())
        assert len(fingerprints) == 5
    assert len(fingerprints) >= 3


# --- Dead-leaves pictures -------------------------------------------------------------------------------------------


def generated(count: int | None, seed: int = 0) -> list[bytes]:
    images = image_set(None, count, seed=seed)
    return [decode(content).tobytes() for _, content in images.source.items(images.chosen)]


def test_dead_leaves_differ_by_seed_and_number():
    first = generated(6)
    assert first == generated(6)
    assert first == generated(9)[:6]
    assert len({*first, *generated(6, seed=1)}) == 12
    assert len({Generated(*facts).fingerprint() for facts in ((6, 0), (6, 1), (7, 1), (6, 0))}) == 3


def test_dead_leaves_are_pictures():
    images = image_set(None)
    assert images.num_images == DEFAULT_GENERATED
    assert images.note == "32 generated dead-leaves pictures (no --images given)"
    assert [content for _, content in images.source.items(range(2))] == ["0/0", "0/1"]
    picture = decode("0/0")
    assert picture.mode == "RGB" and picture.size == (256, 256)
    assert len(picture.getcolors(256 * 256)) > 50
    assert image_set(None, 2).num_images == 2


def test_dead_leaves_are_the_same_in_another_process():
    program = (
        "import hashlib, json; from regsurgery.images.decoding import decode\n"
        "print(json.dumps([hashlib.sha256(decode(f'3/{n}').tobytes()).hexdigest() for n in range(3)]))"
    )
    here = [hashlib.sha256(content).hexdigest() for content in generated(3, seed=3)]
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                              env=environment, cwd=Path(__file__).parents[2])  # fmt: skip
        assert json.loads(done.stdout) == here


def test_dead_leaves_in_workers(monkeypatch, three_workers):
    images = image_set(None, MANY)
    small = lambda pictures: pixels([image.resize((4, 4)) for image in pictures])  # noqa: E731
    with_workers = torch.cat(list(images.batches(8, small)))
    monkeypatch.setattr("regsurgery.images.image_set.IN_PROCESS", MANY)
    assert torch.cat(list(replace(images).batches(8, small))).equal(with_workers)
    assert len(with_workers) == MANY


KILLED_WHILE_READING = """
import os, signal, sys
import psutil, torch
from regsurgery.images.image_set import image_set

def large(images):  # more than a pipe takes
    return torch.zeros(len(images), 3, 512, 512)

batches = image_set(None, 200).batches(4, large)
next(batches)
print(*[child.pid for child in psutil.Process().children()], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_no_worker_outlives_a_process_that_is_killed() -> None:
    import psutil

    command = [sys.executable, "-c", KILLED_WHILE_READING]
    done = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None
    workers = [int(pid) for pid in done.stdout.readline().split()]
    assert workers and done.wait(60) == -9
    running = []
    for pid in workers:
        try:
            running.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    left = psutil.wait_procs(running, timeout=10)[1]
    for process in left:
        process.kill()
    assert left == []
