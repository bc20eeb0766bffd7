"""Selection networks: the N-th and (N+1)-th largest of M values by min and max alone, without branches.

Source: Batcher's odd-even merge sort (Knuth, The Art of Computer Programming 3, section 5.2.2, Algorithm M),
without the steps that neither output needs.
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


@lru_cache(maxsize=256)
def selection_network(n: int, m: int) -> Network:
    """The network for 0 < n < m."""
    steps: list[tuple[bool, int, int]] = []
    wires = list(range(m))
    for a, b in _sorting_comparators(m):
        inputs = wires[a], wires[b]
        for is_max, wire in ((True, a), (False, b)):
            steps.append((is_max, *inputs))
            wires[wire] = m + len(steps) - 1
    return _prune(steps, m, wires[n - 1], wires[n])


def _sorting_comparators(length: int) -> list[tuple[int, int]]:
    """Comparators that sort wires in descending order: after (a, b), wire a holds the larger value."""
    comparators = []
    span = 1
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
