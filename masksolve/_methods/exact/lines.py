"""Tiles of a single line, which one-sided masks consist of: the largest entries, many lines at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from masksolve._jit import kernel

# Lines that lie side by side in a buffer, entry by entry: one operation on them is a few vectors wide.
_LINES = 128
# Entries of the buffers, which stay in the first-level cache.
_BUFFERED = 1 << 12
# Ranks take a comparison per pair of entries; selecting in longer lines one by one is faster.
_LONGEST_RANKED = 64


def choose_largest(lines: NDArray[Any], masks: NDArray[np.bool_], kept: int) -> bool:
    """Fill masks (p, q, k) with the `kept` largest magnitudes of lines (p, q, k) of floats; of equal ones the first.

    Returns whether all entries are finite; the masks mean nothing otherwise.
    """
    down, across, length = lines.shape
    if length > _LONGEST_RANKED:
        return _select(lines, masks, kept)
    # Vectors run along the second axis.
    if across < min(down, _LINES):
        lines, masks = lines.swapaxes(0, 1), masks.swapaxes(0, 1)
    return bool(_rank(lines, masks, kept, max(16, min(_LINES, _BUFFERED // length))))


@kernel
def _rank(lines: NDArray[Any], masks: NDArray[np.bool_], kept: int, width: int) -> bool:
    down, across, length = lines.shape
    entries = np.zeros((length, width), lines.dtype)
    # How many entries of its line are larger than each, or equal and before it.
    ranks = np.empty((length, width), np.int32)
    wrong = 0
    for p in range(down):
        for first in range(0, across, width):
            count = min(width, across - first)
            for i in range(length):
                own, rank = entries[i], ranks[i]
                for lane in range(count):
                    own[lane] = abs(lines[p, first + lane, i])
                    # NaN compares false.
                    wrong += not own[lane] < np.inf
                rank[:] = length - 1 - i
            # All lanes, whatever the last group has left in some: a loop of known length is unrolled.
            for i in range(length):
                own, rank = entries[i], ranks[i]
                for j in range(i + 1, length):
                    other, other_rank = entries[j], ranks[j]
                    for lane in range(width):
                        is_first = np.int32(own[lane] >= other[lane])
                        rank[lane] -= is_first
                        other_rank[lane] += is_first
            for i in range(length):
                rank = ranks[i]
                for lane in range(count):
                    masks[p, first + lane, i] = rank[lane] < kept
    return wrong == 0


def _select(lines: NDArray[Any], masks: NDArray[np.bool_], kept: int) -> bool:
    magnitudes = np.abs(lines)
    length = lines.shape[2]
    if not magnitudes.max() < np.inf:
        return False
    if kept >= length:
        masks[...] = True
        return True
    least = np.partition(magnitudes, length - kept, axis=2)[..., length - kept, np.newaxis]
    masks[...] = magnitudes > least
    room = kept - masks.sum(2, keepdims=True)
    ties = magnitudes == least
    masks |= ties & (ties.cumsum(2) <= room)
    return True
