"""Odds that an unstructured-sparse tensor already is N:M, and the choice of a pattern from them, as AdaPrune does.

Source: Hubara et al., NeurIPS 2021, arXiv 2102.08124, and its code. The model throughout: every weight is zero with
the same probability, independently of the others. A group, row or tile "is N:M" if no group of M keeps more than N.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from masksolve._inputs import as_count, as_generator, as_mask, as_weights, check_direction
from masksolve._pattern import Pattern
from masksolve.diversity._count import counts_by_ones

__all__ = [
    "TileOdds",
    "choose_pattern",
    "choose_patterns",
    "group_odds",
    "row_odds",
    "share_of_groups",
    "share_of_rows",
    "share_of_tiles",
    "tile_odds",
]

# Counting masks by their number of ones takes much longer than a second beyond.
_LARGEST_COUNTED = 12
_SAMPLED_WEIGHTS_AT_ONCE = 1 << 22
# The normal quantile of a two-sided 95 % interval.
_Z = 1.959963984540054


@dataclass(frozen=True)
class TileOdds:
    """The result of `tile_odds`; `float()` gives its value.

    Attributes
    ----------
    value : float
        The probability, or its estimate.
    low, high : float
        Bounds: a 95 % Wilson interval where the value is estimated, the value itself where it is exact.
    exact : bool
        True: computed from the counts of all masks. False: estimated from random tiles.
    """

    value: float
    low: float
    high: float
    exact: bool

    def __float__(self) -> float:
        return self.value

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes by name, for JSON or a table."""
        return asdict(self)


def group_odds(sparsity: float, n: int, m: int) -> float:
    """Return the probability that a group of m weights is n:m: that at least m - n of them are zero.

    Parameters
    ----------
    sparsity : float
        The share of weights that are zero, between 0 and 1.
    n, m : int
        The pattern: n entries are **kept** of every m.

    Returns
    -------
    float

    Raises
    ------
    TypeError, ValueError
        For a sparsity or a pattern out of range.

    References
    ----------
    Hubara et al., NeurIPS 2021, arXiv 2102.08124, section on AdaPrune.

    Examples
    --------
    >>> [round(group_odds(0.5, n, m), 4) for n, m in [(2, 4), (4, 8), (8, 16)]]
    [0.6875, 0.6367, 0.5982]
    """
    pattern = Pattern(n, m)
    return _odds_of_at_most(pattern.n, pattern.m, _as_share(sparsity, "sparsity"))


def row_odds(sparsity: float, n: int, m: int, length: int) -> float:
    """Return the probability that a whole row of weights is n:m, one-sided.

    Parameters
    ----------
    sparsity : float
        The share of weights that are zero, between 0 and 1.
    n, m : int
        The pattern: n entries are **kept** of every m.
    length : int
        Number of weights in the row. A last group of fewer than m may keep n too.

    Returns
    -------
    float

    Raises
    ------
    TypeError, ValueError
        For a sparsity, a pattern or a length out of range.

    Examples
    --------
    >>> round(row_odds(0.9, 4, 8, 384), 4)
    0.9795
    """
    pattern = Pattern(n, m)
    share = _as_share(sparsity, "sparsity")
    whole, rest = divmod(as_count(length, "length", 1), pattern.m)
    return _odds_of_at_most(pattern.n, pattern.m, share) ** whole * _odds_of_at_most(pattern.n, rest, share)


