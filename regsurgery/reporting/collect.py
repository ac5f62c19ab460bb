"""Both models over the example images -> what the report shows, as tensors.

Shape suffixes: L blocks, A heads, I images, N patches, K register neurons.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regsurgery.compiler.outliers import token_norms
from regsurgery.errors import UnsupportedModelError
from regsurgery.evaluation import discovery
from regsurgery.evaluation.patch_features import patch_features
from regsurgery.reporting.components import colours
from regsurgery.reporting.packing import size_of_maps
from regsurgery.verification.observing import Observation
from regsurgery.verification.pair import Pair, normalisation

if TYPE_CHECKING:
    from regsurgery.images.image_set import ImageSet
    from regsurgery.progress import Progress

Box = tuple[float, float, float, float]  # left, top, right, bottom as shares of width and height

SIDES = ("original", "patched")
MAX_NEURONS = 12  # activation maps are shown for this many register neurons, the first ones
MAPS_BYTES = 4_000_000  # most bytes of attention maps in the page; above it, heads are averaged
PHOTO_SIDE = 288  # pixels
PHOTO_QUALITY = 80


@dataclass(frozen=True)
class Lost:
    """A setting of object discovery: `kind` is queries, keys or values of `block`."""

    block: int
    kind: str
    bias: float


@dataclass(frozen=True)
class Example:
    """One example image, as the models see it.

    Attributes:
        jpeg: the picture.
        boxes: side -> where LOST finds the object; None if it was not asked for.
    """

    name: str
    jpeg: bytes
    boxes: Mapping[str, Box] | None = None


@dataclass(frozen=True)
class Collected:
    """What the two models do on the example images.

    Attributes:
        grid: rows and columns of patches; patch n is in row n // columns.
        norms: side -> L2 norms of the patches after every block, `[L, I, N]`.
        attention: side -> attention of the class token to each patch, `[L, A, I, N]`, rows summing to less than 1; None
            for a model without a class token or with attention that cannot be observed (`attention_note` says why).
            Heads are averaged (A = 1) if they would make the page too large.
        register_attention: attention of the class token to all registers in the patched model, mean over the heads,
            `[L, I]`.
        colours: axes -> side -> features of the patches after the last block as colours, see `components.colours`.
        neurons: (block, index) of the register neurons shown; `activations` are theirs in the original, `[K, I, N]`.
    """

    grid: tuple[int, int]
    examples: tuple[Example, ...]
    norms: Mapping[str, Tensor]
    attention: Mapping[str, Tensor] | None
    attention_note: str
    register_attention: Tensor | None
    colours: Mapping[str, Mapping[str, Tensor]]
    neurons: tuple[tuple[int, int], ...]
    activations: Tensor


def collect(
    pair: Pair, images: ImageSet, progress: Progress, lost: Lost | None = None, batch_size: int = 4
) -> Collected:
    """Run both models over `images`, one forward of each per batch.

    Args:
        lost: the setting of object discovery; None leaves the boxes out.
    """
    subject = pair.original
    blocks = tuple(range(subject.num_blocks))
    listed = pair.recipe.register_neurons if pair.recipe else {}
    neurons = [(block, index) for block, indices in listed.items() for index in indices][:MAX_NEURONS]
    note = why_no_attention(pair)
    what = ["blocks", "neurons", *([] if note else ["attention"]), *([] if lost is None else [lost.kind])]
    observe = pair.observer(blocks=blocks, what=what)
    averaged = _are_averaged(pair, images.num_images)
    parts: dict[str, list[Tensor]] = {}
    examples: list[Example] = []
    progress.stage("observe", images.num_images)
    for batch in pair.batches(images, batch_size):
        seen = observe(batch.pixels)
        boxes = [None] * len(batch.names) if lost is None else _boxes(seen, lost)
        photos = _photos(pair, batch.pixels)
        names = [Path(name).name for name in batch.names]
        examples += [Example(*each) for each in zip(names, photos, boxes, strict=True)]
        for side, observation in zip(SIDES, seen, strict=True):
            norms = [token_norms(observation.patches(block)) for block in blocks]
            parts.setdefault(f"norms {side}", []).append(torch.stack(norms).cpu())
            parts.setdefault(f"features {side}", []).append(observation.patches(blocks[-1]).float().cpu())
            if not note:
                patches, registers = _class_attention(observation, blocks, averaged)
                parts.setdefault(f"attention {side}", []).append(patches)
                parts.setdefault(f"register {side}", []).append(registers)
        hidden = [seen[0].neurons(block)[:, subject.side.patches, index] for block, index in neurons]
        parts.setdefault("activations", []).append(
            torch.stack(hidden).float().cpu() if hidden else torch.zeros(0, len(batch.pixels), 1)
        )
        progress.advance(len(batch.pixels))

    def joined(name: str) -> Tensor:
        return torch.cat(parts[name], dim=-2)

    return Collected(
        grid=subject.grid,
        examples=tuple(examples),
        norms={side: joined(f"norms {side}") for side in SIDES},
        attention=None if note else {side: joined(f"attention {side}") for side in SIDES},
        attention_note=note,
        register_attention=None if note else torch.cat(parts["register patched"], dim=-1),
        colours=colours({side: torch.cat(parts[f"features {side}"]) for side in SIDES}),
        neurons=tuple(neurons),
        activations=torch.cat(parts["activations"], dim=1),
    )


def why_no_attention(pair: Pair) -> str:
    """Why the class token's attention cannot be shown; "" if it can."""
    if not pair.original.has_class_token:
        return "The model has no class token, so there is no attention to show."
    try:
        pair.observer(blocks=range(pair.original.num_blocks), what=("attention",))
    except UnsupportedModelError as error:
        return f"Attention cannot be shown: {error}."
    return ""


