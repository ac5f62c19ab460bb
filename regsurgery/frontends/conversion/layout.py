"""The weights of a checkpoint folder: which of its files they are, whatever else training left next to them."""

from __future__ import annotations

import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

from regsurgery.checkpoints.containers import PICKLE_SUFFIXES
from regsurgery.checkpoints.reading import WEIGHT_SUFFIXES
from regsurgery.errors import CheckpointError
from regsurgery.formats import WEIGHTS_NAMES

PICKLED_NAMES = {"transformers": "pytorch_model.bin", "timm": "pytorch_model.bin",
                 "open_clip": "open_clip_pytorch_model.bin"}  # fmt: skip
# What trainers save next to the weights to continue from there.
NO_WEIGHTS = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "training_args.bin", "random_states_*", "sampler*",
              "dataloader*", "custom_checkpoint_*")  # fmt: skip


def weights_file(folder: Path, library: str) -> Path:
    """The weights file, or index, of a folder that has no safetensors under the library's own name.

    A variant (`model.fp16.safetensors`) comes before pickles.

    Raises:
        CheckpointError: there is none, or it is not clear which.
    """
    single, pickled = WEIGHTS_NAMES[library], PICKLED_NAMES[library]
    for choice in (_variants(folder, single), _named(folder, pickled), _variants(folder, pickled), _others(folder)):
        if len(choice) > 1:
            names = ", ".join(path.name for path in choice[:4])
            raise CheckpointError(
                f"{folder}: has {len(choice)} files that may hold its weights ({names}); give the right one as MODEL"
            )
        if choice:
            return choice[0]
    raise CheckpointError(f"{folder}: has a config but no weights; {single} is missing, add it")


def _named(folder: Path, name: str) -> list[Path]:
    """The file of that name, or its index."""
    return [path for path in (folder / name, folder / f"{name}.index.json") if path.is_file()][:1]


def _variants(folder: Path, name: str) -> list[Path]:
    """Files of a variant, or their indexes: `model.fp16.safetensors`, `model.safetensors.index.fp16.json`."""
    stem, suffix = name.rsplit(".", 1)
    pattern = re.compile(rf"{re.escape(stem)}\.\w+\.{suffix}|{re.escape(name)}\.index\.\w+\.json")
    return sorted(path for path in folder.iterdir() if path.is_file() and pattern.fullmatch(path.name))


def _others(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and path.name.endswith(PICKLE_SUFFIXES)
        and not path.name.startswith(".")
        and not any(fnmatch(path.name, pattern) for pattern in NO_WEIGHTS)
    )


def copy_all_but_weights(source: Path, target: Path) -> None:
    """Copy the files of a checkpoint folder that are neither weights nor their index, nor hidden."""
    for path in sorted(source.iterdir()):
        weights = path.suffix in WEIGHT_SUFFIXES | {".pkl", ".tar"} or ".index." in path.name
        if path.is_file() and not path.name.startswith(".") and not weights:
            shutil.copyfile(path, target / path.name)
