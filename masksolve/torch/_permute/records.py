"""What `permute_model` and `permute_checkpoint` return."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from masksolve._pattern import Pattern
from masksolve._words import counted
from masksolve.torch._permute.axes import Kind


@dataclass(frozen=True, kw_only=True, repr=False)
class PermutedAxis:
    """One axis.

    Attributes
    ----------
    name : str
        That of the layer which takes it.
    kind : {"hidden", "value", "channels"}
        The hidden axis of a feed-forward block, the value channels of attention, or channels between two layers.
    length, groups : int
        Its lines, and how many groups of them are reordered each by itself.
    weights : tuple of str
        The parameters that it is an axis of.
    kept_before, kept_after : float
        The share of the importance of these that the best masks keep.
    seconds : float
    reason : str or None
        Why the axis was left as it was; None if it is reordered.
    """

    name: str
    kind: Kind
    length: int
    groups: int
    weights: tuple[str, ...]
    kept_before: float
    kept_after: float
    seconds: float
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dict."""
        return asdict(self)

    def __repr__(self) -> str:
        state = f"left: {self.reason}" if self.reason else f"kept {self.kept_before:.2%} -> {self.kept_after:.2%}"
        return f"PermutedAxis({self.name!r}, {self.kind}, {self.length}, {state})"


@dataclass(frozen=True, kw_only=True, repr=False)
class PermuteReport:
    """The result of `permute_model`.

    Attributes
    ----------
    pattern : Pattern
    axes : tuple of PermutedAxis
    deviation : float
        The norm of the change of the outputs as a share of their norm: rounding.
    untouched : tuple of str
        Matrices of which no axis is known that may be reordered.
    """

    pattern: Pattern
    axes: tuple[PermutedAxis, ...]
    deviation: float
    untouched: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dict, the pattern as "N:M"."""
        return {**asdict(self), "pattern": str(self.pattern)}

    def __repr__(self) -> str:
        moved = [axis for axis in self.axes if axis.reason is None]
        gains = [axis.kept_after - axis.kept_before for axis in moved]
        mean = sum(gains) / len(gains) if gains else 0.0
        return (
            f"PermuteReport({self.pattern}, {len(moved)} of {counted(len(self.axes), 'order')} changed, mean "
            f"gain {100 * mean:.2f} points, outputs changed by {self.deviation:.1e})"
        )
