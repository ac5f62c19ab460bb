"""The tensors of a TorchScript archive, such as OpenAI's CLIP models: read without running what it contains.

`torch.jit.load` would run the archive's own code (`__setstate__`). Here its modules are bags of attributes, and only
tensors come out.
"""

from __future__ import annotations

import io
import pickle  # nosec B403 # an unpickler of its own, below, which knows tensors alone
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MODULES = "__torch__"  # what the names of an archive's own classes begin with
MAX_DEPTH = 64  # of modules in modules
STORAGES = {"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
            "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
            "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool"}  # fmt: skip


def is_torchscript(names: Sequence[str]) -> bool:
    """Whether an archive with these entries is TorchScript; torch decides by the same entry."""
    return any(name.endswith("/constants.pkl") for name in names)


def is_read(name: str) -> bool:
    """Whether `read_torchscript` reads the entry `name`."""
    return name.endswith("/data.pkl") or "/data/" in name


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The tensors of the archived module and of the modules in it, by their names in its state dict.

    Raises:
        UnpicklingError: it holds something else than modules, tensors and plain data.
        ValueError, RuntimeError, KeyError, BadZipFile: it is broken.
    """
    with zipfile.ZipFile(path) as archive:
        data = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        found = _Reader(archive, data).load()
    if not isinstance(found, _Module):
        raise ValueError("it holds no module")
    return dict(_tensors(found, "", 0))


def _tensors(module: _Module, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    import torch

    if depth > MAX_DEPTH:
        raise ValueError("its modules are nested too deeply")
    for name, value in vars(module).items():
        if isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.", depth + 1)
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value


class _Module:
    """An object of a class that the archive defines: its attributes alone."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError("a module without attributes")
        vars(self).update(state)


class _Reader(pickle._Unpickler):  # type: ignore[name-defined]  # in Python: its memory grows with the file only
    """Reads `data.pkl`; whatever is not known to be harmless is refused."""

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        super().__init__(io.BytesIO(archive.read(name)))
        self._archive, self._root = archive, name.removesuffix(".pkl")
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == MODULES:
            return _Module
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in STORAGES:
            return name
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return _plain
        raise pickle.UnpicklingError(f"Unsupported global: {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        """All elements of a storage, flat."""
        import torch

        kind, storage, key, *_ = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"an entry of the unknown kind {kind!r:.40}")
        if key not in self._storages:
            dtype = getattr(torch, STORAGES[storage])
            raw = bytearray(self._archive.read(f"{self._root}/{key}"))
            self._storages[key] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _plain(value: Any, *_: Any) -> Any:
    return value
