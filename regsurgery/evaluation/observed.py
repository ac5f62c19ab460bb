"""`regsurgery.observe`: a look inside a model, for notebooks and pictures."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regsurgery.errors import UserError
from regsurgery.images.image_set import image_set
from regsurgery.verification.observing import WHAT, Observer, Subject
from regsurgery.verification.pair import BATCH, Pair, normalisation, open_pair

if TYPE_CHECKING:
    from PIL.Image import Image

    from regsurgery.options import LoadOptions

SIDES = ("original", "patched")


@dataclass(frozen=True)
class Observed:
    """What was observed inside a model over some images; tensors by block (0-based), on the model's device.

    B images, T tokens, N patches, D width, H hidden units, A heads, C channels of a head.

    Attributes:
        mode: `original`, or the mode in which the model was patched.
        pictures: what the model saw, `[B, 3, height, width]` in [0, 1], on the CPU.
        outputs: the model's outputs, by the names of the original's.
        blocks: the stream after a block, `[B, T, D]`.
        neurons: MLP activations as read by the down projection (in a patched model: after the shift), `[B, T, H]`.
        queries, keys, values: `[B, A, T, C]`.
        scores, attention: attention before and after the softmax, `[B, A, T, T]`; rows of `attention` sum to 1.
        patches, registers: their places among the tokens of `blocks` and `neurons`.
        attended_patches, attended_registers: their places among the tokens of attention.
        grid: rows and columns of patches.
        has_class_token: whether token 0 is a class token.
    """

    mode: str
    pictures: Tensor
    outputs: Mapping[str, Tensor]
    blocks: Mapping[int, Tensor]
    neurons: Mapping[int, Tensor]
    queries: Mapping[int, Tensor]
    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    scores: Mapping[int, Tensor]
    attention: Mapping[int, Tensor]
    patches: slice
    registers: slice
    attended_patches: slice
    attended_registers: slice
    grid: tuple[int, int]
    has_class_token: bool


def observe(
    model: str | Path,
    images: str | Path | Tensor | Sequence[Image] | None = None,
    *,
    blocks: Iterable[int] | None = None,
    what: Sequence[str] = ("blocks",),
    side: str = "patched",
    original: str | None = None,
    num_images: int | None = None,
    batch_size: int = BATCH,
    load: LoadOptions | None = None,
) -> Observed:
    """Observe a model's inside on images, batched and on its device.

    Everything that is asked for is kept in memory: ask for few images or blocks, or go batch by batch with
    `observing.Observer`.

    Args:
        model: a folder that `patch` wrote, or a MODEL.
        images: where images are, as for `patch`; or pictures, to be preprocessed; or preprocessed pixels
            `[B, 3, H, W]`. By default generated pictures.
        blocks: 0-based, negative ones counted from the end; by default all.
        what: some of `observing.WHAT`.
        side: of a patched folder, `patched` or `original`.
        original: MODEL that was patched, if the folder cannot restore it.
        num_images: maximum number of images from a source.
        load: options for loading.

    Raises:
        UserError: there is no such side, block or thing to observe, or the input is at fault; see `errors`.
    """
    if side not in SIDES:
        raise UserError(f"side '{side}': choose from {', '.join(SIDES)}")
    with open_pair(model, original, load) as pair:
        subject = pair.patched if side == "patched" else pair.original
        chosen = range(subject.num_blocks) if blocks is None else blocks
        return observed(pair, subject, _batches(pair, images, num_images, batch_size), chosen, what)


def observed(
    pair: Pair, subject: Subject, batches: Iterable[Tensor], blocks: Iterable[int], what: Sequence[str]
) -> Observed:
    """Observe `subject`, one of `pair`, over batches `[B, 3, H, W]`."""
    observer = Observer(subject, blocks=blocks, what=what, outputs=True)
    mean_311, scale_311 = normalisation(pair.loaded)
    kept: dict[tuple[str, Any], list[Tensor]] = {}
    pictures = []
    for pixels in batches:
        seen = observer(pixels)
        pictures.append((pixels.float().cpu() / scale_311 + mean_311).clamp(0, 1))
        for name, value in seen.outputs.items():
            kept.setdefault(("outputs", name), []).append(value)
        for kind in what:
            read = seen.tokens if kind == "blocks" else getattr(seen, kind)
            for block in observer.blocks:
                kept.setdefault((kind, block), []).append(read(block))
    found: dict[str, dict[Any, Tensor]] = {kind: {} for kind in ("outputs", *WHAT)}
    for (kind, key), parts in kept.items():
        found[kind][key] = torch.cat(parts)
    return Observed(
        mode=subject.mode,
        pictures=torch.cat(pictures),
        **found,
        patches=subject.side.patches,
        registers=subject.side.registers,
        attended_patches=subject.attended_patches,
        attended_registers=subject.attended_registers,
        grid=subject.grid,
        has_class_token=subject.has_class_token,
    )


def _batches(
    pair: Pair, images: str | Path | Tensor | Sequence[Image] | None, num_images: int | None, size: int
) -> Iterator[Tensor]:
    if isinstance(images, Tensor):
        height, width = pair.traced.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, height, width):
            raise UserError(f"pixels {list(images.shape)}: the model takes [B, 3, {height}, {width}]")
        yield from images.split(size)
    elif images is None or isinstance(images, (str, Path)):
        yield from (batch.pixels for batch in pair.batches(image_set(images, num_images), size))
    else:
        pictures = iter(images)
        while batch := list(itertools.islice(pictures, size)):
            yield pair.loaded.preprocess([picture.convert("RGB") for picture in batch])
