"""Running statistics of batch norms, moved along with their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from masksolve.torch._adaprune.calibration import Trace

# Of float32 activations, squared, with room for the sums that they are.
_ROUNDING = 1e-12


@dataclass
class Statistics:
    """Of the inputs of one batch norm, all batches together: values seen of each channel, sums, sums of squares."""

    count: int
    total: Tensor
    squares: Tensor

    @staticmethod
    def of(norm: _BatchNorm) -> Statistics:
        """Those of no input."""
        zeros = torch.zeros(norm.num_features, dtype=torch.float64, device=cast(Tensor, norm.running_mean).device)
        return Statistics(0, zeros, zeros.clone())

    def add(self, module: nn.Module, x: Tensor) -> None:
        """Count the input of one call."""
        channels = x.double().transpose(0, 1).flatten(1)
        self.count += channels.shape[1]
        self.total += channels.sum(1)
        self.squares += channels.square().sum(1)

    def mean(self) -> Tensor:
        """The mean of each channel."""
        return self.total / self.count

    def variance(self) -> Tensor:
        """The variance of each channel; none where it is no more than rounding makes of a constant."""
        square = self.squares / self.count
        variance = square - self.mean().square()
        return torch.where(variance > _ROUNDING * square, variance, 0.0)


def running_batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Those of a model that have running statistics."""
    return [each for each in model.modules() if isinstance(each, _BatchNorm) and each.running_mean is not None]


def called_after(norms: Sequence[_BatchNorm], trace: Trace, layers: Sequence[nn.Module]) -> list[_BatchNorm]:
    """Those that are called after any of some layers, in the order of their first calls."""
    later = trace.order[min(map(trace.order.index, layers)) :]
    return [each for each in later if isinstance(each, _BatchNorm) and each in norms]


def follow(norm: _BatchNorm, before: Statistics, after: Statistics) -> None:
    """Move the running statistics as the inputs' have moved.

    Taken over as they are, the statistics of a few samples would replace those of all training data; their change is
    due to the pruning alone.
    """
    variance = before.variance()
    growth = torch.where(variance > 0, after.variance() / torch.where(variance > 0, variance, 1.0), 1.0)
    cast(Tensor, norm.running_mean).add_(after.mean() - before.mean())
    cast(Tensor, norm.running_var).mul_(growth)
