"""Both products of a linear layer under a 2:4 transposable mask, on sparse tensor cores where there are any.

A GPU packs x·Wᵀ and g·W from one weight, because the mask is 2:4 along its rows and along its columns; PyTorch's
semi-structured tensors hold the two forms. The weight's own gradient stays dense. Everywhere else it is the masked
dense product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from masksolve._pattern import Pattern

_DTYPES = (torch.float16, torch.bfloat16)
# What PyTorch's CUTLASS kernels ask of the columns, and so of both sides of a weight that is packed both ways.
_MULTIPLE = 64
_OLDEST_CAPABILITY, _FIRST_TOO_NEW = (8, 0), (10, 0)


def acceleration_reason(weight: Tensor, pattern: Pattern, dtype: torch.dtype | None = None) -> str:
    """In words, whether products with a masked weight run on sparse tensor cores, and why if they do not.

    Parameters
    ----------
    weight : Tensor, shape (out, in)
    pattern : Pattern
        N **kept** of every M.
    dtype : torch.dtype, optional
        In which the products are computed, such as autocast's; the weight's own by default.

    Returns
    -------
    str
        "accelerated", or "not accelerated: " and every reason.

    Examples
    --------
    >>> acceleration_reason(torch.zeros(64, 128, dtype=torch.bfloat16), Pattern(2, 4))
    'not accelerated: sparse tensor cores need a CUDA device, the weight is on cpu'
    """
    capability = torch.cuda.get_device_capability(weight.device) if weight.is_cuda else None
    reasons = _obstacles(str(weight.device), capability, tuple(weight.shape), dtype or weight.dtype, pattern)
    return f"not accelerated: {'; '.join(reasons)}" if reasons else "accelerated"


def pack(masked: Tensor) -> Tensor:
    """Both packed forms of a weight (out, in) that a 2:4 transposable mask has zeroed; every weight left is kept.

    PyTorch chooses two of four itself, by default the largest *signed* values; by magnitude it finds just those that
    are not zero.
    """
    packed: Tensor = SparseSemiStructuredTensorCUTLASS.prune_dense_static_sort(
        masked.detach().contiguous(), algorithm="largest_abs_values_greedy"
    )
    return packed


def linear(inputs: Tensor, masked: Tensor, packed: Tensor | None) -> Tensor:
    """Inputs · maskedᵀ, (..., in) by (out, in), with the gradients of the dense product.

    Parameters
    ----------
    inputs : Tensor, shape (..., in)
    masked : Tensor, shape (out, in)
        The weight under its mask, to which the dense weight gradient flows.
    packed : Tensor or None
        What `pack` made of it, since it last changed; None computes the dense product.
    """
    if packed is None:
        return torch.nn.functional.linear(inputs, masked)
    output: Tensor = _PackedLinear.apply(inputs.to(packed.dtype), masked.to(packed.dtype), packed)  # type: ignore[no-untyped-call]
    return output


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, masked: Tensor, packed: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.packed = packed
        return (inputs.flatten(0, -2) @ packed.t()).view(*inputs.shape[:-1], masked.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (inputs,) = ctx.saved_tensors
        of_inputs = of_weight = None
        rows = gradient.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            of_inputs = (rows @ ctx.packed).view(inputs.shape)
        if ctx.needs_input_grad[1]:
            of_weight = rows.t() @ inputs.flatten(0, -2)
        return of_inputs, of_weight, None


def _obstacles(
    device: str, capability: tuple[int, int] | None, shape: tuple[int, ...], dtype: torch.dtype, pattern: Pattern
) -> list[str]:
    reasons = []
    if capability is None:
        reasons.append(f"sparse tensor cores need a CUDA device, the weight is on {device}")
    elif not _OLDEST_CAPABILITY <= capability < _FIRST_TOO_NEW:
        given = ".".join(map(str, capability))
        reasons.append(f"PyTorch's 2:4 kernels run on compute capability 8.0 to 9.x, {device} has {given}")
    if pattern != Pattern(2, 4):
        reasons.append(f"sparse tensor cores know 2:4 alone, the pattern is {pattern}")
    if dtype not in _DTYPES:
        reasons.append(f"the products have to be in float16 or bfloat16, as under autocast, not {dtype}")
    if len(shape) != 2 or any(side % _MULTIPLE for side in shape):
        reasons.append(f"the weight has to be a matrix of multiples of {_MULTIPLE}, its shape is {shape}")
    return reasons
