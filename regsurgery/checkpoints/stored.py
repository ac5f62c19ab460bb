"""Weights that stay on disk: tensors that an operator reads when it needs them, and that are freed after it.

A model made of them has shapes and names but takes no memory; running it takes the memory of one operator at a time.
They replace parameters, so graphs and modules need not know. Rearranged tensors are not in memory either, so state
dicts can be translated, and gradients pass through a weight without keeping it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from regsurgery.checkpoints.safetensors_file import TensorEntry, read_header, torch_dtype
from regsurgery.checkpoints.turns import taken
from regsurgery.errors import CheckpointError
from regsurgery.settings import replaced

aten = torch.ops.aten

# Operators that only rearrange elements and compute nothing.
ARRANGING = {aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default, aten.unsqueeze.default,
             aten.squeeze.dim, aten.slice.Tensor, aten.split.Tensor, aten.cat.default}  # fmt: skip


class NotInMemory(Tensor):
    """A tensor that every operator reads from disk again. It cannot be written to."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            return args[0].like(args[0].dtype)
        if func is aten._to_copy.default and kwargs.keys() <= {"dtype"}:
            return args[0].like(kwargs.get("dtype", args[0].dtype))
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in ARRANGING and all(isinstance(tensor, NotInMemory) for tensor in tensors):
            return _arranged(func, args, kwargs)
        args, kwargs = pytree.tree_map_only(NotInMemory, lambda tensor: tensor.read(), (args, kwargs))
        return func(*args, **kwargs)

    def read(self) -> Tensor:
        """The tensor in memory."""
        raise NotImplementedError

    def like(self, dtype: torch.dtype) -> NotInMemory:
        """The same tensor, converted to `dtype` while it is read."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> NotInMemory:
        return self


class StoredTensor(NotInMemory):
    """A tensor of a safetensors file.

    Attributes:
        entry: name on disk, shape, dtype on disk and byte range of the tensor in `path`, whose data begins at
            `data_start`.
    """

    entry: TensorEntry
    path: Path
    data_start: int

    @staticmethod
    def __new__(cls, entry: TensorEntry, path: Path, data_start: int, dtype: torch.dtype) -> StoredTensor:
        """`dtype` is the tensor's; data on disk is converted while it is read."""
        made = Tensor._make_wrapper_subclass(cls, entry.shape, dtype=dtype, device="cpu")  # type: ignore[attr-defined]
        made.entry, made.path, made.data_start = entry, path, data_start
        return made

    def like(self, dtype: torch.dtype) -> StoredTensor:
        return StoredTensor(self.entry, self.path, self.data_start, dtype)

    def read(self) -> Tensor:
        """The tensor in memory; calls that take turns (`turns.py`) share it, so nothing may write to it.

        Raises:
            CheckpointError: the file became shorter since its header was read.
        """
        with self.path.open("rb") as file:
            found, start = os.fstat(file.fileno()), self.data_start + self.entry.start
            place = (found.st_dev, found.st_ino, start, self.entry.stop - self.entry.start)
            data = taken(place, partial(self.bytes_of, file))
        return data.view(torch_dtype(self.entry.dtype)).view(self.entry.shape).to(self.dtype)

    def bytes_of(self, file: BinaryIO) -> Tensor:
        """The tensor's bytes, read from `path`, which is open as `file`."""
        # numpy asks for huge pages, torch does not: reading 160 MB from the cache took 0.11 s instead of 0.16 s.
        data = np.empty(self.entry.stop - self.entry.start, np.uint8)
        file.seek(self.data_start + self.entry.start)
        if file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise CheckpointError(f"{self.path}: cut off inside tensor '{self.entry.name}'; copy the file again")
        return torch.from_numpy(data) if len(data) else torch.empty(0, dtype=torch.uint8)  # numpy's has stride 0

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"StoredTensor({self.entry.name!r}, {self.entry.shape}, {self.dtype}, {self.path.name!r})"


