"""The result of a reshape after axes of its input have grown; axes are identified by position, not by size."""

from __future__ import annotations

import math

Shape = tuple[int, ...]


def reshaped(old_in: Shape, new_in: Shape, old_out: Shape) -> Shape | None:
    """The output shape of a reshape for `new_in`, given that `old_in` led to `old_out`; None if axes that grew are
    split. Axes are matched in groups of equal volume.
    """
    new_out = list(old_out)
    for axes_in, axes_out in _groups(old_in, old_out):
        grown = [axis for axis in axes_in if old_in[axis] != new_in[axis]]
        if not grown:
            continue
        old_volume, new_volume = _volume(old_in, axes_in), _volume(new_in, axes_in)
        candidates = [axis for axis in axes_out if old_out[axis] * new_volume % old_volume == 0 and old_out[axis] > 1]
        if len(axes_in) > 1 and len(axes_out) > 1:  # e.g. [B, T] -> [B, T]: the axis of the same rank in the group
            candidates = [axis for axis in candidates if old_out[axis] == old_in[grown[0]]]
        if len(candidates) != 1:
            return None
        new_out[candidates[0]] = old_out[candidates[0]] * new_volume // old_volume
    return tuple(new_out)


def _volume(shape: Shape, axes: list[int]) -> int:
    return math.prod(shape[axis] for axis in axes)


def _groups(left: Shape, right: Shape) -> list[tuple[list[int], list[int]]]:
    """The finest pairing of consecutive axes of `left` and `right` with equal volumes."""
    groups = []
    i = j = 0
    while i < len(left) or j < len(right):
        axes_left, axes_right = [], []
        if i < len(left):
            axes_left, i = [i], i + 1
        if j < len(right):
            axes_right, j = [j], j + 1
        while (a := _volume(left, axes_left)) != (b := _volume(right, axes_right)):
            if a < b:
                axes_left, i = [*axes_left, i], i + 1
            else:
                axes_right, j = [*axes_right, j], j + 1
        groups.append((axes_left, axes_right))
    return groups
