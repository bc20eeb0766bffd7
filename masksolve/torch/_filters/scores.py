"""Scores of the channels of a model, group by group: sensitivities, or norms of filters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from masksolve.torch._filters.allocation import Allocation, OneError, OneRatio, log_factor, probabilities_of
from masksolve.torch._filters.channels import ChannelMap, Group, Labels
from masksolve.torch._filters.runner import Runner
from masksolve.torch._filters.sampling import ranked
from masksolve.torch._filters.sensitivity import Part, Sensitivity


@dataclass(frozen=True, eq=False)
class Scored:
    """The groups as they are when they are scored.

    Attributes
    ----------
    channels : ChannelMap
    groups : sequence of Group
        Without channels that have gone already.
    scores : sequence of ndarray of float64
        Of the channels of each group.
    sums : sequence of int
        Of how many sums of its readers the sensitivities of each group are the largest parts; 0 for norms.
    parameters : int
        Those of the model.
    """

    channels: ChannelMap
    groups: Sequence[Group]
    scores: Sequence[NDArray[np.float64]]
    sums: Sequence[int]
    parameters: int

    @property
    def most(self) -> list[int]:
        """The channels of each group."""
        return [len(each) for each in self.scores]

    def size(self, counts: Sequence[int]) -> int:
        """Return the number of parameters with so many of the best channels of each group."""
        cut = np.zeros(self.channels.classes, dtype=bool)
        for group, scores, count in zip(self.groups, self.scores, counts, strict=True):
            cut[group.classes[ranked(scores)[count:]]] = True
        return self.channels.parameters_without(cut, self.parameters)

    def one_ratio(self) -> Allocation:
        """Return the numbers of channels by one ratio for all groups."""
        return OneRatio(self.most)

    def one_error(self, delta: float) -> Allocation:
        """Return the numbers of channels by one error for all groups."""
        weights = []
        for group, scores in zip(self.groups, self.scores, strict=True):
            # Of several readers the places of all, and the largest kernel: what one layer with all of them would have.
            readers = self.channels.readers(group)
            places = sum(layer.places for layer in readers)
            kernel = max((_positions(layer.inputs, group) * layer.kernel for layer in readers), default=1)
            # A channel of no sensitivity at all still comes back if all are to be kept.
            total = max(float(scores.sum()), float(np.finfo(np.float64).tiny))
            weights.append(total * log_factor(places, kernel, delta))
        return OneError([probabilities_of(each) for each in self.scores], weights)


def by_sensitivity(channels: ChannelMap, groups: Sequence[Group], runner: Runner, part: Part) -> Scored:
    """Score channels by the largest part that they have in any sum of any layer that reads them, over all batches."""
    free = channels.free
    seen = {layer.module: Sensitivity(layer, part) for layer in channels.layers if free[layer.inputs].any()}
    for index in range(len(runner.batches)):
        runner.run(index, {module: each.add for module, each in seen.items()})
    largest = np.zeros(channels.classes)
    for each in seen.values():
        np.maximum.at(largest, each.classes, each.result())
    sums = [sum(seen[layer.module].sums for layer in channels.readers(group)) for group in groups]
    return Scored(channels, groups, [largest[group.classes] for group in groups], sums, parameters_of(runner))


def by_norm(channels: ChannelMap, groups: Sequence[Group], runner: Runner, power: int) -> Scored:
    """Score channels by the l1 or l2 norm of all filters that make one, as one vector."""
    powers = np.zeros(channels.classes)
    for layer in channels.layers:
        filters = layer.weight.detach().double().flatten(1).abs().pow(power).sum(1)
        np.add.at(powers, layer.outputs, filters.cpu().numpy())
    scores = [powers[group.classes] ** (1 / power) for group in groups]
    return Scored(channels, groups, scores, [0] * len(groups), parameters_of(runner))


def parameters_of(runner: Runner) -> int:
    """Return how many parameters the model has now."""
    return sum(parameter.numel() for parameter in runner.model.parameters())


def _positions(inputs: Labels, group: Group) -> int:
    """Return at how many input channels of a layer it reads each channel of a group."""
    return math.ceil(np.count_nonzero(np.isin(inputs, group.classes)) / max(1, len(group.classes)))
