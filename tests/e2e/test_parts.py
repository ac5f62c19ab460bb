"""`find` as an array job: statistics files of parts, put together, give what one process finds, byte for byte."""

from __future__ import annotations

import functools
import io
import json
import random
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import regsurgery
from regsurgery.checkpoints.safetensors_file import read_header
from regsurgery.cli.app import main
from regsurgery.errors import NothingToFixError, OutputError, UserError
from regsurgery.frontends.load import load
from regsurgery.images.generated import dead_leaves
from regsurgery.images.image_set import image_set
from regsurgery.images.tars import _images_of_tar
from regsurgery.models import locate
from regsurgery.options import SearchOptions
from regsurgery.progress import Progress
from regsurgery.recipe import find_recipe
from regsurgery.search.find import Task, _score
from regsurgery.search.processes import Processes
from regsurgery.search.scores import Scorer, Sums
from regsurgery.search.shares import BATCH, PILOT_IMAGES, FoundPart, Part, Share, share_out
from tests.conftest import tiered
from tests.e2e.test_find import Stop, StopsAfter
from tests.picos import _transformers

NUM_IMAGES = 44  # more than the pilot's, and no whole number of batches
HELD_OUT = NUM_IMAGES // 3  # of files; tars are read whole
BROKEN = 30


def picture(number: int) -> bytes:
    if number == BROKEN:
        return b"no picture"
    file = io.BytesIO()
    dead_leaves(random.Random(number), 64).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return [picture(number) for number in range(NUM_IMAGES)]


def write_tars(folder: Path, pictures: list[bytes], sizes: list[int]) -> Path:
    """WebDataset tars of so many pictures."""
    folder.mkdir()
    numbers = iter(range(len(pictures)))
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
            for number in [next(numbers) for _ in range(size)]:
                for suffix, content in (("cls", b"7"), ("png", pictures[number])):
                    member = tarfile.TarInfo(f"{number:04}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def sources(pictures: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    (root / "files").mkdir()
    for number, content in enumerate(pictures):
        (root / "files" / f"{number:04}.png").write_bytes(content)
    write_tars(root / "tars", pictures, [13, 3, 20, 1, 7])
    write_tars(root / "many tars", pictures, [1, 1, 2] * 10 + [1] * 4)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def plain(
    demo_folder: Path, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], bytes]:
    """The recipe of one process, by the name of a source."""
    root = tmp_path_factory.mktemp("plain")

    @functools.cache
    def recipe(name: str) -> bytes:
        regsurgery.find(str(demo_folder), root / name, images=sources[name])
        return (root / name).read_bytes()

    return recipe


def write_parts(model: Path, where: Path, total: int, **options: Any) -> list[Path]:
    paths = [where / f"{number}.stats" for number in range(1, total + 1)]
    for number, path in enumerate(paths, 1):
        regsurgery.find_part(str(model), path, (number, total), **options)
    return paths


