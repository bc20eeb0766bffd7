"""Least squares of many rows at once, each on its own kept entries, by preconditioned conjugate gradients.

A factor of every row takes (kept entries)³ / 3 operations; a step for all rows is two products of whole matrices, which
run several times as fast. The preconditioner is the inverse of the whole matrix A. Its part on the kept entries is, by
Schur complements, no smaller than the inverse of A's part, so that rᵀ A⁻¹ r, which every step computes anyway, is no
smaller than the error that the residual r still costs: each row stops with a proof.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What a row's error may exceed the least possible by, as a share of it: far less than another calibration set changes.
EXCESS = 1e-4
# Steps in float32 before the residual is found again in float64, and how often that is done.
_STEPS, _ROUNDS = 64, 2
# Finished rows are left out once this share of the others, or fewer, is open: each time is a copy of all that is kept.
_FEWER = 0.8


def conjugate_gradients(
    system: Tensor, inverse: Tensor, right: Tensor, mask: Tensor, error: Tensor
) -> tuple[Tensor, Tensor]:
    """Minimise e - 2 b x + x A x for each row x, which is zero where its mask is False.

    Parameters
    ----------
    system, inverse : Tensor of float64, shape (inputs, inputs)
        A, positive definite, and its inverse.
    right : Tensor of float64, shape (rows, inputs)
        b; what it holds where the mask is False counts for nothing.
    mask : Tensor of bool, shape (rows, inputs)
    error : Tensor of float64, shape (rows,)
        e: the error at x = 0.

    Returns
    -------
    found : Tensor of float64, shape (rows, inputs)
    is_solved : Tensor of bool, shape (rows,)
        Where the error is proven to exceed the least one by no more than `EXCESS` of that: not where there is next to
        no error, or the matrix is too ill-conditioned.
    """
    # With a unit diagonal everything fits float32, whatever the inputs' sizes.
    scale = system.diagonal().rsqrt()
    # In place: these matrices are larger than what is repaired.
    rough = (scale.unsqueeze(1) * system).mul_(scale).float()
    preconditioner = (inverse / scale.unsqueeze(1)).div_(scale).float()
    found, residual, remaining = torch.zeros_like(right), torch.where(mask, right, 0.0), error
    is_solved = torch.zeros_like(mask[:, 0])
    for _ in range(_ROUNDS):
        found = found + scale * _steps(rough, preconditioner, scale * residual, mask, remaining)
        residual = torch.where(mask, right - found @ system, 0.0)
        bound = (residual @ inverse * residual).sum(1).abs()
        remaining = error - ((right + residual) * found).sum(1)
        # False for NaN.
        is_solved = bound <= EXCESS * (remaining - bound)
        if bool(is_solved.all()):
            break
    return found, is_solved


def _steps(rough: Tensor, preconditioner: Tensor, right: Tensor, mask: Tensor, error: Tensor) -> Tensor:
    """Step in float32 until every row's bound is half of what it may be, or no more steps are left."""
    size = right.abs().amax(1, keepdim=True)
    # Rows of zeros stay zero.
    size = torch.where(size > 0, size, 1.0)
    found = torch.zeros(right.shape, dtype=torch.float32, device=right.device)
    rows = torch.arange(len(right), device=right.device)
    keep, residual = mask.float(), (right / size).float()
    remaining = (error.unsqueeze(1) / size.square()).float()
    solution, direction, last = torch.zeros_like(residual), torch.zeros_like(residual), torch.ones_like(remaining)
    for _ in range(_STEPS):
        preconditioned = (residual @ preconditioner).mul_(keep)
        bound = (residual * preconditioned).sum(1, keepdim=True)
        is_open = bound > EXCESS / 2 * remaining
        number = int(is_open.sum())
        if number == 0:
            break
        if number <= _FEWER * len(rows):
            found[rows] = solution
            left = is_open.squeeze(1)
            rows, keep, residual, remaining = rows[left], keep[left], residual[left], remaining[left]
            solution, direction, last = solution[left], direction[left], last[left]
            preconditioned, bound, is_open = preconditioned[left], bound[left], is_open[left]
        direction = direction.mul_(torch.where(last > 0, bound / last, 0.0)).add_(preconditioned)
        product = (direction @ rough).mul_(keep)
        curvature = (direction * product).sum(1, keepdim=True)
        # A row that is finished stays as it is, so that it does not matter which others it is solved with.
        length = torch.where(is_open & (curvature > 0), bound / curvature, 0.0)
        solution.addcmul_(length, direction)
        residual.addcmul_(length, product, value=-1)
        remaining, last = remaining - length * bound, bound
    found[rows] = solution
    return found.double() * size
