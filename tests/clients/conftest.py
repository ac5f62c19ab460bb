"""The demo model, which has outliers, stock and patched in each mode."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regsurgery
from tests.e2e.test_parity import pictures
from tests.reference import outlier_patches

MODES = ("shift", "bias", "native")
figures: defaultdict[tuple[str, str], dict[str, float]] = defaultdict(dict)  # (tool, check) -> mode -> figure
SIZE = (96, 96)


@pytest.fixture(scope="session")
def folders(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Mode -> folder that `patch` wrote; `stock` is the original."""
    made = {"stock": demo_folder}
    for mode in MODES:
        made[mode] = tmp_path_factory.mktemp("clients") / mode
        regsurgery.patch(str(demo_folder), made[mode], recipe="demo", mode=mode, num_images=8, verification=False)
    return made


def opened(folder: Path, **kwargs: Any) -> Any:
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()


class Logits(nn.Module):
    """What tracers take: tensors in, one tensor out; of a model of transformers, or of a program."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels)["logits"]


def photos(count: int = 4) -> Tensor:
    return pictures(count, SIZE)


@torch.no_grad()
def outliers(model: nn.Module) -> float:
    """Outlier patches per image after the last block but one."""
    states: Any = model(photos(), output_hidden_states=True).hidden_states
    patches_BND = states[-2][:, -144:]
    return float(outlier_patches(patches_BND.norm(dim=-1)).sum(dim=1).float().mean())


def say(tool: str, mode: str, check: str, figure: float) -> None:
    """A row for the table of `python -m tests.clients`; `tool` begins with the name of its package."""
    figures[tool, check][mode] = figure
