"""The channels of a model: which layers make and read them, which can only be cut together, and which have to stay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

# A number for each position along an axis: that of its channel while a model is traced, then that of the channel's
# class. Channels of one class are cut together.
Labels = NDArray[np.int64]


class Ties:
    """Channels as they are found: tied to one another (a union-find), or held, with the reason."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self.reasons: dict[int, str] = {}
        self.mixed: set[int] = set()

    def fresh(self, count: int) -> Labels:
        """Return new channels."""
        start = len(self._parents)
        self._parents += range(start, start + count)
        return np.arange(start, start + count)

    def tie(self, one: Labels, other: Labels) -> None:
        """Let the channels at equal positions be cut together."""
        for pair in zip(one.tolist(), other.tolist(), strict=True):
            first, second = sorted(map(self._root, pair))
            self._parents[second] = first

    def hold(self, labels: Labels, reason: str) -> None:
        """Let channels stay; the first reason counts."""
        for label in labels.tolist():
            self.reasons.setdefault(label, reason)

    def mix(self, labels: Labels) -> None:
        """Note that channels meet data which no layer makes."""
        self.mixed.update(labels.tolist())

    def classes(self) -> Labels:
        """Return the class of each channel."""
        roots = [self._root(label) for label in range(len(self._parents))]
        return np.unique(roots, return_inverse=True)[1].astype(np.int64)

    def _root(self, label: int) -> int:
        while self._parents[label] != label:
            self._parents[label] = label = self._parents[self._parents[label]]
        return label


@dataclass(eq=False)
class Layer:
    """A Linear or a convolution.

    Attributes
    ----------
    name : str
    module : nn.Module
    outputs, inputs : Labels
        The class of each filter, and that of each input channel of the weight. They change when the layer is cut.
    calls : int
        How often the model calls it.
    places : int
        Places at which its filters are applied, per point.
    reason : str or None
        Why its filters have to stay; None if they may be cut.
    """

    name: str
    module: nn.Module
    outputs: Labels
    inputs: Labels
    calls: int
    places: int
    reason: str | None = None

    @property
    def weight(self) -> Tensor:
        """The weight, (outputs, inputs, *kernel)."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, if there is one."""
        return self.module._parameters["bias"]

    @property
    def kernel(self) -> int:
        """Elements of the kernel."""
        return math.prod(self.weight.shape[2:])

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution."""
        return isinstance(self.module, _ConvNd)


@dataclass(eq=False)
class Follower:
    """A batch norm, or whatever else has one parameter per channel."""

    module: nn.Module
    channels: Labels

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers that have an entry for each channel."""
        held: dict[str, Tensor | None] = {**self.module._parameters, **self.module._buffers}
        return {name: each for name, each in held.items() if each is not None and each.ndim == 1}


@dataclass(frozen=True, eq=False)
class Group:
    """Classes of channels that the same layers make: none of these may lose all."""

    layers: tuple[str, ...]
    classes: Labels

    @property
    def name(self) -> str:
        """The names of its layers."""
        return ", ".join(self.layers)


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """What of a model is made of channels.

    Attributes
    ----------
    layers : tuple of Layer
        In the order of their first calls.
    followers : tuple of Follower
    groups : tuple of Group
        Of the classes that may be cut; each class is in at most one.
    classes : int
        Number of classes.
    mixed : ndarray of bool
        Of each class, whether its values may depend on data that no layer makes.
    others : mapping
        Names of Linear and convolution layers that are no part of this, with the reason.
    """

    layers: tuple[Layer, ...]
    followers: tuple[Follower, ...]
    groups: tuple[Group, ...]
    classes: int
    mixed: NDArray[np.bool_]
    others: Mapping[str, str]

    @property
    def free(self) -> NDArray[np.bool_]:
        """Whether each class may be cut."""
        found = np.zeros(self.classes, dtype=bool)
        for group in self.groups:
            found[group.classes] = True
        return found

    def readers(self, group: Group) -> list[Layer]:
        """Return the layers that read channels of a group."""
        return [layer for layer in self.layers if np.isin(layer.inputs, group.classes).any()]

    def parameters_without(self, cut: NDArray[np.bool_], parameters: int) -> int:
        """Return how many of a model's parameters remain without some classes."""
        for layer in self.layers:
            rows, columns = (int(np.count_nonzero(~cut[each])) for each in (layer.outputs, layer.inputs))
            parameters -= (len(layer.outputs) * len(layer.inputs) - rows * columns) * layer.kernel
            parameters -= 0 if layer.bias is None else len(layer.outputs) - rows
        for follower in self.followers:
            vectors = sum(isinstance(each, nn.Parameter) for each in follower.tensors.values())
            parameters -= vectors * int(np.count_nonzero(cut[follower.channels]))
        return parameters


def channel_map(
    ties: Ties, layers: Sequence[Layer], followers: Iterable[Follower], others: Mapping[str, str]
) -> ChannelMap:
    """Return the channels of a traced model by their classes; those of `layers` and `followers` are replaced."""
    classes = ties.classes()
    count = int(classes.max(initial=-1)) + 1
    makers = {label: layer for layer in layers for label in layer.outputs.tolist()}
    # Of each class, the first of its channels that is held.
    held: dict[int, int] = {}
    for label in sorted(ties.reasons):
        held.setdefault(int(classes[label]), label)
    made: dict[int, list[str]] = {each: [] for each in range(count)}
    for layer in layers:
        for label in layer.outputs.tolist():
            made[int(classes[label])].append(layer.name)
        layer.reason = _reason(layer, classes, ties, held, makers)
    together: dict[tuple[str, ...], list[int]] = {}
    for each, names in made.items():
        if each not in held:
            together.setdefault(tuple(names), []).append(each)
    groups = tuple(
        Group(tuple(dict.fromkeys(names)), np.array(each, dtype=np.int64)) for names, each in together.items()
    )
    mixed = np.zeros(count, dtype=bool)
    mixed[classes[np.array(list(ties.mixed), dtype=np.int64)]] = True
    for layer in layers:
        layer.outputs, layer.inputs = classes[layer.outputs], classes[layer.inputs]
    found = tuple(followers)
    for follower in found:
        follower.channels = classes[follower.channels]
    return ChannelMap(tuple(layers), found, groups, count, mixed, others)


def _reason(
    layer: Layer, classes: Labels, ties: Ties, held: Mapping[int, int], makers: Mapping[int, Layer]
) -> str | None:
    """Return why the filters of a layer have to stay, if any of them has to."""
    own = [label for label in layer.outputs.tolist() if label in ties.reasons]
    if own:
        return ties.reasons[own[0]]
    for label in layer.outputs.tolist():
        cause = held.get(int(classes[label]))
        if cause is not None:
            through = f"{makers[cause].name}: " if cause in makers else ""
            return f"its channels are those of {through}{ties.reasons[cause]}"
    return None
