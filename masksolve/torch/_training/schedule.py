"""The schedule of refreshes: every k steps, never, or as a function says, and none in the final dense phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from masksolve._inputs import as_count

RefreshEvery = int | Callable[[int], bool] | None


@dataclass(frozen=True)
class Schedule:
    """The steps at which masks are refreshed; optimizer steps, counted from 1.

    `refresh_every`: a number of steps, None for masks that stay, or a function of the step. From step `until` on the
    model is dense.
    """

    refresh_every: RefreshEvery
    until: int | None

    def __post_init__(self) -> None:
        if self.refresh_every is not None and not callable(self.refresh_every):
            as_count(self.refresh_every, "refresh_every", 1)
        if self.until is not None:
            as_count(self.until, "until", 1)

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
