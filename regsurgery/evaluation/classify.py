"""Task `classify`: top-1 and top-5 accuracy on labelled images, with the model's own head or zero-shot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regsurgery.errors import UserError
from regsurgery.evaluation.labels import labels_of
from regsurgery.evaluation.result import Result
from regsurgery.evaluation.zero_shot import class_embeddings, zero_shot_logits
from regsurgery.interval import Figures, Values
from regsurgery.verification.pair import Pair

if TYPE_CHECKING:
    from regsurgery.images.image_set import ImageSet
    from regsurgery.progress import Progress

TOPS = (1, 5)


def evaluate(
    pair: Pair, images: ImageSet, *, progress: Progress, seed: int, prompts: str | Path | None = None
) -> Result:
    """Share of images whose class is ranked first, or among the first five.

    Args:
        prompts: classify zero-shot, with the model's text tower and this file; see `zero_shot`. By default the model's
            own head.

    Raises:
        UserError: the images have no labels, or the model has no head.
    """
    logits_of, num_classes = _classifier(pair, prompts)
    labels = labels_of(images, num_classes, _names_of_classes(pair))
    observe = pair.observer(outputs=True)
    figures = Figures(seed)
    progress.stage("classify", images.num_images)
    for batch in pair.batches(images):
        labels_B = torch.tensor([labels[name] for name in batch.names])
        both = [logits_of(seen.outputs).cpu() for seen in observe(batch.pixels)]
        hits = [{f"top-{top}": _among_first(logits_BK, labels_B, top) for top in TOPS} for logits_BK in both]
        values = {name: Values(hits[0][name], hits[1][name], is_share=True) for name in hits[0]}
        figures.add(len(batch.pixels), values)
        progress.advance(len(batch.pixels))
    return Result(figures.rows(), details={"num_classes": num_classes, "zero_shot": prompts is not None})


def _classifier(pair: Pair, prompts: str | Path | None) -> tuple[Callable[[Mapping[str, Tensor]], Tensor], int]:
    """Outputs -> logits `[B, K]`, and K."""
    if prompts is not None:
        classes_KE = class_embeddings(pair.loaded, Path(prompts))

        def zero_shot(outputs: Mapping[str, Tensor]) -> Tensor:
            logits = zero_shot_logits(outputs, classes_KE)
            if logits is None:
                raise UserError(
                    f"{pair.folder}: has no image embedding among its outputs; leave out --prompts to use its own head"
                )
            return logits

        return zero_shot, len(classes_KE)
    if pair.traced.classes is None:
        raise UserError(
            f"{pair.folder}: the model has no classifier; give --prompts FILE for a CLIP model, or evaluate its "
            "features with another task"
        )
    name, num_classes = pair.traced.classes
    return lambda outputs: outputs[name], num_classes


def _names_of_classes(pair: Pair) -> dict[str, int]:
    """Class names from the model's config (transformers and timm)."""
    config: Any = pair.loaded.config
    listed = config.get("label2id")
    if isinstance(listed, dict):
        return {str(name): int(index) for name, index in listed.items() if str(index).isdecimal()}
    names = config.get("label_names") or (config.get("pretrained_cfg") or {}).get("label_names")
    return {str(name): index for index, name in enumerate(names)} if isinstance(names, list) else {}


def _among_first(logits_BK: Tensor, labels_B: Tensor, top: int) -> Tensor:
    best_BT = logits_BK.topk(min(top, logits_BK.shape[-1]), dim=-1).indices
    return (best_BT == labels_B[:, None]).any(dim=-1).float()
