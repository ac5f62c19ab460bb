"""Weights that stay on disk give what weights in memory give, in a fraction of the memory."""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors.torch import load_file

import regsurgery
from regsurgery.checkpoints import stored, sums
from regsurgery.checkpoints.safetensors_file import read_header
from regsurgery.checkpoints.stored import StoredTensor, is_stored, stored_state
from regsurgery.checkpoints.sums import sha256
from regsurgery.compiler.modes import native
from regsurgery.compiler.modes.closed_form import NativeModel
from regsurgery.compiler.modes.operation import Operation
from regsurgery.compiler.taps import tap
from regsurgery.errors import CheckpointError, UserError
from regsurgery.frontends.load import load
from regsurgery.images.image_set import image_set
from regsurgery.models import locate
from regsurgery.options import LoadOptions, parse_size
from regsurgery.progress import Progress
from regsurgery.recipe import Recipe
from tests.conftest import Planted
from tests.e2e.test_find import StopsAfter
from tests.e2e.test_parity import pictures, recipe_for
from tests.photos import write_photos
from tests.picos import Pico, by_id

# Every library; a tower below a language model; renamed keys, fused ones, biases, rotary positions, another dtype.
SAMPLES = ("hf-clip-vision", "hf-llava", "hf-data2vec", "timm-dinov2-swiglu", "timm-dinov3", "open-clip",
           "open-clip-over-timm")  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_the_same_figures_and_bytes(name: str, planted_picos: Callable[[Pico], Planted], tmp_path: Path) -> None:
    planted = planted_picos(by_id(name))
    recipe = recipe_for(planted, 1)
    verdicts = [
        regsurgery.patch(
            str(planted.folder), tmp_path / where, recipe=recipe, num_images=8, max_memory=max_memory
        ).verdict
        for where, max_memory in (("memory", None), ("disk", 0))
    ]
    assert verdicts[0] == verdicts[1]
    sums = [(tmp_path / where / "SHA256SUMS").read_text() for where in ("memory", "disk")]
    assert sums[0] == sums[1]
    assert regsurgery.verify(tmp_path / "disk", num_images=8, max_memory=0).passed


