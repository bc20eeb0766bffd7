"""Hysteresis: a tile changes its mask only for one that keeps clearly more; changes late in training cost accuracy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from masksolve.torch._solver.solve import Recipe


def steady(scores: Tensor, new: Tensor, old: Tensor, recipe: Recipe, share: float) -> Tensor:
    """Return the new masks where they keep more than 1 + share times what the old ones keep, else the old ones.

    Each tile has one of the two whole. An old mask that is not of the recipe, as after a change of N, goes.

    Parameters
    ----------
    scores : Tensor, shape (..., R, C)
        The new masks are the best for their absolute values.
    new, old : Tensor of bool, of the same shape
    recipe : Recipe
    share : float
    """
    height, width = recipe.tile_shape
    rows, columns = scores.shape[-2:]
    fill = 0, -columns % width, 0, -rows % height

    def tiles(values: Tensor) -> Tensor:
        found: Tensor = functional.pad(values, fill).unflatten(-1, (-1, width)).unflatten(-3, (-1, height))
        return found

    # float64: sums of float16 would overflow, and masks of equal importance must not differ by rounding.
    importance, ones, of_new = (
        tiles(each) for each in (scores.double().abs(), old.to(torch.uint8), new.to(torch.uint8))
    )
    kept = (importance * ones).sum((-3, -1))
    gains = (importance * of_new).sum((-3, -1)) > (1 + share) * kept
    most, most_of_new = (torch.maximum(each.sum(-1).amax(-2), each.sum(-3).amax(-1)) for each in (ones, of_new))
    # N was another one: larger, or smaller everywhere.
    unfit = (most > recipe.pattern.n) | (most.max() < most_of_new.max())
    # Masks of other methods may leave places free.
    if recipe.saturated and recipe.method == "exact":
        unfit |= ones.sum((-3, -1)) < of_new.sum((-3, -1))
    changes = (gains | unfit).repeat_interleave(height, -2).repeat_interleave(width, -1)
    return torch.where(changes[..., :rows, :columns], new, old)
