"""Which channels of a group are kept, and by what they are multiplied: the best, drawn ones, or some of each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from masksolve.torch._filters.allocation import expected_distinct

Method = Literal["pfp", "pfp-random", "pfp-top", "l1", "l2"]
METHODS: tuple[Method, ...] = ("pfp", "pfp-random", "pfp-top", "l1", "l2")

# Draws are counted in 64-bit integers.
_MOST = 2**62


@dataclass(frozen=True, eq=False)
class Choice:
    """What is kept of a group.

    Attributes
    ----------
    kept : ndarray of bool
    factors : ndarray of float64
        By what each channel is multiplied; 0 for those that are not kept.
    draws : int or None
        How often a channel was drawn; None if none was.
    """

    kept: NDArray[np.bool_]
    factors: NDArray[np.float64]
    draws: int | None = None


def choose(scores: NDArray[np.float64], count: int, method: Method, rng: np.random.Generator) -> Choice:
    """Choose `count` channels, or draw so often that as many different ones are expected.

    Where every channel that ever fires is to be kept, none is drawn: however often one draws, it may be missed.
    """
    fires = int(np.count_nonzero(scores))
    if method not in ("pfp-random", "pfp-top") or count >= fires:
        return _best(scores, count)
    probabilities = scores / scores.sum()
    draws = least_draws(probabilities, count)
    if method == "pfp-random":
        return _drawn(probabilities, draws, rng)
    certain = min(count, int(np.count_nonzero(probabilities >= 1 / draws)))
    best = _best(scores, certain)
    rest = np.where(best.kept, 0, scores)
    if certain == count:
        return best
    rest /= rest.sum()
    drawn = _drawn(rest, least_draws(rest, count - certain), rng)
    return Choice(best.kept | drawn.kept, best.factors + drawn.factors, drawn.draws)


def least_draws(probabilities: NDArray[np.float64], count: int) -> int:
    """Return the least number of draws among which at least `count` different channels are expected.

    `count` is below the number of channels with a probability, which no number of draws reaches.
    """
    positive = probabilities[probabilities > 0]
    q = len(positive)
    # By Jensen's inequality equal probabilities, which have a closed form, need the fewest.
    high = max(1, int(math.log(q / (q - count)) / -math.log1p(-1 / q))) if q > 1 else 1
    low = high - 1
    enough = count - 1e-9
    while high < _MOST and expected_distinct(positive, high) < enough:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if expected_distinct(positive, middle) < enough else (low, middle)
    return min(high, _MOST)


def ranked(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the channels by falling score, the first of equals first."""
    return np.argsort(-scores, kind="stable")


def _best(scores: NDArray[np.float64], count: int) -> Choice:
    kept = np.zeros(len(scores), dtype=bool)
    kept[ranked(scores)[:count]] = True
    return Choice(kept, kept.astype(np.float64))


def _drawn(probabilities: NDArray[np.float64], draws: int, rng: np.random.Generator) -> Choice:
    counts = rng.multinomial(draws, probabilities)
    kept = counts > 0
    factors = np.zeros(len(counts))
    factors[kept] = counts[kept] / (draws * probabilities[kept])
    return Choice(kept, factors, draws)
