"""Selection networks: the N-th and (N+1)-th largest of M values by min and max alone, without branches.

Source: Batcher's odd-even merge sort (Knuth, The Art of Computer Programming 3, section 5.2.2, Algorithm M), either of
single values or of blocks of 16 that Green's network has sorted (the same, section 5.3.4); without the steps that
neither output needs, and whichever is shorter then.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Network:
    """Straight-line code over values 0 .. m - 1; step s yields value m + s.

    A step is (is_max, a, b), the max or the min of values a and b. `nth` is the n-th largest of the inputs,
    `following` the (n+1)-th.
    """

    steps: tuple[tuple[bool, int, int], ...]
    nth: int
    following: int


# Green's network sorts 16 values by 60 comparators, where Batcher's takes 63: first those between all wires whose
# numbers differ in one bit, bit after bit, and then these.
_GREEN = (
    *((a, a | bit) for bit in (1, 2, 4, 8) for a in range(16) if not a & bit),
    *((1, 2), (4, 8), (3, 12), (7, 11), (5, 10), (6, 9), (13, 14)),
    *((1, 4), (7, 13), (2, 8), (11, 14), (5, 6), (9, 10)),
    *((2, 4), (11, 13), (3, 8), (7, 12)),
    *((6, 8), (3, 5), (7, 9), (10, 12)),
    *((3, 4), (5, 6), (7, 8), (9, 10), (11, 12)),
    *((6, 7), (8, 9)),
)


@lru_cache(maxsize=256)
def selection_network(n: int, m: int) -> Network:
    """Return the network for 0 < n < m."""
    # Wires that are not there might as well hold less than all others: they keep it.
    blocks = [(start + a, start + b) for start in range(0, m, 16) for a, b in _GREEN if start + b < m]
    ways = _merging_comparators(m, 1), blocks + _merging_comparators(m, 16)
    return min((_selection(comparators, n, m) for comparators in ways), key=lambda network: len(network.steps))


def _merging_comparators(length: int, span: int) -> list[tuple[int, int]]:
    """Return comparators that sort wires of which each block of `span` is sorted.

    All orders are descending: after (a, b), wire a holds the larger value.
    """
    comparators = []
    while span < length:
        step = span
        while step >= 1:
            for start in range(step % span, length - step, 2 * step):
                stop = min(start + step, length - step)
                comparators += [
                    (a, a + step) for a in range(start, stop) if a // (2 * span) == (a + step) // (2 * span)
                ]
            step //= 2
        span *= 2
    return comparators


def _selection(comparators: list[tuple[int, int]], n: int, m: int) -> Network:
    steps: list[tuple[bool, int, int]] = []
    wires = list(range(m))
    for a, b in comparators:
        inputs = wires[a], wires[b]
        for is_max, wire in ((True, a), (False, b)):
            steps.append((is_max, *inputs))
            wires[wire] = m + len(steps) - 1
    return _prune(steps, m, wires[n - 1], wires[n])


def _prune(steps: list[tuple[bool, int, int]], m: int, nth: int, following: int) -> Network:
    needed = {nth, following}
    for index in reversed(range(len(steps))):
        if m + index in needed:
            needed.update(steps[index][1:])
    renamed = {value: value for value in range(m)}
    kept: list[tuple[bool, int, int]] = []
    for index, (is_max, a, b) in enumerate(steps):
        if m + index in needed:
            renamed[m + index] = m + len(kept)
            kept.append((is_max, renamed[a], renamed[b]))
    return Network(tuple(kept), renamed[nth], renamed[following])
