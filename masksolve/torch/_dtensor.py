"""Tensors of which this process may hold a shard."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor."""
    # Its module takes half a second to import, and whoever has a DTensor has imported it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def as_plain(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor of which this process may hold a shard; every process has to call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like(tensor: Tensor, sample: Tensor) -> Tensor:
    """Distribute a tensor as the sample is; return the whole of it if that is a plain tensor."""
    if not is_sharded(sample):
        return as_plain(tensor)
    if is_sharded(tensor) and tensor.device_mesh == sample.device_mesh and tensor.placements == sample.placements:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(as_plain(tensor), sample.device_mesh, sample.placements)
