"""What `prune_filters` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from masksolve._words import counted
from masksolve.torch._filters.sampling import Method


@dataclass(frozen=True, kw_only=True, repr=False)
class FilteredLayer:
    """A Linear or convolution layer.

    Attributes
    ----------
    name : str
    outputs_before, outputs_after : int
        Its filters.
    inputs_before, inputs_after : int
        The channels that they read.
    kept_outputs, kept_inputs : tuple of int
        Which of those that it had remain.
    reason : str or None
        Why its filters have to stay; None if they may be cut.
    """

    name: str
    outputs_before: int
    outputs_after: int
    inputs_before: int
    inputs_after: int
    kept_outputs: tuple[int, ...]
    kept_inputs: tuple[int, ...]
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dict."""
        return asdict(self)

    def __repr__(self) -> str:
        sizes = f"{self.inputs_before}->{self.outputs_before} is {self.inputs_after}->{self.outputs_after}"
        return f"FilteredLayer({self.name!r}, {sizes}{f', filters stay: {self.reason}' if self.reason else ''})"


@dataclass(frozen=True, kw_only=True, repr=False)
class ChannelGroup:
    """Channels that are compared with one another.

    Attributes
    ----------
    layers : tuple of str
        The layers that make them; several if their outputs are added up, so that a channel is a filter of each.
    readers : tuple of str
        The layers that read them.
    channels, kept : int
        How many there were, and are.
    emptied : int
        How many went because the model computes the same without them, whatever is asked for.
    scores : tuple of float
        Of each channel, in the order of the filters of the first of `layers`: its sensitivity, or the norm of its
        filters. Those that had gone before scores were computed have 0.
    draws : int or None
        How often a channel was drawn; None if none was.
    proven_error : float or None
        Of method "pfp-random" with sensitivity="share": with probability 1 - delta, no sum of non-negative terms that
        a reader computes at one of the calibration points is off by more than this share of itself. None otherwise,
        or if none was drawn.
    """

    layers: tuple[str, ...]
    readers: tuple[str, ...]
    channels: int
    kept: int
    emptied: int
    scores: tuple[float, ...]
    draws: int | None = None
    proven_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dict."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"ChannelGroup({', '.join(self.layers)}: {self.kept} of {self.channels} kept)"


@dataclass(frozen=True, kw_only=True, repr=False)
class FilterReport:
    """The result of `prune_filters`.

    Attributes
    ----------
    method : str
    asked, kept : float
        The share of all parameters that was to remain, and that does.
    parameters_before, parameters_after : int
    note : str or None
        Why `kept` is more than half a per cent from what was asked; None if it is not.
    epsilon : float or None
        The error from which the number of channels of every group follows, by the authors' conservative constants; None
        for norms.
    points, points_asked : int
        The calibration points, and how many the authors' code would take for this model and delta.
    deviation : float
        The norm of the difference between what the model returns for the first batch, and what the larger one returns
        with the same channels at zero, as a share of the latter: rounding.
    layers : tuple of FilteredLayer
    groups : tuple of ChannelGroup
        Empty for none of the layers whose filters have to stay.
    untouched : tuple of (str, str)
        Linear and convolution layers that are no part of this at all, each with the reason.
    """

    method: Method
    asked: float
    kept: float
    parameters_before: int
    parameters_after: int
    note: str | None
    epsilon: float | None
    points: int
    points_asked: int
    deviation: float
    layers: tuple[FilteredLayer, ...]
    groups: tuple[ChannelGroup, ...]
    untouched: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dict that `json.dumps` takes, layers and groups as dicts too."""
        return asdict(self)

    def __repr__(self) -> str:
        channels = sum(group.channels for group in self.groups)
        kept = sum(group.kept for group in self.groups)
        return (
            f"FilterReport({self.method}, {self.parameters_after:,} of {counted(self.parameters_before, 'parameter')} "
            f"({self.kept:.2%}, asked {self.asked:.2%}), {kept:,} of {counted(channels, 'channel')} in "
            f"{counted(len(self.groups), 'group')}{f', {self.note}' if self.note else ''})"
        )
