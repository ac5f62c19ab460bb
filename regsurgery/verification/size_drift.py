"""How far a patched model drifts from its original at the image size of the surgery and at larger ones.

The written model is run as a user would run it, alongside the original, on a few images; no graph is traced. This is a
quick check, not a verification: `regsurgery verify --image-size` counts outliers and compares with the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regsurgery.backends.formats import backend
from regsurgery.checkpoints.turns import in_turns
from regsurgery.compiler.comparison import has_classes, kl_divergence, main_output, output_cosine
from regsurgery.compiler.surgery import Surgery
from regsurgery.formats import LIBRARIES, STOCK_CODE, any_size, has_host
from regsurgery.frontends.image_size import Ran, larger_sizes, pixels, takes, text
from regsurgery.frontends.loaded import Loaded
from regsurgery.images.decoding import decode
from regsurgery.images.generated import Generated
from regsurgery.images.image_set import ImageSet
from regsurgery.images.sources import UNREADABLE
from regsurgery.modes import Mode
from regsurgery.runtime.surgery import registers_for
from regsurgery.verification.patched import read_patched_config, rebuilt
from regsurgery.verification.stock import host_outputs

if TYPE_CHECKING:
    from PIL.Image import Image

    from regsurgery.progress import Progress

MAX_IMAGES, MIN_IMAGES = 8, 4  # most and fewest photos; for generated pictures, which say less, always the fewest
# Limit for parameters times patches times images that one model is run on at one size. A ViT-B gets 8 images at 224
# pixels, 7 at 336 and 4 at 448.
MAX_WORK = 3e11
BATCH_PATCHES = 2048
FAR = 2.0  # a drift of this many times that at the surgery's own size, and beyond chance, is reported in a sentence
KL = "KL divergence"
ONE_FOR_ALL = ("transformers", *STOCK_CODE)  # models that interpolate: one serves all sizes


@dataclass(frozen=True)
class SizeDrift:
    """The drift at one image size.

    Attributes:
        image_size: (height, width) in pixels.
        num_registers: number of registers at that size.
        measure: the quantity whose mean is `drift`: the KL divergence from the original's class distribution in nats,
            or 1 - the cosine of the named output.
        standard_error: of `drift` over the `num_images` images; None for one image.
    """

    image_size: tuple[int, int]
    num_registers: int
    num_images: int
    measure: str
    drift: float
    standard_error: float | None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "image_size": list(self.image_size)}


@dataclass(frozen=True)
class SizeDrifts:
    """The drift at several image sizes, the surgery's own first; `notes`: what was not measured, and what is bad."""

    rows: tuple[SizeDrift, ...]
    notes: tuple[str, ...]

    def as_dicts(self) -> list[dict[str, Any]]:
        return [row.as_dict() for row in self.rows]


