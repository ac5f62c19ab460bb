"""Weights files as training code leaves them: where in a file the weights are, and what else it says.

Most programs save a dictionary that has the weights under a key of their own; some save two sets, the trained weights
and their running average (EMA, or the teacher of a self-distillation).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.checkpoints.pickled import plain_state, unpickled
from regsurgery.checkpoints.reading import is_plain_name, weight_map
from regsurgery.checkpoints.safetensors_file import read_header
from regsurgery.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from torch import Tensor

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".tar", ".pkl", ".pth.tar")
ALONE = ("state_dict", "model", "teacher", "target_encoder", "student", "encoder", "model_state_dict", "module",
         "state_dict_ema", "model_ema", "net")  # fmt: skip
MAX_NESTED = 3
MAX_DEPTH = 4  # of a training script's arguments
INDEX = re.compile(r"\.index(\.\w+)?\.json$")  # of shards, or of the shards of a variant
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch.compile, FSDP, recomputation


@dataclass(frozen=True)
class TwoSets:
    """The keys of averaged and trained weights in one file.

    Attributes:
        by_library: the library's own loader decides which set is loaded; otherwise it is the averaged one.
    """

    averaged: str
    trained: str
    by_library: bool = False


PAIRS = (
    TwoSets("state_dict_ema", "state_dict", by_library=True),  # timm
    TwoSets("model_ema", "model", by_library=True),  # ConvNeXt, and what came from it
    TwoSets("teacher", "student"),  # DINO, DINOv2, iBOT
    TwoSets("target_encoder", "encoder"),  # I-JEPA
    TwoSets("state_dict", "current_model_state"),  # Lightning's WeightAveraging
)
TAKE_AVERAGED = ("timm",)  # libraries whose loader prefers averaged weights


@dataclass(frozen=True)
class Weights:
    """A set of weights in a file.

    Attributes:
        path: the file that the user gave.
        tensors: by their names in the file, without those of wrappers.
        entry: the keys that lead to them, "" for a file that holds nothing else.
        averaged: whether they are the averaged ones of two sets; None if the file has one set.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    entry: str = ""
    averaged: bool | None = None


@dataclass(frozen=True)
class WeightsFile:
    """A weights file, read.

    Attributes:
        parts: the files that hold it: itself, or the shards that it, an index, names.
        content: what it holds.
        torchscript: it is a TorchScript archive.
    """

    path: Path
    parts: tuple[Path, ...]
    content: Any
    torchscript: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The arguments of the training script, if the file has them, as far as they are plain data."""
        arguments = self.facts.get("args")
        found = arguments if isinstance(arguments, dict) else getattr(arguments, "__dict__", {})
        return _plain(found, 0) or {}

    def weights(self, ema: bool | None, library: str) -> Weights:
        """The weights that the loader of `library` takes, or those that the user asks for with `ema`.

        Raises:
            CheckpointError: the file holds no state dict.
            UserError: `ema` is True, and the file has no averaged weights.
        """
        pair = next((pair for pair in PAIRS if _has(self.content, pair)), None)
        if pair is not None:
            averaged = ema if ema is not None else not pair.by_library or library in TAKE_AVERAGED
            keys = [pair.averaged if averaged else pair.trained]
        elif ema:
            raise UserError(f"--ema: {self.path} holds no averaged weights beside the trained ones; leave it out")
        else:
            averaged, keys = None, []
        value = self.content
        for key in keys:
            value = value[key]
        while len(keys) < MAX_NESTED and isinstance(value, dict):
            key = next((key for key in ALONE if isinstance(value.get(key), dict)), None)
            if key is None:
                break
            value = value[key]
            keys.append(key)
        state = plain_state(value, self.path, sum(part.stat().st_size for part in self.parts))
        return Weights(self.path, _unwrapped(state, self.path), ".".join(keys), averaged)


def _plain(value: Any, depth: int) -> Any:
    """The plain data in `value`, down to `MAX_DEPTH`; a pickle may hold itself. Whatever else there is becomes None."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if depth < MAX_DEPTH and isinstance(value, dict):
        return {name: _plain(inner, depth + 1) for name, inner in value.items() if isinstance(name, str)}
    if depth < MAX_DEPTH and isinstance(value, (list, tuple)):
        return type(value)(_plain(inner, depth + 1) for inner in value)
    return None


