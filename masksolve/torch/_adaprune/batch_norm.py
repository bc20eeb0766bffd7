"""Running statistics of batch norms, moved along with their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from masksolve.torch._adaprune.calibration import Trace
from masksolve.torch._adaprune.source import Source

# Relative rounding error of squared float32 activations, with a margin for their sums.
_ROUNDING = 1e-12


@dataclass
class Statistics:
    """Statistics of a batch norm's inputs, over all batches: values per channel, their sums and sums of squares."""

    count: int
    total: Tensor
    squares: Tensor

    @staticmethod
    def of(norm: _BatchNorm) -> Statistics:
        """Return the statistics of no input."""
        zeros = torch.zeros(norm.num_features, dtype=torch.float64, device=cast(Tensor, norm.running_mean).device)
        return Statistics(0, zeros, zeros.clone())

    def add(self, source: Source, x: Tensor, groups: range) -> None:
        """Count the input of one call."""
        channels = x.double().transpose(0, 1).flatten(1)
        self.count += channels.shape[1]
        self.total += channels.sum(1)
        self.squares += channels.square().sum(1)

    def mean(self) -> Tensor:
        """Return the mean of each channel."""
        return self.total / self.count

    def variance(self) -> Tensor:
        """Return the variance of each channel; 0 where it is within the rounding error of a constant."""
        square = self.squares / self.count
        variance = square - self.mean().square()
        return torch.where(variance > _ROUNDING * square, variance, 0.0)


def running_batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of a model that have running statistics."""
    return [each for each in model.modules() if isinstance(each, _BatchNorm) and each.running_mean is not None]


def called_after(norms: Sequence[_BatchNorm], trace: Trace, layers: Sequence[Source]) -> list[_BatchNorm]:
    """Return the norms that are called after any of the layers, in the order of their first calls."""
    later = (each.module for each in trace.order[min(map(trace.order.index, layers)) :])
    return [each for each in later if isinstance(each, _BatchNorm) and each in norms]


def follow(norm: _BatchNorm, before: Statistics, after: Statistics) -> None:
    """Move the running statistics as those of the inputs have moved.

    Copied as they are, the statistics of a few samples would replace those of all training data; their change is due
    to the pruning alone.
    """
    variance = before.variance()
    growth = torch.where(variance > 0, after.variance() / torch.where(variance > 0, variance, 1.0), 1.0)
    cast(Tensor, norm.running_mean).add_(after.mean() - before.mean())
    cast(Tensor, norm.running_var).mul_(growth)
