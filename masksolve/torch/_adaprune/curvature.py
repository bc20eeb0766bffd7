"""The curvature of a layer's error: H = X Xᵀ of its inputs, and what masks and repairs ask of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Curvature:
    """H of inputs that one or more weights multiply, and its damping.

    Scores need the inverse and so do repairs, so it is found once for all weights that share their inputs.

    Attributes
    ----------
    gram : Tensor of float64, shape (groups, inputs, inputs)
        H; about the mean where a bias takes up the mean.
    damping : float
        What `system` adds to the diagonal, as a share of its mean.
    """

    gram: Tensor
    damping: float

    @property
    def amounts(self) -> Tensor:
        """What `system` adds to each diagonal: `damping` times its mean entry (1 where all inputs are zero)."""
        mean = self.gram.diagonal(dim1=1, dim2=2).mean(1)
        return self.damping * torch.where(mean > 0, mean, 1.0)

    @property
    def system(self) -> Tensor:
        """H, damped."""
        found = self.gram.clone()
        found.diagonal(dim1=1, dim2=2).add_(self.amounts.unsqueeze(1))
        return found

    @cached_property
    def inverse(self) -> Tensor:
        """The inverse of the damped H.

        Raises
        ------
        torch.linalg.LinAlgError
            If it is not positive definite in float64.
        """
        return torch.cholesky_inverse(torch.linalg.cholesky(self.system))
