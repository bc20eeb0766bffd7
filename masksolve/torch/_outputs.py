"""What a module returns before it is changed and after: which tensors, how far apart, and what counts as rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Switch off what is random in training, within the context."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def outputs_of(value: Any) -> list[Tensor]:
    """Return all tensors of floats in what a module returns: in tuples, lists and mappings."""
    return [each.detach().double() for each in _tensors(value) if each.is_floating_point()]


def relative_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest change of an output, as a share of its norm."""
    shares = [float((new - old).norm() / old.norm().clamp(min=1e-300)) for old, new in zip(before, after, strict=True)]
    return max(shares)


def rounding(model: nn.Module) -> float:
    """Return the change that is taken for rounding: half the digits of the parameters' coarsest dtype."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return float(max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each)