class ArrangedTensor(NotInMemory):
    """Tensors that are not in memory, rearranged: a view of one, or several as one.

    Attributes:
        shape_alone: the result of `make` on the `meta` device.
    """

    shape_alone: Tensor
    make: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, shape_alone: Tensor, make: Callable[[], Tensor], dtype: torch.dtype) -> ArrangedTensor:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape_alone.shape, strides=shape_alone.stride(), dtype=dtype, device=torch.device("cpu")
        )
        made.shape_alone, made.make = shape_alone, make
        return made

    def like(self, dtype: torch.dtype) -> ArrangedTensor:
        return ArrangedTensor(self.shape_alone, self.make, dtype)

    def read(self) -> Tensor:
        return self.make().to(self.dtype)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"ArrangedTensor({tuple(self.shape)}, {self.dtype})"


def _arranged(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of `func`, one of `ARRANGING`, on tensors that are not in memory."""

    def shape_alone(tensor: NotInMemory) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    def called(value_of: Callable[[NotInMemory], Tensor]) -> Any:
        own_args, own_kwargs = pytree.tree_map_only(NotInMemory, value_of, (args, kwargs))
        return func(*own_args, **own_kwargs)

    shapes, spec = pytree.tree_flatten(called(shape_alone))

    def made(number: int) -> Tensor:
        return pytree.tree_leaves(called(lambda tensor: tensor.read()))[number]

    results = [ArrangedTensor(shape, partial(made, i), shape.dtype) for i, shape in enumerate(shapes)]
    return pytree.tree_unflatten(results, spec)


def stored_state(weights: Sequence[Path], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state dict of checkpoint files by names on disk, without reading any of it.

    Args:
        dtype: of floating-point tensors; by default the dtype on disk.
    """
    state: dict[str, Tensor] = {}
    for path in weights:
        header = read_header(path)
        for entry in header.tensors:
            own = torch_dtype(entry.dtype)
            state[entry.name] = StoredTensor(
                entry, path, header.data_start, dtype if dtype is not None and own.is_floating_point else own
            )
    return state


def is_stored(model: nn.Module) -> bool:
    """Whether parameters of `model` stay on disk."""
    return any(isinstance(parameter, NotInMemory) for parameter in model.parameters())


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Modules made in this context have parameters without data; buffers are real, and moves do not affect them.

    A parameter that replaces another one, as when loading a state dict, stays as it is.
    """
    register = nn.Module.register_parameter

    def register_shape(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        is_new = self._parameters.get(name) is None
        register(self, name, parameter)
        if parameter is not None and is_new and not isinstance(parameter, NotInMemory):
            self._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    # accelerate's init_empty_weights would also move stored tensors, and open_clip moves the models it makes.
    with (
        replaced(nn.Module, "register_parameter", register_shape),
        replaced(nn.Module, "to", lambda self, *args, **kwargs: self),
    ):
        yield


def assign(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give `model`, made `without_memory`, the tensors of `state`; small ones that are not parameters are read.

    Raises:
        RuntimeError: names or shapes do not fit, as `load_state_dict` says it.
    """
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    read = {
        name: value.read() if name in buffers and isinstance(value, NotInMemory) else value
        for name, value in state.items()
    }
    model.load_state_dict(read, strict=True, assign=True)
    model.requires_grad_(False)


@contextlib.contextmanager
def as_shapes(model: nn.Module) -> Iterator[FakeTensorMode]:
    """While `model` is traced, replace its parameters by ones without data, on the same device."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    shapes: dict[int, nn.Parameter] = {}
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    try:
        for module, name, parameter in places:
            if id(parameter) not in shapes:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                shapes[id(parameter)] = nn.Parameter(FakeTensor(mode, empty, parameter.device), requires_grad=False)
            module._parameters[name] = shapes[id(parameter)]
        yield mode
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def fill_shapes(graph_module: nn.Module, model: nn.Module) -> None:
    """Give a graph that was traced `as_shapes` the parameters of `model`, by name."""
    for path, module in graph_module.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if isinstance(parameter, FakeTensor):
                module._parameters[name] = model.get_parameter(f"{path}.{name}".lstrip("."))
