"""Mask diversity: how many masks a sparsity constraint allows, exactly.

Source: Hubara et al., NeurIPS 2021, arXiv 2102.08124, who find that accuracy follows the number of masks. Their
formula for transposable masks is neither that number nor a bound on it: for 4:8 it is 150 times too large.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from masksolve._inputs import as_count, check_choice, check_direction, check_flag
from masksolve._pattern import Pattern, PatternLike, as_pattern
from masksolve._tiles import DIRECTIONS, Margins
from masksolve.diversity._count import count_masks, log10_seconds, log10_states

__all__ = [
    "Log2Count",
    "bits_per_weight",
    "count",
    "log2_count",
    "mask_diversity",
]

_CONSTRAINTS = (*DIRECTIONS, "unstructured")

# Ten seconds, with a third of a GiB of memory.
_LOG10_SECONDS = 1.0


@dataclass(frozen=True)
class Log2Count:
    """The result of `log2_count`; `float()` gives its value.

    Attributes
    ----------
    value : float
        The base-2 logarithm of the number of masks, in bits.
    exact : bool
        True: the logarithm of the exact count. False: the asymptotic formula.
    error : float or None
        Asymptotic formula less exact count, in bits; None where not both are known.
    """

    value: float
    exact: bool
    error: float | None

    def __float__(self) -> float:
        return self.value

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes by name, for JSON or a table."""
        return asdict(self)


def count(n: int, m: int, *, direction: str = "both", saturated: bool = True) -> int:
    """Return the number of n:m masks of one m x m tile, exactly.

    For direction "both" and `saturated=True` these are the m x m matrices of 0 and 1 whose rows and columns all sum
    to n (OEIS A008300), counted by dynamic programming over histograms of column sums.

    Parameters
    ----------
    n, m : int
        The pattern: n entries are **kept** of every m.
    direction : {"both", "rows", "columns"}
        "both": transposable. "rows", "columns": one-sided, every line on its own.
    saturated : bool
        True: exactly n kept in every line. False: at most n, which is the paper's "at least m - n zeros".

    Returns
    -------
    int
        Unbounded, never rounded.

    Raises
    ------
    TypeError
        If n or m is not an integer.
    ValueError
        For a pattern out of range or an unknown direction. Also, before it starts, for a transposable pattern whose
        count would take much more than ten seconds; the message gives the estimated cost.

    References
    ----------
    Hubara et al., NeurIPS 2021, arXiv 2102.08124, section on mask diversity, for the definition.

    Examples
    --------
    >>> count(2, 4), count(4, 8)
    (90, 116963796250)
    >>> count(2, 4, direction="rows")
    1296
    >>> count(2, 4, saturated=False)
    7343
    """
    pattern = Pattern(n, m)
    n, m = pattern.n, pattern.m
    check_flag(saturated, "saturated")
    if check_direction(direction) != "both":
        of_a_line = math.comb(m, n) if saturated else sum(math.comb(m, kept) for kept in range(n + 1))
        masks: int = of_a_line**m
        return masks
    if n == m and not saturated:
        return 1 << m * m
    margins = _margins(pattern, saturated)
    log10 = log10_seconds(m, m, margins)
    if log10 > _LOG10_SECONDS:
        states = log10_states(m, m, margins)
        instead = "; log2_count approximates it" if saturated else ""
        raise ValueError(
            f"counting the transposable masks of {pattern} would visit about {_rough(states)} states and take about "
            f"{_rough(log10)} s; count starts nothing that takes more than {10**_LOG10_SECONDS:.0f} s{instead}"
        )
    return count_masks(m, m, margins)


def log2_count(n: int, m: int, *, direction: str = "both") -> Log2Count:
    """Return the base-2 logarithm of the number of n:m masks of one m x m tile: exact if feasible, else asymptotic.

    The asymptotic formula for transposable masks is C(m, n)^(2m) / C(m^2, mn) * (1 - 1/m)^(m - 1) * sqrt(e). Its
    error shrinks as m grows: 0.012 bits for 2:4, 0.0055 for 4:8, 0.0024 for 6:12, 0.0014 for 8:16.

    Parameters
    ----------
    n, m, direction
        As for `count`.

    Returns
    -------
    Log2Count
        `exact` says which of the two it is.

    Raises
    ------
    TypeError, ValueError
        As for `count`, save that no pattern is too large.

    References
    ----------
    Canfield and McKay, "Asymptotic enumeration of dense 0-1 matrices with equal row sums and equal column sums",
    Electronic Journal of Combinatorics 12, 2005.

    Examples
    --------
    >>> found = log2_count(4, 8)
    >>> found.exact, round(found.value, 3), round(found.error, 4)
    (True, 36.767, 0.0055)
    >>> log2_count(16, 32).exact
    False
    """
    pattern = Pattern(n, m)
    n, m = pattern.n, pattern.m
    if check_direction(direction) != "both":
        return Log2Count(m * math.log2(math.comb(m, n)), exact=True, error=None)
    asymptotic = _canfield_mckay(n, m)
    if log10_seconds(m, m, _margins(pattern, saturated=True)) > _LOG10_SECONDS:
        return Log2Count(asymptotic, exact=False, error=None)
    value = math.log2(count(n, m))
    return Log2Count(value, exact=True, error=asymptotic - value)