def drift_at_sizes(
    surgery: Surgery, folder: Path, fmt: str, module: nn.Module, pictures: ImageSet, progress: Progress
) -> SizeDrifts:
    """Run the original and what was written to `folder` at the surgery's image size, and at two larger ones where both
    take them.

    Args:
        module: the written model, loaded for the surgery's image size.
        pictures: at most `MAX_IMAGES` of them are used; fewer for large models and large images.
    """
    loaded, mode = surgery.loaded, surgery.recipe.kind
    own = surgery.traced.image_size
    images = list(_first(pictures, MIN_IMAGES if isinstance(pictures.source, Generated) else MAX_IMAGES))
    config = read_patched_config(folder, fmt)
    sizes, refused, costly = [own], [], []
    if any_size(fmt, mode):
        sizes += larger_sizes(loaded, own)
    rows = []
    progress.stage("other image sizes", len(sizes))
    for size in sizes:
        num_patches = (surgery.sites.num_tokens - surgery.sites.num_prefix) * math.prod(size) // math.prod(own)
        count = min(len(images), int(MAX_WORK / (_num_parameters(loaded) * num_patches)))
        batches = _batches(images[:count], max(1, BATCH_PATCHES // num_patches))
        if count < min(MIN_IMAGES, len(images)):
            costly.append(size)
        elif (taken := (loaded, None) if size == own else takes(loaded, size, batches[0])) is None:
            refused.append(size)
        else:
            patched = module
            if size != own and fmt not in ONE_FOR_ALL:
                patched = rebuilt(folder, config, fmt, stored=loaded.stored, image_size=size)
            resized, ran = taken
            run = _Runs(resized, patched, fmt, mode, config["regsurgery"])
            measure, values = run.drift(batches, ran)
            rows.append(SizeDrift(size, _registers(surgery, num_patches), count, measure, *_mean(values)))
        progress.advance(1)
    notes = []
    if not any_size(fmt, mode):
        notes.append(f"the written model takes only images of {text(own)}")
    elif len(sizes) > 1 and mode.follows_size and surgery.sites.placement != "end":
        notes.append(f"the registers are inside the prefix: there are {surgery.plan.num_registers} at every image size")
    if refused:
        notes.append(f"the model does not take images of {' and '.join(map(text, refused))}")
    if costly:
        notes.append(
            f"drift at {' and '.join(map(text, costly))} was not measured, to save time; regsurgery verify "
            "--image-size measures it"
        )
    return SizeDrifts(tuple(rows), (*notes, *_far(rows)))


def _far(rows: list[SizeDrift]) -> Iterator[str]:
    """A sentence about every size at which the drift is much larger than at the first one."""
    for row in rows[1:]:
        own = rows[0]
        chance = 2 * math.hypot(row.standard_error or 0.0, own.standard_error or 0.0)
        if row.image_size != own.image_size and row.drift > FAR * own.drift and row.drift - own.drift > chance:
            yield (
                f"at {text(row.image_size)} the patched model drifts much further than at {text(own.image_size)} "
                f"({row.measure} {row.drift:.4f} instead of {own.drift:.4f}); for use at that size, patch with "
                f"--image-size {max(row.image_size)}"
            )


class _Runs:
    """The original and the patched model at one image size."""

    def __init__(self, loaded: Loaded, patched: nn.Module, fmt: str, mode: Mode, block: dict[str, Any]) -> None:
        self.loaded, self.patched, self.block = loaded, patched, block
        self.fmt = fmt
        self.host = backend(fmt, mode) if has_host(fmt, mode) else None

    @torch.no_grad()
    def drift(self, batches: list[list[Image]], first: Ran | None) -> tuple[str, Tensor]:
        """The name of the measure, and its value for every image, `[B]`.

        Args:
            first: the original's run on the first batch, if there was one.
        """
        measure, values = "", []
        for before, after in self._outputs(batches, first):
            main = main_output(tuple(name for name in before if name in after))
            if has_classes(main, before[main]):
                measure, value_B = KL, kl_divergence(before[main], after[main])
            else:
                measure, value_B = f"1 - cosine of {main}", 1 - output_cosine(before[main], after[main])
            values.append(value_B.double().cpu())
        return measure, torch.cat(values)

    def _outputs(self, batches: list[list[Image]], first: Ran | None) -> Iterator[Any]:
        """Both models' outputs for every batch; weights on disk are read once for all of them."""
        if first is not None:
            yield first.outputs, self._patched(first.images_BCHW)
        calls: list[Callable[[], Any]] = []
        for images in batches if first is None else batches[1:]:
            images_BCHW = pixels(self.loaded, images)
            calls += [partial(self.loaded.call, self.loaded.model, images_BCHW), partial(self._patched, images_BCHW)]
        results = iter(in_turns(calls) if self.loaded.stored else (call() for call in calls))
        yield from zip(results, results, strict=True)

    def _patched(self, batch: Tensor) -> dict[str, Tensor]:
        if self.host is not None:
            return host_outputs(self.host, self.patched, batch, self.block)
        if self.fmt in LIBRARIES:
            return self.loaded.call(self.patched, batch)
        from regsurgery.compiler.trace import tensor_inputs

        return self.patched(*tensor_inputs(self.loaded, batch))


def _first(pictures: ImageSet, count: int) -> Iterator[Image]:
    """At most `count` of the images, decoded; the verification has already reported unreadable ones."""
    some = pictures.some(count)
    for _, content in some.source.items(some.chosen):
        try:
            yield decode(content)
        except UNREADABLE:
            continue


def _batches(images: list[Image], size: int) -> list[list[Image]]:
    """At least one, which may be empty."""
    return [images[start : start + size] for start in range(0, max(1, len(images)), size)]


def _registers(surgery: Surgery, num_patches: int) -> int:
    block = surgery.config_block
    return registers_for(num_patches, block["num_registers"], block["num_patches"])


def _num_parameters(loaded: Loaded) -> int:
    return sum(value.numel() for value in loaded.model.get_submodule(loaded.entry).parameters())


def _mean(values_B: Tensor) -> tuple[float, float | None]:
    error = None if len(values_B) < 2 else float(values_B.std() / len(values_B) ** 0.5)
    return float(values_B.mean()), error