def read_weights_file(path: Path, allow_pickle: bool) -> WeightsFile:
    """Read a weights file: safetensors, a pickle of `torch.save`, a TorchScript archive, or the index of shards.

    Raises:
        CheckpointError: it is a pickle and these are not allowed, is broken, or of another kind.
    """
    if INDEX.search(path.name):
        return _read_shards(path, allow_pickle)
    content = _read(path, allow_pickle)
    scripted = path.suffix != ".safetensors" and _is_torchscript(path)
    facts = {key: content[key] for key in ("arch", "args", "name") if isinstance(content, dict) and key in content}
    return WeightsFile(path, (path,), content, scripted, facts)


def refuse_pickle(path: Path) -> None:
    """Raise `CheckpointError` for pickled weights that were not allowed."""
    raise CheckpointError(
        f"{path}: pickled weights can run code when loaded and are refused; convert them to safetensors, or "
        "pass --allow-pickle if you trust their author"
    )


def _read(path: Path, allow_pickle: bool) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        read_header(path)
        return load_file(path)
    if not path.name.endswith(PICKLE_SUFFIXES):
        raise CheckpointError(
            f"{path}: not a weights file that is read; give one that ends in .safetensors, "
            f"{', '.join(PICKLE_SUFFIXES[:4])}, or the folder that holds the checkpoint"
        )
    if not allow_pickle:
        refuse_pickle(path)
    return unpickled(path)


def _read_shards(index: Path, allow_pickle: bool) -> WeightsFile:
    """The shards that an index names, as one state dict."""
    names = weight_map(index)
    shards = []
    for name in sorted(set(names.values())):
        if not is_plain_name(name):
            raise CheckpointError(f"{index}: names the shard {name[:300]!r}, which is not a file of the folder")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name}: named by {index.name} but missing; get it again")
        shards.append(index.parent / name)
    content: dict[str, Tensor] = {}
    for shard in shards:
        state = plain_state(_read(shard, allow_pickle), shard)
        for name, tensor in state.items():
            if name in content:
                raise CheckpointError(f"{shard}: tensor {name!r} is in another shard too; get both files again")
            content[name] = tensor
    missing = sorted(names.keys() - content.keys())
    if missing:
        raise CheckpointError(f"{index}: tensor {missing[0][:300]!r} is in no shard; get the index again")
    return WeightsFile(index, (index, *shards), content)


def _is_torchscript(path: Path) -> bool:
    import zipfile

    from regsurgery.checkpoints.torchscript import is_torchscript

    return zipfile.is_zipfile(path) and is_torchscript(zipfile.ZipFile(path).namelist())


def _has(content: Any, pair: TwoSets) -> bool:
    return isinstance(content, dict) and all(
        isinstance(content.get(key), dict) for key in (pair.averaged, pair.trained)
    )


def _unwrapped(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`state` without the names of wrappers, wherever they are.

    Raises:
        CheckpointError: two names become one.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        plain = name
        for wrapper in WRAPPERS:
            plain = plain.replace(wrapper, "")
        if plain in found:
            raise CheckpointError(f"{path}: has the tensor {plain!r} twice, once inside a wrapper; keep one of them")
        found[plain] = tensor
    return found


def prefixes(names: Sequence[str], least: int) -> list[str]:
    """What a wrapper may have put in front of a model's names, shortest first, from ""; each begins `least` names."""
    counts: dict[str, int] = {"": len(names)}
    for name in names:
        parts = name.split(".")[:-1]
        for depth, part in enumerate(parts):
            if part.isdecimal():
                break
            prefix = ".".join(parts[: depth + 1]) + "."
            counts[prefix] = counts.get(prefix, 0) + 1
    return sorted((p for p, count in counts.items() if count >= least), key=lambda p: (p.count("."), p))