def mask_diversity(pattern: PatternLike, size: int, *, direction: str = "both") -> int:
    """Return the number of masks that a constraint allows a tensor of `size` weights: the paper's mask diversity.

    Parameters
    ----------
    pattern : str, (int, int) or Pattern
        "4:8", (4, 8) or Pattern(4, 8): 4 entries are **kept** of every 8.
    size : int
        Number of weights: whole tiles of m * m for "both", whole groups of m for "rows" and "columns", and any
        number of which the share n/m is whole for "unstructured".
    direction : {"both", "rows", "columns", "unstructured"}
        "unstructured": any size * n / m of all weights are kept.

    Returns
    -------
    int
        Exact, with about size * bits_per_weight bits: for a large tensor that product is the better question.

    Raises
    ------
    TypeError
        If the pattern is none of these, or the size is not an integer.
    ValueError
        If the size is not whole, the direction unknown, or the count out of reach (see `count`).

    References
    ----------
    Hubara et al., NeurIPS 2021, arXiv 2102.08124, section on mask diversity.

    Examples
    --------
    >>> mask_diversity("4:8", 64)  # the paper's table has 1.7e13 here ...
    116963796250
    >>> mask_diversity("2:4", 64, direction="rows")  # ... and puts one-sided 2:4 below it
    2821109907456
    """
    pattern = as_pattern(pattern)
    size = as_count(size, "size", 1)
    direction = check_choice(direction, "direction", _CONSTRAINTS)
    n, m = pattern.n, pattern.m
    if direction == "unstructured":
        if size * n % m:
            unit = m // math.gcd(n, m)
            raise ValueError(f"{pattern} of {size} weights keeps {size * n / m:g}; give a multiple of {unit}")
        return math.comb(size, size * n // m)
    unit = m * m if direction == "both" else m
    if size % unit:
        what = f"{m}x{m} tiles" if direction == "both" else f"groups of {m}"
        raise ValueError(f"{size} weights are not a whole number of {what}; give a multiple of {unit}")
    of_a_unit = count(n, m) if direction == "both" else math.comb(m, n)
    masks: int = of_a_unit ** (size // unit)
    return masks


def bits_per_weight(n: int, m: int, *, direction: str = "both") -> float:
    """Return mask diversity on a scale without tensor size: log2(number of masks) / number of weights.

    Parameters
    ----------
    n, m : int
        The pattern: n entries are **kept** of every m.
    direction : {"both", "rows", "columns", "unstructured"}
        "unstructured": the limit for large tensors, the binary entropy of n/m. No constraint of that density has
        more.

    Returns
    -------
    float
        Between 0 and 1; exact to float64 where `log2_count` is exact.

    Raises
    ------
    TypeError, ValueError
        As for `log2_count`.

    Examples
    --------
    >>> [round(bits_per_weight(4, 8, direction=direction), 3) for direction in ("both", "rows", "unstructured")]
    [0.574, 0.766, 1.0]
    """
    pattern = Pattern(n, m)
    direction = check_choice(direction, "direction", _CONSTRAINTS)
    if direction == "unstructured":
        shares = pattern.kept / pattern.m, pattern.zeros / pattern.m
        return sum(-share * math.log2(share) for share in shares if share > 0)
    return log2_count(n, m, direction=direction).value / pattern.m**2


def _rough(log10: float) -> str:
    return f"{10**log10:.2g}" if log10 < 300 else f"1e{log10:.0f}"


def _margins(pattern: Pattern, saturated: bool) -> Margins:
    # Exchanging ones and zeros maps saturated n:m masks to (m - n):m masks.
    kept = min(pattern.kept, pattern.zeros) if saturated else pattern.kept
    return Margins(kept, saturated, saturated)


def _canfield_mckay(n: int, m: int) -> float:
    """Return the asymptotic number of transposable masks, as a base-2 logarithm."""
    if m == 1:
        return 0.5 * math.log2(math.e)
    correction = (m - 1) * math.log1p(-1 / m) + 0.5
    return 2 * m * _log2_binomial(m, n) - _log2_binomial(m * m, m * n) + correction / math.log(2)


def _log2_binomial(total: int, chosen: int) -> float:
    return (math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)) / math.log(2)
