"""The schedule of masks: when they are refreshed, how many zeros they have then, and when the model is dense again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from masksolve._inputs import as_count
from masksolve._pattern import Pattern

RefreshEvery = int | Callable[[int], bool] | None
SparsitySchedule = Callable[[int], float]

# A share such as .3 of 10 zeros is 3 of them, whatever way it was rounded.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Schedule:
    """The steps at which masks are refreshed, and the zeros that they have; optimizer steps, counted from 1.

    `refresh_every`: a number of steps, None for masks that stay, or a function of the step. From step `until` on the
    model is dense. `sparsity`: a function of the step, 0 for the first masks, that returns the share of a pattern's
    zeros; None for all of them.
    """

    refresh_every: RefreshEvery
    until: int | None
    sparsity: SparsitySchedule | None = None

    def __post_init__(self) -> None:
        if self.refresh_every is not None and not callable(self.refresh_every):
            as_count(self.refresh_every, "refresh_every", 1)
        if self.until is not None:
            as_count(self.until, "until", 1)
        if self.sparsity is None:
            return
        if not callable(self.sparsity):
            raise TypeError(
                f"sparsity_schedule must be a callable of the step, such as cubic_schedule(0, 1000), got "
                f"{self.sparsity!r}"
            )
        if self.refresh_every is None:
            raise ValueError("sparsity_schedule takes effect at refreshes, and refresh_every=None has none; give steps")

    def refreshes_at(self, step: int) -> bool:
        """Return whether masks are refreshed after this step."""
        if self.refresh_every is None:
            return False
        if callable(self.refresh_every):
            return bool(self.refresh_every(step))
        return step % self.refresh_every == 0

    def is_dense_at(self, step: int) -> bool:
        """Return whether the final dense phase has begun with this step."""
        return self.until is not None and step >= self.until

    def pattern_at(self, step: int, pattern: Pattern) -> Pattern:
        """Return the pattern of masks that are found after this step, on the way to a pattern.

        Raises
        ------
        ValueError
            If the schedule returns no share.
        """
        if self.sparsity is None:
            return pattern
        share = self.sparsity(step)
        if not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ValueError(
                f"sparsity_schedule returned {share!r} for step {step}; it is to return the share of the pattern's "
                "zeros, from 0 (dense) to 1 (all)"
            )
        return Pattern.from_zeros(int(share * pattern.zeros + _ROUNDING), pattern.m)

    def patterns(self, pattern: Pattern) -> list[Pattern]:
        """Return the patterns on the way to a pattern, it first."""
        most = pattern.n if self.sparsity is None else pattern.m
        return [Pattern(n, pattern.m) for n in range(pattern.n, most + 1)]


def cubic_schedule(begin: int, end: int) -> SparsitySchedule:
    """Return a schedule of sparsity that grows from none at one step to all at another, fast at first.

    At step t it is 1 - (1 - (t - begin) / (end - begin))³ of the pattern's zeros: Zhu & Gupta 2017 (arXiv 1710.01878).

    Parameters
    ----------
    begin, end : int
        Optimizer steps, 0 <= begin < end: dense up to `begin`, the pattern itself from `end` on, or from the first
        refresh after it.

    Returns
    -------
    callable
        For `sparsity_schedule` of a `Sparsifier`.

    Raises
    ------
    ValueError, TypeError
        For steps that are not in this order.

    Examples
    --------
    >>> grown = cubic_schedule(0, 100)
    >>> [grown(step) for step in (0, 50, 100, 200)]
    [0.0, 0.875, 1.0, 1.0]
    """
    begin, end = as_count(begin, "begin", 0), as_count(end, "end", 1)
    if end <= begin:
        raise ValueError(f"sparsity grows from step begin={begin} to a later one, got end={end}")

    def share(step: int) -> float:
        left = 1 - (step - begin) / (end - begin)
        return 1 - min(max(left, 0.0), 1.0) ** 3

    return share