def tile_odds(
    sparsity: float, n: int, m: int, *, samples: int = 100_000, rng: int | np.random.Generator | None = None
) -> TileOdds:
    """Return the probability that an m x m tile is transposable n:m: no row and no column keeps more than n.

    For m <= 12 computed from the exact number of such masks with 0, 1, 2, ... ones; estimated from random tiles beyond.

    Parameters
    ----------
    sparsity : float
        The share of weights that are zero, between 0 and 1.
    n, m : int
        The pattern: n entries are **kept** of every m.
    samples : int
        Random tiles to estimate from.
    rng : int or numpy.random.Generator, optional
        A seed, or the generator to draw from.

    Returns
    -------
    TileOdds
        `exact` says which of the two it is.

    Raises
    ------
    TypeError, ValueError
        For a sparsity, a pattern or a number of samples out of range, and for m beyond 2048 but where n = m.

    References
    ----------
    Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the American
    Statistical Association 22, 1927, for the interval.

    Examples
    --------
    >>> found = tile_odds(0.7, 4, 8)
    >>> found.exact, round(found.value, 4)
    (True, 0.4333)
    >>> tile_odds(0.8, 8, 16, samples=1000, rng=0).exact
    False
    """
    pattern = Pattern(n, m)
    n, m = pattern.n, pattern.m
    share = _as_share(sparsity, "sparsity")
    samples = as_count(samples, "samples", 1)
    generator = as_generator(rng)
    if n == m or m <= _LARGEST_COUNTED:
        odds = 1.0 if n == m else _odds(share, m * m, counts_by_ones(m, n))
        return TileOdds(odds, odds, odds, exact=True)
    hits = 0
    at_once = _SAMPLED_WEIGHTS_AT_ONCE // m**2
    if at_once == 0:
        largest = math.isqrt(_SAMPLED_WEIGHTS_AT_ONCE)
        raise ValueError(f"tiles of {pattern} are too large to draw; the odds are estimated for m up to {largest}")
    for start in range(0, samples, at_once):
        kept = generator.random((min(at_once, samples - start), m, m)) >= share
        full = np.maximum(kept.sum(axis=1).max(axis=1), kept.sum(axis=2).max(axis=1))
        hits += int((full <= n).sum())
    return TileOdds(hits / samples, *_wilson_interval(hits, samples), exact=False)


def share_of_groups(weights: ArrayLike, n: int, m: int, *, direction: str = "rows") -> float:
    """Return the share of a tensor's groups that are n:m already.

    Parameters
    ----------
    weights : array_like, shape (..., R, C)
        Real weights, or a mask. Zeros are what was pruned. Where m does not divide a line, its last group is shorter,
        and counts.
    n, m : int
        The pattern: n entries are **kept** of every m.
    direction : {"rows", "columns"}
        Which lines are cut into groups.

    Returns
    -------
    float
        What `group_odds` predicts.

    Raises
    ------
    TypeError, ValueError
        For weights that are not a matrix, a pattern out of range or an unknown direction.

    Examples
    --------
    >>> share_of_groups([[5, 0, 0, 0], [0, 2, 1, 3]], 1, 2)
    0.75
    """
    return float(_valid_groups(weights, Pattern(n, m), direction).mean())


def share_of_rows(weights: ArrayLike, n: int, m: int, *, direction: str = "rows") -> float:
    """Return the share of a tensor's rows (or columns) that are n:m throughout: what `row_odds` predicts.

    Parameters, errors and the treatment of ragged edges are those of `share_of_groups`.

    Examples
    --------
    >>> share_of_rows([[5, 0, 0, 0], [0, 2, 1, 3]], 1, 2)
    0.5
    """
    return float(_valid_groups(weights, Pattern(n, m), direction).all(axis=-1).mean())


def share_of_tiles(weights: ArrayLike, n: int, m: int) -> float:
    """Return the share of a tensor's m x m tiles that are transposable n:m already: what `tile_odds` predicts.

    Parameters
    ----------
    weights : array_like, shape (..., R, C)
        Real weights, or a mask. Zeros are what was pruned. Tiles at a ragged edge are smaller, and count.
    n, m : int
        The pattern: n entries are **kept** of every m.

    Returns
    -------
    float

    Raises
    ------
    TypeError, ValueError
        For weights that are not a matrix or a pattern out of range.

    Examples
    --------
    >>> share_of_tiles([[5, 0, 0, 1], [0, 2, 0, 3]], 1, 2)
    0.5
    """
    pattern = Pattern(n, m)
    rows = _valid_groups(weights, pattern, "rows")
    columns = _valid_groups(weights, pattern, "columns").swapaxes(-1, -2)
    rows_of_tile = np.logical_and.reduceat(rows, np.arange(0, rows.shape[-2], pattern.m), axis=-2)
    columns_of_tile = np.logical_and.reduceat(columns, np.arange(0, columns.shape[-1], pattern.m), axis=-1)
    return float((rows_of_tile & columns_of_tile).mean())