def _are_averaged(pair: Pair, num_images: int) -> bool:
    """Whether maps of all heads would be too large for the page."""
    patches = pair.original.side.patches
    heads = max((len(block.attention_weights) for block in pair.sites.blocks), default=1)
    num_heads = max(heads, pair.sites.width // 64)
    shape = (pair.original.num_blocks, num_heads, num_images, patches.stop - patches.start)
    return size_of_maps(shape) > MAPS_BYTES


def _class_attention(observation: Observation, blocks: Sequence[int], averaged: bool) -> tuple[Tensor, Tensor]:
    """Attention of the first token to patches, `[L, A, B, N]`, and to all registers together, `[L, B]`."""
    subject = observation.subject
    patches, registers = [], []
    for block in blocks:
        given_BAT = observation.attention(block)[:, :, 0]
        registers.append(given_BAT[:, :, subject.attended_registers].sum(dim=-1).mean(dim=1).cpu())
        maps_ABN = given_BAT[:, :, subject.attended_patches].transpose(0, 1)
        patches.append((maps_ABN.mean(dim=0, keepdim=True) if averaged else maps_ABN).cpu())
    return torch.stack(patches), torch.stack(registers)


def _boxes(seen: Sequence[Observation], lost: Lost) -> list[dict[str, Box]]:
    """Side -> the box that LOST draws, for every image of a batch."""
    found: list[dict[str, Box]] = []
    for side, observation in zip(SIDES, seen, strict=True):
        subject = observation.subject
        features_BND = patch_features(observation, lost.block, lost.kind)
        rows, columns = subject.grid
        found = found or [{} for _ in features_BND]
        for boxes, (left, top, right, bottom) in zip(
            found, discovery.boxes(features_BND, rows, columns, [lost.bias])[0].tolist(), strict=True
        ):
            boxes[side] = (left / columns, top / rows, right / columns, bottom / rows)
    return found


def _photos(pair: Pair, pixels_B3HW: Tensor) -> list[bytes]:
    """What the models saw, as JPEG files."""
    import PIL.Image
    from torchvision.transforms.v2 import functional

    mean_311, scale_311 = normalisation(pair.loaded)
    found = []
    for pixels_3HW in pixels_B3HW.float().cpu() / scale_311 + mean_311:
        picture = functional.to_pil_image(pixels_3HW.clamp(0, 1))
        picture.thumbnail((PHOTO_SIDE, PHOTO_SIDE), PIL.Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=PHOTO_QUALITY)
        found.append(stream.getvalue())
    return found
