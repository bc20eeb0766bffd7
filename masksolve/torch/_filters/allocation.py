"""How many channels each group keeps for a number of parameters: one error for all groups, or one ratio."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# The constants of the authors' code: how far a share may lie above the sensitivity at a point that was not sampled,
# and how many draws are taken per unit of the logarithm.
K = 3
C = 3
# Probability of a channel that never fires. It goes before all others, and still comes back if all is to be kept.
_NEVER = 1e-30


class Allocation(Protocol):
    """Numbers of channels by one argument, between `low` and `high`, of which they are non-increasing functions."""

    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    def counts(self, at: float) -> list[int]:
        """Return how many channels each group keeps, at least one."""


@dataclass(frozen=True, eq=False)
class OneError:
    """As many channels as are expected among the draws that an error ε asks of each group; the argument is ln ε.

    Attributes
    ----------
    probabilities : sequence of ndarray of float64
        Of each group, by `probabilities_of`.
    weights : sequence of float
        Of each group, the sum of the sensitivities times the logarithm of `log_factor`.
    """

    probabilities: Sequence[NDArray[np.float64]]
    weights: Sequence[float]
    low: float = math.log(1e-300)
    high: float = math.log(1e150)

    def counts(self, at: float) -> list[int]:
        """Return how many channels each group keeps."""
        return [
            distinct(p, draws_for(math.exp(at), weight))
            for p, weight in zip(self.probabilities, self.weights, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class OneRatio:
    """The same ratio of the channels of every group; the argument is the ratio that goes."""

    sizes: Sequence[int]
    low: float = 0.0
    high: float = 1.0

    def counts(self, at: float) -> list[int]:
        """Return how many channels each group keeps."""
        return [max(1, math.ceil((1 - at) * size)) for size in self.sizes]


def probabilities_of(sensitivities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the probability of drawing each channel, in proportion to its sensitivity."""
    largest = float(sensitivities.max(initial=0))
    weights = np.maximum(sensitivities, _NEVER * largest) if largest > 0 else np.ones(len(sensitivities))
    found: NDArray[np.float64] = weights / weights.sum()
    return found


def log_factor(places: int, kernel: int, delta: float) -> float:
    """Return 2 C ln(8 (P + 1) κ / δ), for P places of a layer at which κ numbers of a channel are read."""
    return 2 * C * math.log(8 * (places + 1) * kernel / delta)


def draws_for(epsilon: float, weight: float) -> float:
    """Return ⌈K (6 + 2ε) S̃ / ε²⌉, at least 1: how many draws an error ε asks for. It may be infinite."""
    return max(1.0, float(np.ceil(K * (6 / epsilon + 2) * float(weight) / epsilon)))


def expected_distinct(probabilities: NDArray[np.float64], draws: float) -> float:
    """Return Σ 1 - (1 - p)^draws, the number of different channels expected among so many draws."""
    with np.errstate(divide="ignore", over="ignore"):
        return float(-np.expm1(draws * np.log1p(-probabilities[probabilities > 0])).sum())


def distinct(probabilities: NDArray[np.float64], draws: float) -> int:
    """Return the expected number of different channels, rounded up to a whole one."""
    # A sum of probabilities that is 1 but for rounding is one channel.
    return min(len(probabilities), max(1, math.ceil(expected_distinct(probabilities, draws) - 1e-9)))


def search(
    size: Callable[[Sequence[int]], int], allocation: Allocation, most: Sequence[int], target: float
) -> tuple[float, Sequence[int]]:
    """Return the argument at which an allocation passes a target size, and numbers of channels near to the target.

    Bisection down to neighbouring floats: a step function has no root to interpolate, and the step that passes the
    target is known in the end. Then groups get one channel more, those of the largest ones first, where that is nearer;
    `most` are the channels that each has.
    """
    low, high = allocation.low, allocation.high
    if size(allocation.counts(low)) <= target:
        return low, allocation.counts(low)
    while low < (middle := (low + high) / 2) < high:
        if size(allocation.counts(middle)) > target:
            low = middle
        else:
            high = middle
    counts = allocation.counts(high)
    more = [_one_more(counts, group) for group in range(len(counts)) if counts[group] < most[group]]
    for group in sorted(more, key=size, reverse=True):
        added = [max(pair) for pair in zip(counts, group, strict=True)]
        counts = min(counts, added, key=lambda each: abs(size(each) - target))
    return high, min(counts, allocation.counts(low), key=lambda each: abs(size(each) - target))


def _one_more(counts: Sequence[int], group: int) -> list[int]:
    return [count + (place == group) for place, count in enumerate(counts)]
