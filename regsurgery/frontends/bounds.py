"""Limits for configs: absurd numbers and sizes are refused before a library allocates memory for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.checkpoints.limits import BROKEN
from regsurgery.errors import CheckpointError, in_short

if TYPE_CHECKING:
    from regsurgery.checkpoints.safetensors_file import SafetensorsFile
    from regsurgery.frontends.loaded import Loaded

MAX_SIDE = 4096  # pixels
SIDES = (
    "image_size",
    "img_size",
    "input_size",
    "crop_size",
    "size",
    "height",
    "width",
    "shortest_edge",
    "longest_edge",
)
# Libraries make lists of these lengths before any tensor.
COUNTS = {re.compile(r"(layers|depth|blocks)$"): 1 << 12, re.compile(r"(labels|classes)$"): 1 << 18}
SPARE_ELEMENTS = 1 << 24  # allowed on top of `FACTOR` times the checkpoint, so that small models always pass
SPARE_TENSORS = 1024
FACTOR = 4  # tied tensors are on disk once, computed tables not at all


def check_numbers(path: Path, config: Any) -> None:
    """Raise `CheckpointError` for numbers in a config that libraries turn into lists or images of absurd size."""

    def check(key: str, number: Any) -> None:
        limit = MAX_SIDE if key in SIDES else next((COUNTS[ending] for ending in COUNTS if ending.search(key)), None)
        if limit is not None and type(number) in (int, float) and not number <= limit:
            raise CheckpointError(
                f"{path}: {key!r} is {_short(number)}, beyond the limit of {limit}; correct it or get the file again"
            )

    todo: list[tuple[str, Any]] = [("", config)]
    while todo:
        key, value = todo.pop()
        if isinstance(value, dict):
            todo += [(str(inner), value[inner]) for inner in value]
        elif isinstance(value, list):
            todo += [(key, inner) for inner in value]
        else:
            check(key, value)


def _short(number: Any) -> str:
    if isinstance(number, float):
        return f"{number:.3g}"
    return str(number) if abs(number) < 10**15 else "a number of more than 15 digits"


@contextmanager
def bounded_model(config: Path, files: Sequence[SafetensorsFile]) -> Iterator[None]:
    """In this context, no model can be built that is much larger than the checkpoint `files`, whatever its config says.

    Tensors are counted when a library asks for them, before their memory is touched.

    Raises:
        CheckpointError: the model would have more tensors, or larger ones, than `FACTOR` times the checkpoint.
    """
    from torch import Tensor
    from torch.nn.modules import module as nn_module
    from torch.utils._python_dispatch import TorchDispatchMode

    on_disk = sum(_numel(tensor.shape) for file in files for tensor in file.tensors)
    elements = FACTOR * on_disk + SPARE_ELEMENTS
    tensors = 2 * FACTOR * sum(len(file.tensors) for file in files) + SPARE_TENSORS
    built = {"elements": 0, "tensors": 0}

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"{config}: describes a model of {what}, but {files[0].path.name if files else 'the checkpoint'} holds "
            f"{on_disk} elements; give a config and weights that belong together"
        )

    def registered(module: Any, name: str, value: Tensor | None) -> None:
        if value is None or module._parameters.get(name) is not None:
            return
        built["elements"] += value.numel()
        built["tensors"] += 1
        if built["elements"] > elements:
            raise refuse(f"more than {elements} elements")
        if built["tensors"] > tensors:
            raise refuse(f"more than {tensors} tensors")

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked = _asked(func, args, kwargs or {})
            if asked > elements:
                raise refuse(f"a tensor of {_short(asked)} elements")
            return func(*args, **(kwargs or {}))

    handle = nn_module.register_module_parameter_registration_hook(registered)
    try:
        with Watch():
            yield
    finally:
        handle.remove()


def _asked(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Number of elements of the tensor that an operator will make, as far as its arguments tell."""
    from torch import Tensor

    name = func._schema.name
    if name == "aten::arange":
        numbers = [arg for arg in args if type(arg) in (int, float)]
        start, stop = (0, numbers[0]) if len(numbers) == 1 else numbers[:2]
        return int(abs((stop - start) / (numbers[2] if len(numbers) > 2 else 1)))
    if name in ("aten::linspace", "aten::eye"):
        return _numel([arg for arg in args[2:] if type(arg) is int] if name == "aten::linspace" else args)
    sizes = kwargs.get("size") or next((arg for arg in args if isinstance(arg, (list, tuple)) and _is_size(arg)), None)
    asked = 0
    if sizes is not None and any(argument.name in ("size", "repeats") for argument in func._schema.arguments):
        asked = _numel(sizes) * (args[0].numel() if name == "aten::repeat" else 1)
    shapes = [arg.shape for arg in args if isinstance(arg, Tensor)]
    if len(shapes) > 1:  # an outer sum or product
        rank = max(map(len, shapes))
        asked = max(asked, _numel([max(shape[-axis] if axis <= len(shape) else 1 for shape in shapes)
                                   for axis in range(1, rank + 1)]) if name in ELEMENTWISE else 0)  # fmt: skip
    return asked


ELEMENTWISE = ("aten::add.Tensor", "aten::add", "aten::sub", "aten::mul", "aten::div", "aten::eq", "aten::outer")


def _is_size(value: Sequence[Any]) -> bool:
    return bool(value) and all(type(number) is int for number in value)


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for number in shape:
        count *= abs(number)
    return count


def tried(loaded: Loaded) -> None:
    """Put one picture through a model's preprocessing.

    Raises:
        CheckpointError: the result is not `[1, C, height, width]` of finite numbers, as the model takes them.
    """
    import PIL.Image

    wanted = (1, loaded.channels, *loaded.image_size)
    try:
        pixels = loaded.preprocess([PIL.Image.new("RGB", (64, 48), (30, 120, 210))])
        problem = None
        if tuple(pixels.shape) != wanted:
            problem = f"it returns {list(pixels.shape)} for one image, and the model takes {list(wanted)}"
        elif not pixels.isfinite().all():
            problem = "it returns pixels that are not finite"
    except BROKEN as error:
        problem = in_short(error)
    if problem:
        raise CheckpointError(f"{loaded.folder}: its preprocessing does not work: {problem}; correct its settings")
