"""One feature per patch, as dense tasks compare them.

Shape suffixes: B images, A heads, T tokens, N patches, C channels of a head, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from regsurgery.errors import UserError
from regsurgery.verification.observing import Observation, check_block
from regsurgery.verification.pair import Pair, PairObserver

LAST_BLOCKS = 4
OF_ATTENTION = ("queries", "keys", "values")
KINDS = ("tokens", *OF_ATTENTION)


def checked_kinds(task: str, kinds: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    """`kinds`, all of them `known`.

    Raises:
        UserError: one is not.
    """
    unknown = sorted(set(kinds) - set(known))
    if unknown:
        raise UserError(f"eval {task}: '{unknown[0]}' is not a kind of feature; choose from {', '.join(known)}")
    return kinds


def chosen_blocks(pair: Pair, blocks: Sequence[int] | None) -> list[int]:
    """`blocks` counted from 0; by default the last `LAST_BLOCKS`.

    Raises:
        UserError: the model has no such block.
    """
    depth = pair.original.num_blocks
    return [check_block(pair.original, block) for block in blocks or range(max(0, depth - LAST_BLOCKS), depth)]


def feature_observer(pair: Pair, blocks: Sequence[int], kinds: Sequence[str]) -> PairObserver:
    """An observer of both models for `patch_features`."""
    return pair.observer(blocks=blocks, what=["blocks" if kind == "tokens" else kind for kind in kinds])


def patch_features(seen: Observation, block: int, kind: str) -> Tensor:
    """The patches' features of `KINDS`, `[B, N, D]`: the stream after the block, or what its attention reads, all heads
    together.
    """
    if kind == "tokens":
        return seen.patches(block)
    features_BATC = {"queries": seen.queries, "keys": seen.keys, "values": seen.values}[kind](block)
    return features_BATC[:, :, seen.subject.attended_patches].transpose(1, 2).flatten(2)