def choose_pattern(sparsity: float, m: int, *, confidence: float = 0.95) -> Pattern:
    """Return the n:m with the most zeros that a group has already, with at least this probability.

    Parameters
    ----------
    sparsity : float
        The share of weights that are zero, between 0 and 1.
    m : int
        Length of a group.
    confidence : float
        Between 0 and 1; the paper's code has 0.95 and 0.1.

    Returns
    -------
    Pattern
        n:m with the smallest n whose `group_odds` reach the confidence; m:m, dense, if no other does.

    Raises
    ------
    TypeError, ValueError
        For a sparsity, a confidence or an m out of range.

    References
    ----------
    Hubara et al., NeurIPS 2021, arXiv 2102.08124, section on AdaPrune.

    Examples
    --------
    >>> print(choose_pattern(0.7, 8))
    5:8
    >>> print(choose_pattern(0.7, 8, confidence=0.1))
    1:8
    """
    length = Pattern(0, m).m
    share, threshold = _as_share(sparsity, "sparsity"), _as_share(confidence, "confidence")
    kept = next((n for n in range(length) if _odds_of_at_most(n, length, share) >= threshold), length)
    return Pattern(kept, length)


def choose_patterns(layers: Mapping[str, ArrayLike], m: int, *, confidence: float = 0.95) -> dict[str, Pattern]:
    """Return `choose_pattern` of every layer, from the share of zeros in its tensor.

    Parameters
    ----------
    layers : mapping of str to array_like
        The weights of every layer, of any shape.
    m, confidence
        As for `choose_pattern`.

    Returns
    -------
    dict of str to Pattern

    Raises
    ------
    TypeError, ValueError
        As for `choose_pattern`, and for a layer without weights.

    Examples
    --------
    >>> layers = {"first": [1, 0, 2, 3], "second": [0, 0, 0, 1]}
    >>> {name: str(pattern) for name, pattern in choose_patterns(layers, 4, confidence=0.5).items()}
    {'first': '3:4', 'second': '1:4'}
    """
    if not isinstance(layers, Mapping):
        raise TypeError(
            f"layers must map names to weights, got {type(layers).__name__}; give choose_pattern a sparsity"
        )
    chosen = {}
    for name, weights in layers.items():
        array = np.asarray(weights)
        if array.size == 0:
            raise ValueError(f"layer {name!r} has shape {array.shape}, which is empty; leave it out")
        # Objects, strings and dates, which NumPy counts too: None is zero, and any text is not.
        if array.dtype.kind in "OSUMm":
            raise TypeError(f"layer {name!r} has dtype {array.dtype}; give its weights, as an array of numbers")
        chosen[name] = choose_pattern(1 - np.count_nonzero(array) / array.size, m, confidence=confidence)
    return chosen


def _odds_of_at_most(kept: int, length: int, sparsity: float) -> float:
    """Return the probability that at most `kept` of `length` weights are not zero."""
    if kept >= length:
        return 1.0
    return _odds(sparsity, length, [math.comb(length, ones) for ones in range(kept + 1)])


def _odds(sparsity: float, size: int, counts: Sequence[int]) -> float:
    """Return the probability of counts[j] masks with j ones each, of `size` weights, j < len(counts) <= size."""
    if sparsity in (0.0, 1.0):
        return sparsity
    # In logarithms, because a count can exceed float64, and its probability fall below.
    log_zero, log_one = math.log(sparsity), math.log1p(-sparsity)
    logs = (math.log(c) + (size - ones) * log_zero + ones * log_one for ones, c in enumerate(counts))
    return min(1.0, math.fsum(map(math.exp, logs)))


def _wilson_interval(hits: int, samples: int) -> tuple[float, float]:
    share = hits / samples
    shrunk = 1 + _Z**2 / samples
    centre = (share + _Z**2 / (2 * samples)) / shrunk
    half_width = _Z / shrunk * math.sqrt(share * (1 - share) / samples + (_Z / (2 * samples)) ** 2)
    # At the ends rounding would leave a bound of 1e-18 in place of 0.
    return (0.0 if hits == 0 else centre - half_width), (1.0 if hits == samples else centre + half_width)


def _valid_groups(weights: ArrayLike, pattern: Pattern, direction: str) -> NDArray[np.bool_]:
    """Return which groups keep at most n: (..., lines, groups of a line)."""
    array = np.asarray(weights)
    array = as_mask(array) if array.dtype.kind == "b" else as_weights(array)
    if check_direction(direction) == "both":
        raise ValueError("direction 'both' has no groups of its own; give 'rows' or 'columns', or use share_of_tiles")
    kept: NDArray[Any] = array != 0
    if direction == "columns":
        kept = kept.swapaxes(-1, -2)
    starts = np.arange(0, kept.shape[-1], pattern.m)
    return np.add.reduceat(kept, starts, axis=-1, dtype=np.int64) <= pattern.n


def _as_share(value: float, name: str) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number between 0 and 1, got {value!r} of type {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie between 0 and 1, got {value}")
    return float(value)
