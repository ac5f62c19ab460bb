"""What training programs and data sets leave, cut off, damaged or made to do harm: read, or refused by its name."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import signal
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from regsurgery.errors import UserError
from regsurgery.frontends.load import load
from regsurgery.images.image_set import image_set
from regsurgery.options import LoadOptions
from regsurgery.settings import replaced
from tests.drills import Row, drill, tries
from tests.photos import write_photos

SECONDS = 20  # for one input: whatever takes longer hangs
MARKER = "it ran"
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
       "intermediate_size": 32, "num_labels": 3}  # fmt: skip


class Runs:
    """A pickle that makes a folder where it is loaded carelessly."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@contextmanager
def an_alarm() -> Iterator[None]:
    def hang(*_: object) -> None:
        raise AssertionError(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(read: Callable[[], object], place: Path) -> str:
    """`accepted`, or `refused`: in one line that names something in `place`, or what was given.

    Any exception but a `UserError` passes.
    """
    with an_alarm():
        try:
            read()
        except UserError as error:
            said = str(error)
            assert "\n" not in said and str(place) in said and len(said) < 2000, said
            return "refused"
    return "accepted"


def damaged(content: bytes, rng: random.Random, count: int) -> Iterator[bytes]:
    """`content` empty, cut off and changed, `count` times each of the latter two: at both ends and anywhere."""
    yield b""
    ends = [4, 100, len(content) - 1, len(content) - 30]
    for number in range(count):
        at = ends[number] if number < len(ends) else rng.randrange(len(content))
        yield content[: max(at, 0)]
    for number in range(count):
        where = rng.choice([(0, 200), (len(content) - 300, len(content)), (0, len(content))])
        changed = bytearray(content)
        for _ in range(1 + number % 8):
            changed[rng.randrange(max(where[0], 0), min(where[1], len(content)))] = rng.randrange(256)
        yield bytes(changed)


# --- images -----------------------------------------------------------------------------------------------------------


def write_sources(place: Path) -> dict[str, Path]:
    """Eight pictures as WebDataset tar, parquet, and both forms of arrow."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    photos = sorted(write_photos(place / "photos", 8).iterdir())
    found = {name: place / name for name in ("a.tar", "a.parquet", "file.arrow", "stream.arrow")}
    with tarfile.open(found["a.tar"], "w") as tar:
        for path in photos:
            tar.add(path, path.name)
            _member(tar, f"{path.stem}.cls", b"1")
    rows = [{"image": {"bytes": path.read_bytes(), "path": path.name}, "label": 1} for path in photos]
    table = pyarrow.Table.from_pylist(rows)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = table.replace_schema_metadata(features.arrow_schema.metadata)
    pyarrow.parquet.write_table(table, found["a.parquet"])
    for name, new in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with new(str(found[name]), table.schema) as writer:
            writer.write_table(table)
    return found


def _member(tar: tarfile.TarFile, name: str, content: bytes, **facts: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for fact, value in facts.items():
        setattr(member, fact, value)
    tar.addfile(member, io.BytesIO(content))


def hostile_tars(place: Path, photo: bytes) -> Iterator[Path]:
    """Links and devices named as pictures, names that lead out of a folder, and sizes that nothing has."""
    kinds = {"links": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "devices": tarfile.CHRTYPE, "pipes": tarfile.FIFOTYPE}
    for name, kind in kinds.items():
        path = place / f"{name}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(8):
                _member(tar, f"{number}.png", b"", type=kind, linkname="/dev/zero", devmajor=1, devminor=5)
        yield path
    path = place / "names.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(8):
            _member(tar, f"../../{'x' * 3000}/\n\x1b[31m{number}.png", photo)
    yield path
    path = place / "sizes.tar"
    with path.open("wb") as file:
        for number in range(8):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = 1 << 40
            file.write(member.tobuf(tarfile.GNU_FORMAT))
    yield path


def hostile_tables(place: Path, photo: bytes) -> Iterator[Path]:
    """Records that name pipes, devices and folders, that hold no bytes, and that unpack to far more than the file."""
    import pyarrow
    import pyarrow.parquet

    os.mkfifo(place / "pipe.png")
    named = [str(place / "pipe.png"), "/dev/zero", "/dev/stdin", "/dev/tty", "/", "\0", "x" * 5000, "nowhere.png"]
    columns = {
        "paths": [{"bytes": None, "path": path} for path in named],
        "nothing": [{"bytes": None, "path": None}] * 8,
        "text": ["words"] * 8,
        "zeros": [{"bytes": bytes(32 << 20), "path": None}] * 8,
        "nested": [{"bytes": {"bytes": photo}}] * 8,
    }
    for name, rows in columns.items():
        path = place / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"image": rows}), path, compression="zstd")
        yield path


def _seen(where: Path) -> int:
    """How many images are read."""
    found = image_set(where, 8)
    return sum(len(batch) for batch in found.batches(4, lambda images: torch.ones(len(images), 3, 4, 4)))


@drill
def damaged_and_hostile_images(place: Path) -> Row:
    """Tars, parquet and arrow files, cut off, damaged or hostile: read, or refused by name; nothing hangs."""
    (place / "cases").mkdir()
    ended, rng, tmp = Counter[str](), random.Random(0), place / "tmp"
    tmp.mkdir()
    sources = write_sources(place)
    photo = (place / "photos" / "00.png").read_bytes()
    with replaced(tempfile, "tempdir", str(tmp)):
        for name, source in sources.items():
            assert _seen(source) == 8, name
            for content in damaged(source.read_bytes(), rng, tries(4, 60)):
                case = place / "cases" / name
                case.write_bytes(content)
                ended[outcome(lambda case=case: _seen(case), case)] += 1
        for hostile in (hostile_tars, hostile_tables):
            for case in hostile(place / "cases", photo):
                told = outcome(lambda case=case: _seen(case), case)
                assert told == ("accepted" if case.name == "names.tar" else "refused"), case
                ended[told] += 1
        assert not list(tmp.iterdir()), list(tmp.iterdir())
    return Row(ended.total(), ", ".join(f"{what} {count} times" for what, count in ended.items()))


# --- checkpoints ------------------------------------------------------------------------------------------------------


def write_runs(place: Path) -> dict[str, tuple[Path, str]]:
    """What training leaves: name -> what is given to a command, and the files that are damaged, a pattern."""
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(**VIT))
    state = model.state_dict()
    optimizer = {"state": {0: {"step": torch.ones(1), "exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 0.1}]}
    trainer, pipeline, sentences = place / "trainer", place / "pipeline", place / "sentences"
    model.save_pretrained(trainer)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save(optimizer, trainer / name)
    (trainer / "trainer_state.json").write_text('{"global_step": 2}')
    shutil.copytree(trainer, pipeline / "image_encoder")
    (pipeline / "model_index.json").write_text(
        json.dumps({"_class_name": "A", "image_encoder": ["transformers", "ViTModel"]})
    )
    shutil.copytree(trainer, sentences / "0_CLIPModel")
    (sentences / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "a.B"}]))
    lightning = place / "lightning"
    shutil.copytree(trainer, lightning)
    (lightning / "model.safetensors").unlink()
    torch.save(
        {
            "state_dict": {
                **{f"net.{name}": value for name, value in state.items()},
                "criterion.weight": torch.ones(3),
            },
            "optimizer_states": [optimizer],
            "hyper_parameters": {"lr": 0.1},
            "loops": {"fit_loop": {"state_dict": {}}},
            "pytorch-lightning_version": "2.6.0",
        },
        lightning / "last.ckpt",
    )
    return {
        "trainer": (trainer, "*"),
        "pipeline": (pipeline, "model_index.json"),
        "sentences": (sentences, "modules.json"),
        "lightning": (lightning / "last.ckpt", "last.ckpt"),
    }


NOT_READ = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json")


@drill
def damaged_and_hostile_training_runs(place: Path) -> Row:
    """What training leaves, cut off, damaged or hostile: no code runs, what is no part of the model is not read, and
    the rest is read or refused by name.
    """
    place = place / "runs"
    place.mkdir()
    ended, rng = Counter[str](), random.Random(0)
    runs, options = write_runs(place), LoadOptions(allow_pickle=True)
    for name, (given, pattern) in runs.items():
        folder = given if given.is_dir() else given.parent
        for path in sorted(folder.glob(pattern)):
            content = path.read_bytes()
            kinds = [*damaged(content, rng, tries(1, 25)), pickle.dumps(Runs(place / MARKER))]
            for kind in kinds:
                path.write_bytes(kind)
                told = outcome(lambda given=given: load(str(given), options), folder)
                assert told == "accepted" or path.name not in NOT_READ, path
                ended[told] += 1
            torch.save({"state_dict": Runs(place / MARKER)}, path)
            ended[outcome(lambda given=given: load(str(given), options), folder)] += 1
            path.unlink()
            ended[outcome(lambda given=given: load(str(given), options), folder)] += 1
            path.write_bytes(content)
        if name in ("trainer", "lightning"):
            load(str(given), options)
    assert not (place / MARKER).exists()
    return Row(ended.total(), ", ".join(f"{what} {count} times" for what, count in ended.items()))
