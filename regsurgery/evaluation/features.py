"""One frozen feature per image, from both models: the input of linear probes and nearest neighbours.

Shape suffixes: B images of a batch, S images of a set, T tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regsurgery.errors import UserError
from regsurgery.evaluation.labels import labels_of
from regsurgery.images.image_set import ImageSet
from regsurgery.interval import Figures, Values
from regsurgery.verification.observing import Observation, check_block
from regsurgery.verification.pair import Pair

if TYPE_CHECKING:
    from regsurgery.progress import Progress

POOLINGS = ("cls", "mean")
CHUNK = 512  # resamples are drawn for this many images at a time
Labelled = tuple[tuple[np.ndarray, np.ndarray], np.ndarray]


def default_pooling(pair: Pair) -> str:
    """The class token if the model has one, else the mean of the patches."""
    return "cls" if pair.original.has_class_token else "mean"


def labelled_features(pair: Pair, images: ImageSet, pooling: str, block: int, progress: Progress) -> Labelled:
    """Features `[S, D]` of the original and of the patched model, and the class index of each image, `[S]`.

    Args:
        pooling: one of `POOLINGS`: the class token, or the mean over the patches, after `block`; normalised to mean 0
            and variance 1, as the norm that follows does.

    Raises:
        UserError: the images have no labels, or there is no such pooling or block.
    """
    if pooling not in POOLINGS:
        raise UserError(f"'{pooling}' is not a feature of an image; choose from {', '.join(POOLINGS)}")
    if pooling == "cls" and not pair.original.has_class_token:
        raise UserError(f"{pair.folder}: has no class token; use the feature 'mean'")
    block = check_block(pair.original, block)
    labels = labels_of(images, None)
    observe = pair.observer(blocks=[block], what=["blocks"])
    rows: list[list[Tensor]] = [[], []]
    names: list[str] = []
    progress.stage("features", images.num_images)
    for batch in pair.batches(images):
        for kept, seen in zip(rows, observe(batch.pixels), strict=True):
            kept.append(_pooled(seen, pooling, block).cpu())
        names += batch.names
        progress.advance(len(batch.names))
    original_SD, patched_SD = (torch.cat(kept).numpy() for kept in rows)
    return (original_SD, patched_SD), np.array([labels[name] for name in names])


def _pooled(seen: Observation, pooling: str, block: int) -> Tensor:
    if pooling == "cls":
        token_BD = seen.tokens(block)[:, 0].float()
        return F.layer_norm(token_BD, token_BD.shape[-1:])
    patches_BND = seen.patches(block).float()
    return F.layer_norm(patches_BND, patches_BND.shape[-1:]).mean(dim=1)


def add_hits(figures: Figures, name: str, original_S: np.ndarray, patched_S: np.ndarray) -> None:
    """A share: which images each of the two models got right, bool `[S]`."""
    for start in range(0, len(original_S), CHUNK):
        chunks = (torch.from_numpy(hits_S[start : start + CHUNK]).double() for hits_S in (original_S, patched_S))
        original, patched = chunks
        figures.add(len(original), {name: Values(original, patched, is_share=True)})
