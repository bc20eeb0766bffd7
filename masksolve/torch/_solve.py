"""From scores to masks: the one place where tensors reach the solver. It runs on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from masksolve._api import solve_matrix
from masksolve._methods import load_method
from masksolve._pattern import Pattern

# Scores (..., R, C) and a pattern -> a boolean mask of the same shape, on the same device.
MaskFunction = Callable[[Tensor, Pattern], Tensor]


@dataclass(frozen=True)
class Recipe:
    """What masks are asked for: the pattern, the method that finds them, exactly or at most N in a line."""

    pattern: Pattern
    method: str | MaskFunction
    saturated: bool

    def __post_init__(self) -> None:
        if not callable(self.method):
            load_method(self.method, ())


def as_pattern(pattern: str | Pattern) -> Pattern:
    """The pattern, parsed if it is text."""
    return pattern if isinstance(pattern, Pattern) else Pattern.parse(pattern)


@dataclass(frozen=True)
class Solution:
    """The mask found for one parameter, shaped like it, and the share of the importance that it keeps.

    `potentials` are to start the next solve from; None where there are none, or another process has them.
    """

    mask: Tensor
    potentials: Tensor | None
    kept_importance: float


def solve_masks(scores: Tensor, recipe: Recipe, potentials: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The masks of matrices of scores, and the potentials to start the next call from.

    Parameters
    ----------
    scores : Tensor, shape (..., R, C)
        Weights, or any importance that is not negative: float16, bfloat16, float32 or float64, any strides, any device.
    recipe : Recipe
    potentials : Tensor, optional
        What an earlier call for nearly the same scores returned. Those of matrices of other shapes are left aside: the
        parameter may have been sharded since.

    Returns
    -------
    mask : Tensor of bool, shape (..., R, C), on the device of the scores
    potentials : Tensor or None
        None for methods that have none.
    """
    pattern = recipe.pattern
    scores = scores.detach()
    if callable(recipe.method):
        if not bool(torch.isfinite(scores).all()):
            raise ValueError("weights hold NaN or infinities, which have no importance; replace them first")
        return _checked(recipe.method(scores, pattern), scores), None
    # NumPy has no bfloat16; float32 holds it exactly.
    array = (scores.float() if scores.dtype == torch.bfloat16 else scores).cpu().numpy()
    n, m, threads = pattern.n, pattern.m, torch.get_num_threads()
    if recipe.method != "exact":
        mask = solve_matrix(array, n, m, method=recipe.method, saturated=recipe.saturated, threads=threads)
        return torch.from_numpy(mask).to(scores.device), None
    if potentials is not None:
        *lead, rows, columns = scores.shape
        if potentials.shape != (*lead, rows // m, columns // m, m):
            potentials = None
    mask, found = solve_matrix(
        array,
        n,
        m,
        saturated=recipe.saturated,
        threads=threads,
        potentials=None if potentials is None else potentials.cpu().numpy(),
        return_potentials=True,
    )
    return torch.from_numpy(mask).to(scores.device), torch.from_numpy(found)


def _checked(mask: Tensor, scores: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != scores.shape:
        given = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"method returned {given}; it must return a bool tensor of shape {tuple(scores.shape)}")
    return mask.to(scores.device)
