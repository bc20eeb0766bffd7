"""Running statistics of batch norms, taken anew from calibration data."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from masksolve.torch._calibration import Calibration, Trace


def batch_norms_after(trace: Trace, first: nn.Module) -> list[_BatchNorm]:
    """Those with running statistics that are called after a layer, in the order of their first calls."""
    later = trace.order[trace.order.index(first) :]
    return [each for each in later if isinstance(each, _BatchNorm) and each.running_mean is not None]


def reestimate(calibration: Calibration, trace: Trace, batch_norm: _BatchNorm) -> None:
    """Set the running statistics to those of the inputs over all batches together, however they are split."""
    shape = (batch_norm.num_features,)
    like = cast(Tensor, batch_norm.running_mean)
    total, squares = (torch.zeros(shape, dtype=torch.float64, device=like.device) for _ in range(2))
    count = 0

    def see(module: nn.Module, x: Tensor) -> None:
        nonlocal count
        channels = x.double().transpose(0, 1).flatten(1) if x.ndim > 1 else x.double().unsqueeze(1)
        count += channels.shape[1]
        total.add_(channels.sum(1))
        squares.add_(channels.square().sum(1))

    calibration.watch(trace, {batch_norm: see})
    if count < 2:
        return
    mean = total / count
    like.copy_(mean)
    cast(Tensor, batch_norm.running_var).copy_((squares - count * mean.square()).clamp(min=0) / (count - 1))