# In the host by the same names, and where tensors get other names or shapes: one qkv for three, three for one, a head
# transposed, no place for a text tower.
@pytest.mark.parametrize(
    ("name", "fmt", "calibrate"),
    [
        ("hf-dinov2", "transformers", True),
        ("hf-vit-classes", "timm", False),
        ("timm-vit", "transformers", False),
        ("open-clip-over-timm", "open_clip", True),
    ],
)
def test_native_mode_writes_the_same_bytes(
    name: str, fmt: str, calibrate: bool, planted_picos: Callable[[Pico], Planted], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("regsurgery.verification.measure.MIN_COSINE_OUTPUT", -1.0)  # a random head over few patches
    monkeypatch.setattr("regsurgery.search.division.GENERATED_TO_FIT", 16)
    monkeypatch.setattr("regsurgery.compiler.modes.calibrate.STEPS", 4)
    monkeypatch.setattr("regsurgery.compiler.modes.calibrate.CHECK_EVERY", 2)
    planted = planted_picos(by_id(name))
    recipe = Recipe({block: tuple(neurons) for block, neurons in planted.neurons.items()}, mode="native")
    verdicts, sums = [], []
    for where, max_memory in (("memory", None), ("disk", 0)):
        (tmp_path / where).mkdir()
        monkeypatch.chdir(tmp_path / where)
        result = regsurgery.patch(
            str(planted.folder),
            "out",
            recipe=recipe,
            calibrate=calibrate,
            format=fmt,
            num_images=8,
            max_memory=max_memory,
        )
        verdicts.append(result.verdict)
        sums.append(dict(line.split("  ")[::-1] for line in Path("out/SHA256SUMS").read_text().splitlines()))
    assert verdicts[0] == verdicts[1]
    if fmt == "open_clip":  # its config names the folder
        assert {each.pop("open_clip_config.json") for each in sums}
    assert sums[0] == sums[1]
    assert regsurgery.verify("out", num_images=8, max_memory=0).passed


def test_native_mode_of_shards_writes_shards(planted_picos: Callable[[Pico], Planted], tmp_path: Path) -> None:
    from transformers import Dinov2WithRegistersModel

    planted = planted_picos(by_id("hf-dinov2"))
    planted.loaded.model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    recipe = Recipe({block: tuple(neurons) for block, neurons in planted.neurons.items()}, mode="native")
    for where, max_memory in (("memory", None), ("disk", 0)):
        regsurgery.patch(
            str(tmp_path / "sharded"), tmp_path / where, recipe=recipe, calibrate=False, format="transformers",
            num_images=8, max_memory=max_memory,
        )  # fmt: skip
    assert (tmp_path / "memory" / "SHA256SUMS").read_text() == (tmp_path / "disk" / "SHA256SUMS").read_text()
    shards = sorted((tmp_path / "disk").glob("*.safetensors"))
    largest = max(path.stat().st_size for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1 and all(path.stat().st_size <= largest + 10_000 for path in shards)
    _, info = Dinov2WithRegistersModel.from_pretrained(tmp_path / "disk", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_weights_on_disk_are_not_calibrated_unless_asked(demo_folder: Path, tmp_path: Path) -> None:
    """Every step of calibration would read them twice."""
    files = write_photos(tmp_path / "photos", 20, 3)
    said: dict[bool | None, str] = {}
    for calibrate in (None, True):
        progress = StopsAfter(None)
        result = regsurgery.patch(
            str(demo_folder), tmp_path / str(calibrate), recipe="demo", mode="native", images=files, max_memory=0,
            calibrate=calibrate, stop_after=1, verification=False, progress=progress,
        )  # fmt: skip
        assert result.verdict is None
        said[calibrate] = "\n".join(progress.lines)
        fit = json.loads((tmp_path / str(calibrate) / "config.json").read_text())["regsurgery"]["fit"]
        assert (fit["calibration"] is None) == (calibrate is None)
    assert "native: not calibrated: weights stay on disk" in said[None]
    assert "not calibrated" not in said[True]


def test_find_reads_from_disk(planted_picos: Callable[[Pico], Planted]) -> None:
    planted = planted_picos(by_id("hf-vit-classes"))
    found = regsurgery.find(str(planted.folder), num_images=32, max_memory=0)
    assert found.recipe.register_neurons == {block: tuple(listed) for block, listed in planted.neurons.items()}


def test_a_stored_tensor_is_read_by_operators_alone(planted_picos: Callable[[Pico], Planted]) -> None:
    planted = planted_picos(by_id("hf-vit-classes"))
    loaded = load(str(planted.folder), LoadOptions(max_memory=0))
    assert is_stored(loaded.model) and not is_stored(planted.loaded.model)
    (path,) = loaded.weights
    in_memory, on_disk = load_file(path), stored_state([path])
    assert on_disk.keys() == in_memory.keys()
    for name, value in on_disk.items():
        assert isinstance(value.detach(), StoredTensor) and value.shape == in_memory[name].shape
        assert torch.equal(value + 0, in_memory[name]), name
    half = on_disk["vit.embeddings.cls_token"].to(torch.float16)
    assert isinstance(half, StoredTensor)
    assert torch.equal(half * 1, in_memory["vit.embeddings.cls_token"].half())


def test_nothing_is_read_to_trace_and_match(
    planted_picos: Callable[[Pico], Planted], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But what stands before the first block: where the prefix ends is seen on an image of NaN."""
    planted = planted_picos(by_id("hf-vit-classes"))
    read: list[str] = []
    plain = StoredTensor.read
    monkeypatch.setattr(stored.StoredTensor, "read", lambda self: (read.append(self.entry.name), plain(self))[1])
    with pytest.raises(UserError, match="with all weights in memory"):
        regsurgery.patch(
            str(planted.folder), "nowhere", recipe=Recipe({1: (0,)}), format="pt2", max_memory=0, dry_run=True
        )
    assert read
    assert all(".embeddings." in name for name in read)


def test_a_file_that_is_cut_while_it_is_used(tmp_path: Path, planted_picos: Callable[[Pico], Planted]) -> None:
    (path,) = planted_picos(by_id("hf-vit-classes")).loaded.weights
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    state = stored_state([copy])
    last = max(state.values(), key=lambda value: value.entry.stop)  # type: ignore[attr-defined]
    with copy.open("r+b") as file:
        file.truncate(copy.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="cut off inside tensor"):
        last + 0


@pytest.mark.parametrize("mode", ["shift", "native"])
def test_what_needs_all_weights_says_so(mode: str, planted_picos: Callable[[Pico], Planted], tmp_path: Path) -> None:
    planted = planted_picos(by_id("hf-vit-classes"))
    with pytest.raises(UserError, match=r"format pt2.*--max-memory"):
        regsurgery.patch(
            str(planted.folder), tmp_path / "out", recipe=recipe_for(planted, 1), mode=mode, format="pt2",
            max_memory=0,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_sizes() -> None:
    assert [parse_size(text) for text in ("0", "8GB", "500MB", "1GiB")] == [0, 8 * 10**9, 500 * 10**6, 1 << 30]
    with pytest.raises(UserError, match="--max-memory many"):
        parse_size("many")


def measured(folder: str, out: str, mode: str, limit: int, figures: str) -> None:
    """In a process of its own: how much memory `patch` adds, in MB, to the file `figures`."""
    from regsurgery.compiler.modes import calibrate
    from regsurgery.search import division
    from regsurgery.verification import measure

    def memory(key: str) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) / 1024  # not ru_maxrss, which begins with the parent's peak

    measure.MIN_COSINE_OUTPUT = -1.0  # random weights
    division.GENERATED_TO_FIT, calibrate.STEPS, calibrate.CHECK_EVERY = 16, 2, 1
    before = memory("VmRSS")
    regsurgery.patch(folder, out, recipe=Recipe({0: (1,)}, mode=mode), num_images=8, dry_run=True, max_memory=limit)
    Path(figures).write_text(str(memory("VmHWM") - before))


MANY = 8  # blocks, of 50 MB


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shift", "native"])
def test_a_model_of_many_blocks_needs_the_memory_of_few(mode: str, tmp_path: Path) -> None:
    import transformers

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.drills.preloaded", __name__])
    sizes: dict[int, float] = {}
    for blocks in (2, MANY):
        config = transformers.Dinov2Config(hidden_size=1024, num_hidden_layers=blocks, num_attention_heads=8,
                                           image_size=32, patch_size=16)  # fmt: skip
        transformers.Dinov2Model(config).save_pretrained(tmp_path / str(blocks))
        sizes[blocks] = (tmp_path / str(blocks) / "model.safetensors").stat().st_size / 1024**2

    def grown(blocks: int, limit: int) -> float:
        figures = tmp_path / f"{blocks}-{limit}"
        given = (str(tmp_path / str(blocks)), str(tmp_path / "out"), mode, limit, str(figures))
        process = context.Process(target=measured, args=given)  # forked from one that has imported everything
        process.start()
        process.join(240)
        assert process.exitcode == 0
        return float(figures.read_text())

    # What the libraries need for themselves differs by machine and cancels out: only further blocks are compared.
    more = sizes[MANY] - sizes[2]
    assert more > 280
    few, many, loaded = grown(2, 0), grown(MANY, 0), grown(MANY, 10**12)
    if many - few >= 0.25 * more:  # a busy machine gives pages of mapped files back late; it never takes memory away
        many = min(many, grown(MANY, 0))
    assert many - few < 0.25 * more < more < loaded - few, (few, many, loaded)


@pytest.mark.parametrize("max_memory", [None, 0])
def test_a_stretch_gives_what_the_images_give(max_memory: int | None, planted_picos: Callable[[Pico], Planted]) -> None:
    """From the previous edited block as from the images: the first block, its neighbour, and one after a gap."""
    planted = planted_picos(by_id("hf-vit-classes"))
    loaded = load(str(planted.folder), LoadOptions(max_memory=max_memory))
    model = NativeModel(locate(loaded, Progress()), Recipe({0: (1,), 1: (3,), 3: (5,)}, mode="native"))
    changed: dict[str, torch.Tensor] = {}
    images = pictures(2, loaded.image_size)
    entering: tuple[torch.Tensor, ...] = ()
    for block, mlp in model.mlps.items():
        ((found,),) = model.mlp_inputs(block, [(changed, [(images, *entering)])])
        whole = tap(model.graph_module, {"mlp": mlp.source}, early_exit=True)
        ((run,),) = model.run_all(whole, [(changed, [(images,)])])
        registers_ND, others_ND = split(run[1]["mlp"], model)
        assert torch.equal(found.registers_ND, registers_ND) and torch.equal(found.others_ND, others_ND)
        entering = found.entering
        changed[mlp.down] = 1.5 * model.parameter({}, mlp.down) + 0
    assert len(entering) == 1


def split(tokens_BTD: torch.Tensor, model: NativeModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The register, which is the last token, and all others."""
    assert model.sites.placement == "end"
    return tokens_BTD[:, -1:].flatten(0, 1), tokens_BTD[:, :-1].flatten(0, 1)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many bytes of which weight were read from disk."""
    found: Counter[str] = Counter()
    plain = StoredTensor.bytes_of

    def bytes_of(self: StoredTensor, file: BinaryIO) -> torch.Tensor:
        found[self.entry.name] += self.entry.stop - self.entry.start
        return plain(self, file)

    monkeypatch.setattr(StoredTensor, "bytes_of", bytes_of)
    return found


def test_verify_reads_every_shard_once(
    planted_picos: Callable[[Pico], Planted], tmp_path: Path, read: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once to compare its sha256. Four models see every image: they were eight readings here once."""
    planted = planted_picos(by_id("hf-dinov2"))
    planted.loaded.model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    regsurgery.patch(
        str(tmp_path / "sharded"), tmp_path / "out", recipe=recipe_for(planted, 1), verification=False, num_images=1,
        max_memory=0,
    )  # fmt: skip
    read.clear()
    hashed: Counter[Path] = Counter()
    monkeypatch.setattr(sums, "sha256", lambda path: (hashed.update([path]), sha256(path))[1])
    regsurgery.verify(tmp_path / "out", num_images=16, max_memory=0)
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1 and all(hashed[path] == 1 for path in shards)
    blocks = {name: count for name, count in read.items() if "encoder.layer" in name}
    in_blocks = sum(
        tensor.stop - tensor.start
        for path in shards
        for tensor in read_header(path).tensors
        if "encoder.layer" in tensor.name
    )
    assert blocks and sum(blocks.values()) == in_blocks, blocks


def test_native_mode_reads_weights_on_disk_a_few_times(
    planted_picos: Callable[[Pico], Planted], read: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One reading serves all that is seen before the edit, another all markers that memory has room for; both serve
    all batches. 343 readings were taken once.
    """
    planted = planted_picos(by_id("hf-vit"))
    loaded = load(str(planted.folder), LoadOptions(max_memory=0))
    located, recipe = locate(loaded, Progress()), Recipe({1: (3,), 2: (5,)}, mode="native")
    monkeypatch.setattr("regsurgery.compiler.modes.closed_form.MIN_MARGIN", -10.0)
    read.clear()
    on_disk = native.operate(Operation(located, recipe, image_set(None, 64)))
    sizes = {tensor.name: tensor.stop - tensor.start for path in loaded.weights for tensor in read_header(path).tensors}
    assert 0 < sum(read.values()) <= 3 * sum(sizes.values())
    assert all(count <= 3 * sizes[name] for name, count in read.items() if ".layer." in name), read
    in_memory = native.operate(Operation(planted.located, recipe, image_set(None, 64)))
    assert on_disk.edit.keys() == in_memory.edit.keys()
    assert all(torch.equal(value, in_memory.edit[name]) for name, value in on_disk.edit.items())
