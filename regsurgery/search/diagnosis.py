"""Is there anything to fix, where does it start, and would surgery help? Norms over images -> `Diagnosis`.

Outliers are defined by `outliers.robust_outliers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from regsurgery.compiler.located import Located
from regsurgery.compiler.outliers import (
    MIN_RATIO,
    POSITIONAL_SHARE,
    robust_outliers,
    share_at_common_places,
    token_norms,
)
from regsurgery.compiler.placement import trained_registers
from regsurgery.compiler.sites import Sites
from regsurgery.compiler.taps import tap
from regsurgery.compiler.trace import tensor_inputs
from regsurgery.images.image_set import ImageSet

MIN_OUTLIERS = 0.25  # per image; with fewer than one in four images there is nothing to fix
EMERGED_SHARE = 0.5  # outliers have emerged once a block has this share of those after the last but one block
EMBEDDED_SHARE = 0.5  # share of the last blocks' outliers that the position embedding has at the same places

Cause = Literal["register_neurons", "none", "already_registered", "position_embedding", "unsupported"]


@dataclass(frozen=True)
class BlockNorms:
    """L2 norms of the patches after one block, or before block 0: per-image figures, averaged over the images."""

    median: float
    p99: float
    max: float
    outliers: float

    @property
    def max_over_median(self) -> float:
        return self.max / self.median


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found.

    Attributes:
        verdict: the cause; `reason` explains it as text.
        positional: whether the outliers sit at the same places in every image; None without outliers.
        emergence_block: the first block from which on, up to the last but one, every block ends with at least half as
            many outliers as the last but one does; None without outliers.
        settled_block: the last block, up to the last but one, that writes 3 median norms or more (enough to make any
            patch an outlier) to some of those outliers. No later block is a cause. None without outliers.
        outliers_per_image: after the last but one block.
        tokens: the norms before block 0; `blocks` those after each block. Empty for an unsupported model.
    """

    verdict: Cause
    reason: str
    images: str
    num_images: int
    positional: bool | None = None
    emergence_block: int | None = None
    settled_block: int | None = None
    outliers_per_image: float = 0.0
    tokens: BlockNorms | None = None
    blocks: tuple[BlockNorms, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "positional": self.positional,
            "emergence_block": self.emergence_block,
            "settled_block": self.settled_block,
            "outliers_per_image": self.outliers_per_image,
            "max_over_median": [block.max_over_median for block in self.blocks],
            "reason": self.reason,
            "images": self.images,
            "num_images": self.num_images,
            "tokens": asdict(self.tokens) if self.tokens else None,
            "blocks": [asdict(block) for block in self.blocks],
        }


class _NormSums:
    """Running sums for one place in the network; their size does not depend on the number of images."""

    def __init__(self) -> None:
        self.figures = torch.zeros(4, dtype=torch.float64)
        self.hits_N: Tensor | int = 0
        self.num_images = 0

    def add(self, norms_BN: Tensor) -> None:
        found_BN = robust_outliers(norms_BN)
        per_image = (
            norms_BN.median(dim=1).values,
            norms_BN.quantile(0.99, dim=1),
            norms_BN.amax(dim=1),
            found_BN.sum(1),
        )
        self.figures += torch.stack([values.double().sum() for values in per_image]).cpu()
        self.hits_N = self.hits_N + found_BN.sum(dim=0).cpu()
        self.num_images += len(norms_BN)

    def norms(self) -> BlockNorms:
        return BlockNorms(*(self.figures / self.num_images).tolist())


def diagnose(
    located: Located,
    images: ImageSet,
    *,
    force: bool = False,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda done: None,
) -> Diagnosis:
    """Run the original over `images` and read the norms of its patches after every block.

    Args:
        force: look for a cause even if the model was trained with registers.
    """
    loaded, traced, sites = located.loaded, located.traced, located.sites
    nodes = {"tokens": sites.tokens, **{str(block.index): block.output for block in sites.blocks}}
    tapped = tap(traced.graph_module, nodes, early_exit=True)
    sums = {name: _NormSums() for name in nodes}
    writes = torch.zeros(sites.probe_block + 1)
    for batch in images.batches(batch_size, loaded.preprocess):
        with torch.no_grad():
            _, taps = tapped(*tensor_inputs(loaded, batch))
        for name, value in taps.items():
            sums[name].add(token_norms(value)[:, sites.patches])
        writes += _large_writes(taps, sites)
        progress(len(batch))
    registers = 0 if force else trained_registers(loaded, sites)
    return _conclude(sites, sums, writes, images, registers)


def _large_writes(taps: Mapping[str, Tensor], sites: Sites) -> Tensor:
    """For every block up to the last but one: to how many of the outliers there it writes 3 median norms or more."""
    probe = [taps["tokens"], *(taps[str(block)] for block in range(sites.probe_block + 1))]
    patches = [value[:, sites.patches] for value in probe]
    outliers_BN = robust_outliers(token_norms(patches[-1]))
    counts = []
    for before_BND, after_BND in pairwise(patches):
        limit_B1 = MIN_RATIO * token_norms(after_BND).median(dim=1, keepdim=True).values
        written_BN = token_norms(after_BND - before_BND)
        counts.append((outliers_BN & (written_BN >= limit_B1)).sum())
    return torch.stack(counts).cpu()


def _conclude(sites: Sites, sums: dict[str, _NormSums], writes: Tensor, images: ImageSet, registers: int) -> Diagnosis:
    tokens, blocks = sums["tokens"].norms(), tuple(sums[str(block.index)].norms() for block in sites.blocks)
    probe, last = sites.probe_block, sums[str(sites.probe_block)]
    found = blocks[probe].outliers
    common = {"images": images.note, "num_images": last.num_images, "outliers_per_image": found, "tokens": tokens,
              "blocks": blocks}  # fmt: skip
    if registers:
        return Diagnosis("already_registered", f"the model was trained with {registers} register tokens", **common)
    if found < MIN_OUTLIERS:
        largest = max(norms.max_over_median for norms in (tokens, *blocks))
        reason = f"{found:.2f} outlier tokens per image; on average no patch is above {largest:.1f} medians"
        return Diagnosis("none", reason, **common)
    emergence = probe
    while emergence > 0 and blocks[emergence - 1].outliers >= max(MIN_OUTLIERS, EMERGED_SHARE * found):
        emergence -= 1
    assert isinstance(last.hits_N, Tensor)
    positional = share_at_common_places(last.hits_N, last.norms().outliers) >= POSITIONAL_SHARE
    where = "at the same places in every image" if positional else "at places that depend on the content"
    settled = max([emergence, *(block for block, count in enumerate(writes.tolist()) if count)])
    facts = {"positional": positional, "emergence_block": emergence, "settled_block": settled, **common}
    if emergence == 0 and _shared_places(sums["tokens"], last) >= EMBEDDED_SHARE:
        reason = (
            f"{found:.2f} outlier tokens per image, {where}: they are there before block 0, in the "
            f"{'position' if positional else 'patch'} embedding"
        )
        return Diagnosis("position_embedding", reason, **facts)
    reason = f"{found:.2f} outlier tokens per image from block {emergence} on, {where}"
    return Diagnosis("register_neurons", reason, **facts)


def _shared_places(early: _NormSums, late: _NormSums) -> float:
    """Share of the late outliers at places where as many images have early ones."""
    assert isinstance(early.hits_N, Tensor) and isinstance(late.hits_N, Tensor)
    return float(torch.minimum(early.hits_N, late.hits_N).sum() / late.hits_N.sum())
