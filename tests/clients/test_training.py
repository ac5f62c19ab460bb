"""Tools that train, spread or place a model: Trainer, DDP and FSDP2, accelerate, bitsandbytes, timm, open_clip."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import regsurgery
from regsurgery.backends.modeling import import_modeling
from regsurgery.recipe import Recipe
from tests.clients.conftest import MODES, opened, outliers, photos, say
from tests.conftest import Planted
from tests.e2e.test_parity import pictures
from tests.picos import Pico, by_id

pytestmark = pytest.mark.slow
ALL = pytest.mark.parametrize("mode", ["stock", *MODES])


@ALL
def test_the_trainer_trains_it_and_its_folder_is_patched(mode: str, folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = opened(folders[mode])
    data = [{"pixel_values": image, "labels": label} for label, image in enumerate(photos())]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, learning_rate=1e-4,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)  # type: ignore[arg-type]
    loss = trainer.train().training_loss
    trainer.save_model(str(tmp_path / "saved"))
    model.eval()
    again = opened(tmp_path / "saved")
    with torch.no_grad():
        differs = float((again(photos()).logits - model(photos()).logits).abs().max())
    say("transformers Trainer", mode, "saved and reloaded, largest difference of logits", differs)
    assert 0 < loss < 20 and differs < 1e-5
    assert mode == "stock" or regsurgery.still_patched(again, photos())
    assert (outliers(again) > 0.5) == (mode == "stock")


def test_two_processes_train_as_one(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
         "tests.clients.distributed", json.dumps({mode: str(folder) for mode, folder in folders.items()}), str(out)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, found in json.loads(out.read_text()).items():
        mode, how = name.split()
        say(f"torch {how}", mode, "largest difference of gradients from one process, relative", found["gradients"])
        assert found["logits"] < 1e-5 and found["gradients"] < 1e-5 and found["held"], (name, found)


@ALL
def test_accelerate_offloads_blocks(mode: str, folders: dict[str, Path], tmp_path: Path) -> None:
    from accelerate import dispatch_model

    model = opened(folders[mode])
    with torch.no_grad():
        expected = model(photos()).logits
    layers = next(name for name, _ in model.named_modules() if name.endswith(("layers", "encoder.layer")))
    places = {f"{layers}.{number}": "disk" if number % 2 else "cpu" for number in range(model.config.num_hidden_layers)}
    for name, _ in (*model.named_modules(), *model.named_parameters()):
        if not any(f"{place}.".startswith(f"{name}.") or f"{name}.".startswith(f"{place}.") for place in places):
            places[name] = "cpu"
    device = torch.device("cpu")
    spread: Any = dispatch_model(model, places, main_device=device, offload_dir=str(tmp_path), force_hooks=True)  # type: ignore[arg-type]
    with torch.no_grad():
        differs = float((spread(photos()).logits - expected).abs().max())
    say("accelerate half of the blocks on disk", mode, "largest difference of logits", differs)
    assert differs < 1e-6
    assert any(one.is_meta for one in spread.parameters()), "nothing was offloaded"


@ALL
def test_bitsandbytes_in_eight_bits(mode: str, folders: dict[str, Path]) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model = opened(folders[mode], quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with torch.no_grad():
        expected = opened(folders[mode])(photos()).logits
        moved = float((model(photos()).logits.float() - expected).abs().max() / expected.abs().max())
    say("bitsandbytes 8 bits", mode, "largest change of logits, relative", moved)
    assert 0 < moved < 0.5
    assert mode == "stock" or regsurgery.still_patched(model, photos())
    assert (outliers(model) > 0.5) == (mode == "stock")


@pytest.fixture(scope="module")
def patched(
    planted_picos: Callable[[Pico], Planted], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """(pico, mode) -> folder; `stock` is the original's."""
    root = tmp_path_factory.mktemp("trained")

    @functools.cache
    def made(pico: str, mode: str) -> Path:
        planted = planted_picos(by_id(pico))
        if mode == "stock":
            return planted.folder
        recipe = Recipe({block: tuple(listed) for block, listed in planted.neurons.items()})
        folder = root / f"{pico}-{mode}"
        regsurgery.patch(str(planted.folder), folder, recipe=recipe, mode=mode, num_images=8, verification=False,
                         calibrate=False)  # fmt: skip
        return folder

    return made


def built(folder: Path) -> Any:
    """The model of a timm or open_clip folder: by the folder's own loader file, or by the library."""
    if (folder / "modeling_regsurgery.py").exists():
        return import_modeling(folder, "", trusted=True).load(folder)
    import open_clip
    import timm

    if (folder / "open_clip_config.json").exists():
        return open_clip.create_model(f"local-dir:{folder}")
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


@ALL
def test_timm_takes_features_by_a_getter(mode: str, patched: Callable[[str, str], Path]) -> None:
    from timm.models._features import FeatureGetterNet

    model = built(patched("timm-vit", mode)).eval()
    images = pictures(2, (64, 64))
    getter = FeatureGetterNet(model, out_indices=(1, 2))
    with torch.no_grad():
        first, second = getter(images)
        seen = model.forward_intermediates(images, indices=(1, 2), intermediates_only=True)
    differs = max(float((one - other).abs().max()) for one, other in zip((first, second), seen, strict=True))
    say("timm FeatureGetterNet", mode, "largest difference from forward_intermediates", differs)
    assert first.shape == second.shape == (2, model.embed_dim, *model.patch_embed.grid_size) and differs == 0


@ALL
def test_open_clip_trains_it(mode: str, patched: Callable[[str, str], Path]) -> None:
    from open_clip.loss import ClipLoss

    model = built(patched("open-clip", mode)).train()
    images, texts = pictures(4, (64, 64)), torch.randint(1, 50, (4, model.context_length))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(5):
        embeddings, of_texts, scale = model(images, texts)[:3]
        loss = ClipLoss()(embeddings, of_texts, scale)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    say("open_clip_torch ClipLoss", mode, "loss after five steps against the first", losses[-1] / losses[0])
    assert losses[-1] < losses[0]
    if mode != "stock":
        folder = patched("open-clip", mode)
        assert regsurgery.still_patched(model.eval(), images, folder=folder, run=model.encode_image)


@ALL
def test_clip_benchmark_classifies_with_it(mode: str, patched: Callable[[str, str], Path]) -> None:
    benchmark = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    model = built(patched("open-clip", mode)).eval()
    names, generator = [f"class {number}" for number in range(8)], torch.Generator().manual_seed(0)
    tokens = dict(zip(names, torch.randint(1, 50, (8, model.context_length), generator=generator), strict=True))
    images, labels = pictures(8, (64, 64)), torch.arange(8)
    tokenizer = lambda texts: torch.stack([tokens[text] for text in texts])  # noqa: E731
    classifier = benchmark.zero_shot_classifier(model, tokenizer, names, ["{c}"], "cpu", amp=False)
    data = DataLoader(TensorDataset(images, labels), batch_size=4)  # type: ignore[arg-type]
    found, _ = benchmark.run_classification(model, classifier, data, "cpu", amp=False)
    with torch.no_grad():
        of_images, of_texts = (
            torch.nn.functional.normalize(one, dim=-1)
            for one in (model.encode_image(images), model.encode_text(torch.stack(list(tokens.values()))))
        )
    differs = float((found - 100 * of_images @ of_texts.T).abs().max())
    say("clip-benchmark zero-shot", mode, "largest difference from the model's own logits", differs)
    assert differs < 1e-3