@pytest.fixture(scope="module")
def parts(demo_folder: Path, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three parts of the files."""
    return write_parts(demo_folder, tmp_path_factory.mktemp("parts"), 3, images=sources["files"])


# --- the same recipe ------------------------------------------------------------------------------------------------


def test_merged_parts_give_the_recipe_of_one_process(
    demo_folder: Path, sources: dict[str, Path], plain: Callable[[str], bytes], parts: list[Path], tmp_path: Path
) -> None:
    for name, order in (("a.yaml", parts), ("b.yaml", [parts[2], parts[0], parts[1]])):
        found = regsurgery.find(str(demo_folder), tmp_path / name, images=sources["files"], merge=order)
        assert (tmp_path / name).read_bytes() == plain("files")
        assert found.num_images == NUM_IMAGES - HELD_OUT - 1
    assert found.recipe.register_neurons == find_recipe("demo").register_neurons
    assert sorted(path.name for path in parts[0].parent.iterdir()) == ["1.stats", "2.stats", "3.stats"], "no journals"


@pytest.mark.parametrize(("name", "total"), tiered([("tars", 2), ("many tars", 3)], [("tars", 2)]))
def test_whole_tars_too(
    name: str, total: int, demo_folder: Path, sources: dict[str, Path], plain: Callable[[str], bytes], tmp_path: Path
) -> None:
    paths = write_parts(demo_folder, tmp_path, total, images=sources[name])
    regsurgery.find(str(demo_folder), tmp_path / "merged.yaml", images=sources[name], merge=paths)
    assert (tmp_path / "merged.yaml").read_bytes() == plain(name)


@pytest.mark.slow
def test_a_part_may_be_shared_by_processes(
    demo_folder: Path, sources: dict[str, Path], plain: Callable[[str], bytes], tmp_path: Path
) -> None:
    """Of the first part's three tars one process has two and the other one; the second part has one process."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    images, stats = sources["tars"], [tmp_path / "1.stats", tmp_path / "2.stats"]
    arguments = ("find", demo_folder, "--images", images, "--part", "1/2", "--stats", stats[0], "--json")
    done = subprocess.run(
        [*launcher, "-m", "regsurgery", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_images"] == 13 + 20 + 7 - 1  # one of them is broken
    regsurgery.find_part(str(demo_folder), stats[1], (2, 2), images=images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.stats", "2.stats"]
    regsurgery.find(str(demo_folder), tmp_path / "merged.yaml", images=images, merge=stats)
    assert (tmp_path / "merged.yaml").read_bytes() == plain("tars")


def test_a_statistics_file_says_what_it_is(demo_folder: Path, parts: list[Path], sources: dict[str, Path]) -> None:
    facts = [json.loads(read_header(path).metadata["regsurgery"]) for path in parts]
    assert [(each["part"], each["parts"]) for each in facts] == [(1, 3), (2, 3), (3, 3)]
    assert sum(each["tried"] for each in facts) == NUM_IMAGES - HELD_OUT
    assert [name for each in facts for name in each["broken"]] == [str(sources["files"] / f"{BROKEN:04}.png")]
    settings = facts[0]["settings"]
    assert settings == facts[1]["settings"]
    assert settings["model"] == load(str(demo_folder)).source.sha256
    assert settings["regsurgery"] == regsurgery.__version__
    counted = [int(load_file(path)["counts"][0]) for path in parts]
    assert counted == [each["tried"] - len(each["broken"]) for each in facts]


# --- shares ---------------------------------------------------------------------------------------------------------


def names_of(share: Share) -> list[str]:
    """The images of the share's batches, by name, read as the scoring pass reads them."""
    read: list[str] = []

    def preprocess(images: list[Any]) -> torch.Tensor:
        return torch.zeros(len(images), 3, 2, 2)

    numbered = share.own.numbered_batches(
        BATCH, preprocess, first=share.first, step=share.step, by_file=share.by_file, least=0
    )
    taken = {number for number, _ in numbered}
    for number, batch in enumerate(grouped(list(share.own.source.items(share.own.chosen)), share.by_file)):
        read += [name for name, _ in batch if number in taken]
    return read


def grouped(items: list[Any], by_file: bool) -> list[list[Any]]:
    """Batches made in another way: a new one where it is full or another tar begins."""
    batches: list[list[Any]] = []
    for name, content in items:
        previous = batches[-1][-1][1] if batches else None
        other_tar = by_file and previous is not None and getattr(previous, "path", 0) != getattr(content, "path", 0)
        if not batches or len(batches[-1]) == BATCH or other_tar:
            batches.append([])
        batches[-1].append((name, content))
    return batches


@pytest.mark.parametrize("name", ["files", "tars", "many tars"])
@pytest.mark.parametrize(("total", "processes"), [(1, 3), (4, 1), (3, 2), (7, 1), (20, 2)])
@pytest.mark.parametrize("num_images", [None, 37])
def test_every_image_is_in_one_share(
    name: str,
    total: int,
    processes: int,
    num_images: int | None,
    sources: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("regsurgery.images.image_set.IN_PROCESS", NUM_IMAGES)  # no workers
    shares = [
        share_out(sources[name], num_images, part=Part(number, total), processes=Processes(rank, processes))
        for number in range(1, total + 1)
        for rank in range(processes)
    ]
    seen = Counter(name for share in shares for name in names_of(share))
    whole = image_set(sources[name], num_images)
    judging = shares[0].judging
    held_out = [] if judging is None else [name for name, _ in judging.source.items(judging.chosen)]
    assert seen + Counter(held_out) == Counter(name for name, _ in whole.source.items(whole.chosen))
    assert sum(share.num_images() for share in shares) == whole.num_images - len(held_out)
    assert len({share.identity for share in shares}) == 1
    pilots = {tuple(share.pilot.source.items(share.pilot.chosen)) for share in shares}
    alone = Share.of(whole).pilot
    assert pilots == {tuple(alone.source.items(alone.chosen))}
    assert alone.num_images == min(PILOT_IMAGES, whole.num_images - len(held_out))
    assert {share.note(whole.num_images) for share in shares} == {whole.note}


def test_a_part_opens_its_own_tars_and_of_others_the_first_image(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()
    images_of_tar = _images_of_tar

    def counted(path: Path) -> Any:
        for member in images_of_tar(path):
            read[path.name] += 1
            yield member

    monkeypatch.setattr("regsurgery.images.tars._images_of_tar", counted)
    share = share_out(sources["many tars"], part=Part(3, 17))
    own = {"002.tar", "019.tar"}
    assert {path.name for path in share.own.source.paths} == own  # type: ignore[attr-defined]
    assert sum(read[name] for name in own) <= share.own.num_images + len(own)
    assert all(count == 1 for name, count in read.items() if name not in own)


def test_a_copy_of_the_images_elsewhere_is_the_same_set(sources: dict[str, Path], tmp_path: Path) -> None:
    for name, folder in sources.items():
        copy = tmp_path / name
        copy.mkdir()
        for path in folder.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        identities = [share_out(where, part=Part(1, 2)).identity for where in (folder, copy)]
        assert identities[0] == identities[1]
        last = max(copy.iterdir())
        last.write_bytes(last.read_bytes() + bytes(10240))
        assert share_out(copy, part=Part(1, 2)).identity != identities[0]


# --- killed ---------------------------------------------------------------------------------------------------------


def test_a_stopped_part_goes_on_where_it_was(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regsurgery.search.journal.INTERVAL", 0.0)
    (whole,) = write_parts(demo_folder, tmp_path, 1, num_images=64)
    path = tmp_path / "resumed.stats"
    with pytest.raises(Stop):
        regsurgery.find_part(str(demo_folder), path, (1, 1), num_images=64, progress=StopsAfter(40))
    assert (tmp_path / "resumed.stats.journal").is_file() and not path.exists()
    progress = StopsAfter(None)
    regsurgery.find_part(str(demo_folder), path, (1, 1), num_images=64, progress=progress)
    assert "continuing resumed.stats.journal: 40 images are done" in progress.lines
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["1.stats", "resumed.stats"]


class Rank(Processes):
    """One of two processes, without the other: its sums stay its own."""

    def add_up(self, tensors: Any) -> None:
        pass

    def gathered(self, value: Any) -> list[Any]:
        return [value]

    def decided_by_first(self, decide: Callable[[], Any]) -> Any:
        return decide()


def test_every_process_of_a_killed_launch_has_a_journal_of_its_own(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regsurgery.search.journal.INTERVAL", 0.0)
    loaded = load(str(demo_folder))
    located = locate(loaded, Progress())
    scorer = Scorer(located, 2)

    def score(rank: int, path: Path | None, progress: Progress) -> Sums:
        group = Rank(rank, 2)
        share, sums = share_out(None, 64, processes=group), scorer.new_sums()
        _score(Task(located, share, SearchOptions(progress=progress), group), scorer, sums, path)
        return sums

    path = tmp_path / "vit.yaml.journal"
    for rank in (0, 1):
        with pytest.raises(Stop):
            score(rank, path, StopsAfter(16))
    assert sorted(each.name for each in tmp_path.iterdir()) == [f"{path.name}.{rank}-of-2" for rank in (0, 1)]
    for rank in (0, 1):
        progress, whole = StopsAfter(None), score(rank, None, Progress())
        resumed = score(rank, path, progress)
        assert f"continuing vit.yaml.journal.{rank}-of-2: 16 images are done" in progress.lines
        assert whole.num_images == 32
        for name, total in whole.tensors().items():
            assert total.equal(resumed.tensors()[name])


# --- what does not fit ----------------------------------------------------------------------------------------------


def edited(path: Path, target: Path, **changes: Any) -> Path:
    facts = json.loads(read_header(path).metadata["regsurgery"])
    settings = changes.pop("settings", {})
    facts = {**facts, **changes, "settings": {**facts["settings"], **settings}}
    save_file(load_file(path), target, metadata={"regsurgery": json.dumps(facts)})
    return target


@pytest.mark.parametrize(
    ("chosen", "changes", "message"),
    [
        ([0, 1], {}, r"--merge: 1 of 3 parts missing: 3; make each with regsurgery find --part 3/3 --stats FILE"),
        ([2], {}, r"2 of 3 parts missing: 1, 2; .* --part 1/3"),
        ([0, 1, 1, 2], {}, r"2\.stats: is part 2 of 3, like .*2\.stats; give every part once"),
        ([0, 1, 2], {"part": 2}, r"changed\.stats: is part 2 of 3, like .*2\.stats"),
        ([0, 1, 2], {"parts": 4}, r"changed\.stats: one of 4 parts, .*1\.stats one of 3; merge parts of one division"),
        ([0, 1, 2], {"part": 0}, r"changed\.stats: claims to be part 0 of 3"),
        ([0, 1, 2], {"schema": 2}, r"changed\.stats: has schema 2, .*; make all parts with one version"),
        ([0, 1, 2], {"settings": {"model": "abc"}}, r"changed\.stats: has model abc, but .*1\.stats has .*same MODEL"),
        ([0, 1, 2], {"settings": {"images": "abc"}}, r"changed\.stats: has images abc, but"),
        ([0, 1, 2], {"settings": {"regsurgery": "0.0.1"}}, r"changed\.stats: has regsurgery 0\.0\.1, but"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    chosen: list[int], changes: dict[str, Any], message: str, parts: list[Path], demo_folder: Path, tmp_path: Path
) -> None:
    paths = [parts[index] for index in chosen]
    if changes:
        paths[-1] = edited(paths[-1], tmp_path / "changed.stats", **changes)
    with pytest.raises(UserError, match=message):
        regsurgery.find(str(demo_folder), tmp_path / "out.yaml", merge=paths)
    assert not (tmp_path / "out.yaml").exists()


@pytest.mark.parametrize("damage", ["cut", "garbage", "absent", "model.safetensors", "sums"])
def test_a_damaged_part_is_refused(
    damage: str, parts: list[Path], demo_folder: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "bad.stats"
    if damage == "model.safetensors":
        path = demo_folder / damage
    elif damage == "sums":
        tensors = load_file(parts[2])
        tensors["counts"] = tensors["counts"] * float("nan")
        save_file(tensors, path, metadata=dict(read_header(parts[2]).metadata))
    elif damage != "absent":
        path.write_bytes(parts[2].read_bytes()[:500] if damage == "cut" else b"garbage")
    reason = {"absent": "no such statistics file", "sums": "its sums 'counts' do not fit the model"}
    with pytest.raises(UserError, match=f"{path.name}: {reason.get(damage, 'not a statistics file')}"):
        regsurgery.find(str(demo_folder), images=sources["files"], merge=[*parts[:2], path])


def test_parts_of_other_images_or_another_model_are_refused(
    parts: list[Path], demo_folder: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"1\.stats: has images .*but this search has "):
        regsurgery.find(str(demo_folder), images=sources["tars"], merge=parts)
    with pytest.raises(UserError, match=r"1\.stats: has number of images all, but this search has 40"):
        regsurgery.find(str(demo_folder), images=sources["files"], num_images=40, merge=parts)
    with pytest.raises(UserError, match=r"1\.stats: has precision checkpoint, but this search has bf16"):
        regsurgery.find(str(demo_folder), images=sources["files"], merge=parts, precision="bf16")
    other = tmp_path / "other"
    other.mkdir()
    for file in demo_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    state = load_file(other / "model.safetensors")
    state["classifier.bias"] = state["classifier.bias"] + 1
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1\.stats: has model .*but this search has "):
        regsurgery.find(str(other), images=sources["files"], merge=parts)


def test_no_other_file_is_replaced_by_statistics(demo_folder: Path, parts: list[Path], tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    with pytest.raises(OutputError, match=r"mine\.txt: exists and is not a statistics file; .*--stats"):
        regsurgery.find_part(str(demo_folder), mine, (1, 2))
    assert mine.read_text() == "mine"
    again = tmp_path / "again.stats"
    again.write_bytes(parts[0].read_bytes())
    regsurgery.find_part(str(demo_folder), again, (2, 4), num_images=33)
    assert json.loads(read_header(again).metadata["regsurgery"])["parts"] == 4


def test_where_there_is_nothing_to_fix_no_part_writes_statistics(tmp_path: Path) -> None:
    _transformers("ViTModel", "ViTConfig", hidden_size=32, num_hidden_layers=3, image_size=32, patch_size=8)(
        tmp_path / "model"
    )
    with pytest.raises(NothingToFixError):
        regsurgery.find_part(str(tmp_path / "model"), tmp_path / "1.stats", (1, 2), num_images=8)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- the command line -----------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["regsurgery", "find", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_parts_and_merge_on_the_command_line(
    demo_folder: Path, sources: dict[str, Path], plain: Callable[[str], bytes], parts: list[Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    images = ("--images", sources["files"])
    assert run(monkeypatch, demo_folder, *images, "--part", "2/3", "--stats", tmp_path / "b.stats", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["part"], printed["parts"], printed["stats"]) == (2, 3, str(tmp_path / "b.stats"))
    assert (tmp_path / "b.stats").read_bytes() == parts[1].read_bytes()
    merge = ("--merge", parts[0], tmp_path / "b.stats", parts[2])
    assert run(monkeypatch, demo_folder, *images, *merge, "-o", tmp_path / "merged.yaml", "-q") == 0
    assert (tmp_path / "merged.yaml").read_bytes() == plain("files")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--part", "1/2"), "go together"),
        (("--stats", "x.stats"), "go together"),
        (("--merge",), "statistics files after MODEL"),
        (("a.stats",), "statistics files after MODEL"),
        (("--merge", "a.stats", "--part", "1/2", "--stats", "x"), "without --part"),
        (("--part", "0/2", "--stats", "x.stats"), "--part 0/2: not I/N with I from 1 to N"),
        (("--part", "3/2", "--stats", "x.stats"), "--part 3/2"),
        (("--part", "half", "--stats", "x.stats"), "--part half"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "demo", *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_found_part_is_plain_data() -> None:
    part = FoundPart("a.stats", Part(1, 2), 8, 0)
    assert json.loads(json.dumps(part.as_dict())) == part.as_dict()
    assert replace(part, num_broken=1) != part
