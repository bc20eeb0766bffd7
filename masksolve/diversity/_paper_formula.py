"""The paper's formula for the number of transposable masks: what it prints, for comparison; it is not that number.

Source: Hubara et al., NeurIPS 2021, arXiv 2102.08124, section on mask diversity.
"""

from __future__ import annotations

import math

from masksolve.diversity import count, log2_count


def paper_formula(n: int, m: int) -> int:
    """Return m! (m-1)! ... (m-n+1)!, in the paper the number of transposable n:m masks of one tile.

    It is right for n <= 1 only, 1.6 times the number of masks for 2:4, 150 times for 4:8, and three quarters of it for
    2:16.

    Examples
    --------
    >>> paper_formula(2, 4), count(2, 4)
    (144, 90)
    """
    return math.prod(math.factorial(m - filled) for filled in range(n))


def paper_formula_ratio(n: int, m: int) -> float:
    """Return the paper's formula divided by the number of transposable masks of one tile; 1.0 where it is right.

    Beyond the reach of `count` the number is asymptotic; a ratio beyond float64 is inf.

    Examples
    --------
    >>> round(paper_formula_ratio(4, 8), 1), round(paper_formula_ratio(2, 16), 3)
    (150.1, 0.748)
    """
    found = log2_count(n, m)
    try:
        if found.exact:
            return paper_formula(n, m) / count(n, m)
        return math.exp2(math.log2(paper_formula(n, m)) - found.value)
    except OverflowError:
        return math.inf
