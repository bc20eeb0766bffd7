"""The largest entries of many lines at once, in plain Numba: the same masks as those of `codegen`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from masksolve._jit import inner_kernel

# Lines that lie side by side in a buffer, entry by entry: one operation on them is a few vectors wide.
_LINES = 128
# Entries of the buffers, which stay in the first-level cache.
_BUFFERED = 1 << 12


def choose(lines: NDArray[Any], masks: NDArray[np.bool_], kept: int) -> bool:
    """Fill masks (p, q, k) with the `kept` largest magnitudes of lines (p, q, k); return whether all are finite."""
    down, across, length = lines.shape
    # Vectors run along the second axis.
    if across < min(down, _LINES):
        lines, masks = lines.swapaxes(0, 1), masks.swapaxes(0, 1)
    return bool(_rank(lines, masks, kept, max(16, min(_LINES, _BUFFERED // length))))


@inner_kernel
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
