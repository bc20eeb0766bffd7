"""How many draws keep every sum of a layer within an error, by Bernstein's inequality; docs/proof.md has the proof."""

from __future__ import annotations

import math

from masksolve._inputs import check_number


def enough_draws(total: float, epsilon: float, failure: float, *, k: float = 1.0) -> int:
    """Return how many draws keep one sum of non-negative terms within a relative error.

    Channel j is drawn with probability s_j / S and makes at most K s_j of the sum. Then with this many draws the
    estimate, in which a channel counts by how often it was drawn over how often that is expected, is off by ε times
    the sum or more with a probability of at most `failure`.

    Parameters
    ----------
    total : float
        S, the sum of the sensitivities ("share") of all channels.
    epsilon : float
        The relative error ε.
    failure : float
        For several sums at once, the probability for all of them divided by their number.
    k : float
        K, by which a share may exceed the sensitivity: 1 on the points from which sensitivities were computed.

    Returns
    -------
    int
        ⌈(6 + 2ε) S K ln(2 / failure) / (3 ε²)⌉, at least 1.

    Examples
    --------
    >>> from masksolve.torch.filters import enough_draws
    >>> enough_draws(4.0, 0.5, 0.01)
    198
    """
    for name, value in {"total": total, "epsilon": epsilon, "failure": failure, "k": k}.items():
        check_number(value, name)
        if not (0 < value < (1 if name == "failure" else math.inf)):
            below = " and below 1" if name == "failure" else " and finite"
            raise ValueError(f"{name} must be positive{below}, got {value!r}")
    return max(1, math.ceil((6 + 2 * epsilon) * total * k * math.log(2 / failure) / (3 * epsilon**2)))


def proven_error(draws: int, total: float, failure: float) -> float:
    """Return the error ε for which so many draws are enough, with k = 1: the root of what `enough_draws` computes."""
    a = total * math.log(2 / failure)
    return (a + math.sqrt(a * a + 18 * draws * a)) / (3 * draws)
