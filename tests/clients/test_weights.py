"""Tools that change weights: adapters, quantisation-aware training, quantisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import regsurgery
from tests.clients.conftest import MODES, opened, outliers, photos, say

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("mode", ["stock", *MODES])
def test_an_adapter_on_every_linear_serves_what_it_trained(mode: str, dora: bool, folders: dict[str, Path]) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules="all-linear", r=4, use_dora=dora, init_lora_weights="gaussian")
    model: Any = peft.get_peft_model(opened(folders[mode]), config)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=3e-3)
    images, labels = photos(), torch.arange(4)
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(pixel_values=images).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert mode == "stock" or regsurgery.still_patched(model, images)
    with_gradients = model(pixel_values=images).logits.detach()
    with torch.no_grad():
        without = model(pixel_values=images).logits
        merged = model.merge_and_unload()
        served = merged(pixel_values=images).logits
    differs = max(float((other - without).abs().max()) for other in (with_gradients, served))
    say("peft " + ("DoRA" if dora else "LoRA"), mode, "merged and with gradients against without", differs)
    assert differs < 1e-4
    assert (outliers(merged) > 0.5) == (mode == "stock")


@pytest.mark.parametrize("kind", ["QAT", "int8"])
@pytest.mark.parametrize("mode", ["stock", *MODES])
def test_torchao_keeps_the_outliers_away(mode: str, kind: str, folders: dict[str, Path]) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.qat import QATConfig

    model = opened(folders[mode])
    images = photos()
    with torch.no_grad():
        expected = model(images).logits
    if kind == "QAT":
        base = quantization.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=PerGroup(32)
        )
        config = QATConfig(base, step="prepare")
    else:
        config = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(model, config)
    with torch.no_grad():
        moved = float((model(images).logits - expected).abs().max() / expected.abs().max())
    say(f"torchao {kind}", mode, "largest change of logits, relative", moved)
    assert 0 < moved < 0.5
    assert mode == "stock" or regsurgery.still_patched(model, images)
    assert (outliers(model) > 0.5) == (mode == "stock")
