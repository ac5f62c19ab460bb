from __future__ import annotations

import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from regsurgery.images.tars import Tars

COUNT = 5000


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Tars of 0, 1 and many samples; one name is not UTF-8."""
    folder = tmp_path_factory.mktemp("tars")
    for name, names in (("a", []), ("b", ["b/\udcff0.png"]), ("c", []), ("d", [f"{n:06}.jpg" for n in range(COUNT)])):
        with tarfile.open(folder / f"{name}.tar", "w", encoding="utf-8", errors="surrogateescape") as tar:
            for number, each in enumerate(names):
                member = tarfile.TarInfo(each)
                member.size = number % 3
                tar.addfile(member, io.BytesIO(b"xyz"[: number % 3]))
    return tuple(sorted(folder.iterdir()))


def test_images_are_found_by_number_across_tars(paths: tuple[Path, ...]) -> None:
    tars = Tars.open(paths)
    assert len(tars) == COUNT + 1 and tars.counts() == [0, 1, 0, COUNT]
    for chosen in ((0, 1, 2, 3000), (0,), (COUNT,), range(2, 6)):
        for number, (name, stretch) in zip(chosen, tars.items(chosen), strict=True):
            path = paths[1] if number == 0 else paths[3]
            assert stretch.path == path
            assert name == f"{path}: " + ("b/\udcff0.png" if number == 0 else f"{number - 1:06}.jpg")
            assert stretch.read() == b"xyz"[: (number - 1) % 3 if number else 0]
    firsts = [name.rpartition(": ")[2] for name, _ in Tars.firsts(paths).items(range(2))]
    assert firsts == [
        "b/\udcff0.png",
        "000000.jpg",
    ]


def test_an_image_takes_no_more_than_its_name_and_its_place(paths: tuple[Path, ...]) -> None:
    Tars.open(paths[:2])
    tracemalloc.start()
    tars = Tars.open(paths)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(tars) > COUNT
    assert kept < 60 * COUNT and peak < 60 * COUNT + 100_000
