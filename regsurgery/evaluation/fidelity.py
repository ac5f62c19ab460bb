"""Task `fidelity`: how far the patched model's outputs and tokens are from the original's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from regsurgery.compiler.comparison import has_classes, kl_divergence, main_output, output_cosine
from regsurgery.compiler.outliers import outliers, token_norms
from regsurgery.errors import UnsupportedModelError
from regsurgery.evaluation.result import Result
from regsurgery.interval import Figures, Values
from regsurgery.verification.observing import Observation
from regsurgery.verification.pair import Pair

if TYPE_CHECKING:
    from regsurgery.images.image_set import ImageSet
    from regsurgery.progress import Progress


def evaluate(pair: Pair, images: ImageSet, *, progress: Progress, seed: int) -> Result:
    """KL(original || patched) in nats and share of equal first classes, for models with logits; cosines of the main
    output, of the class token and of the patches after the last block. Outlier patches of the original (after the last
    block but one, above 5 times the median) are what is to change; the figure for the others is the one to look at.

    All are of the patched model against the original, so the original has no column of its own.
    """
    observe = pair.observer(blocks=(pair.sites.probe_block, -1), what=("blocks",), outputs=True)
    figures = Figures(seed)
    main = ""
    progress.stage("fidelity", images.num_images)
    for batch in pair.batches(images):
        original, patched = observe(batch.pixels)
        main = shared_output(pair, original.outputs, patched.outputs)
        values = {name: Values(None, value) for name, value in drift(main, original.outputs, patched.outputs).items()}
        if "same first class" in values:
            values["same first class"] = Values(None, values["same first class"].patched, is_share=True)
        figures.add(len(batch.pixels), values | _of_tokens(pair, original, patched))
        progress.advance(len(batch.pixels))
    return Result(figures.rows(), details={"output": main})


def shared_output(pair: Pair, original: Mapping[str, Tensor], patched: Mapping[str, Tensor]) -> str:
    """The output to compare: the first of `families.MAIN_OUTPUTS` that both models have in the same shape."""
    names = tuple(name for name, value in original.items() if name in patched and patched[name].shape == value.shape)
    if not names:
        raise UnsupportedModelError(f"{pair.folder}: has no output in the original's shape; patch the model again")
    return main_output(names)


def drift(main: str, original: Mapping[str, Tensor], patched: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each image's drift of the output `main`, `[B]`; `same first class` is 1 if it is the same."""
    before, after = original[main], patched[main]
    found = {f"cosine of {main}": output_cosine(before, after)}
    if has_classes(main, before):
        same_B = (before.argmax(-1) == after.argmax(-1)).float()
        found = {"KL divergence": kl_divergence(before, after), "same first class": same_B, **found}
    return found


def _of_tokens(pair: Pair, original: Observation, patched: Observation) -> dict[str, Values]:
    probe, last = pair.sites.probe_block, pair.original.num_blocks - 1
    was_outlier_BN = outliers(token_norms(original.patches(probe)))
    cosine_BN = F.cosine_similarity(original.patches(last).float(), patched.patches(last).float(), dim=-1)
    kept_BN = (~was_outlier_BN).float()
    found = {
        "cosine of patches, outliers aside": Values(None, (cosine_BN * kept_BN).sum(dim=1), out_of=kept_BN.sum(dim=1)),
        "cosine of patches": Values(None, cosine_BN.mean(dim=1)),
    }
    if pair.original.has_class_token:
        tokens = original.tokens(last)[:, 0].float(), patched.tokens(last)[:, 0].float()
        found = {"cosine of the class token": Values(None, F.cosine_similarity(*tokens, dim=-1)), **found}
    return found
