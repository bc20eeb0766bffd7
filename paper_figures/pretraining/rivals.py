"""Two rivals of transposable masks, which prune a one-sided mask once more for the product of the backward pass.

SLoPe (Mozaffari et al. 2024, arXiv 2405.16325): a random mask of the forward product that never changes. Its adapters,
of the last percent of the steps, are left out. Bi-Mask (Zhang et al. 2023, arXiv 2302.06058): a mask by magnitude, and
for the backward product that order of the outputs, of some random ones, which leaves most of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import masksolve as ms

# Bi-Mask's: orders that are tried, steps that the best of them is kept for, and the pull of pruned weights to zero.
ORDERS, KEPT_FOR, DECAY = 100, 100, 2e-4


class _Product(torch.autograd.Function):
    """x · (F∘W)ᵀ, whose gradient of x is g · (B∘W) and of W gᵀ · x, plus a decay where F prunes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, forward: Tensor, backward: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(x, weight, forward, backward)
        ctx.decay = decay
        return x @ (weight * forward).t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, forward, backward = ctx.saved_tensors
        of_weight = g.flatten(0, -2).t() @ x.flatten(0, -2) + ctx.decay * (weight * ~forward)
        return g @ (weight * backward), of_weight, None, None, None


class DoublyMasked(nn.Linear):
    """A Linear with a mask for the forward product, and one of fewer entries for the backward one.

    Attributes
    ----------
    forward_mask, backward_mask : Tensor of bool, shape (out, in)
        N of every M inputs of an output; of these, at most N of every M outputs of an input.
    """

    def __init__(self, linear: nn.Linear, pattern: ms.Pattern, *, is_random: bool, rng: np.random.Generator) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.load_state_dict(linear.state_dict())
        self._pattern, self._is_random, self._rng = pattern, is_random, rng
        self._order = np.arange(self.out_features)
        self._decay = 0.0 if is_random else DECAY
        scores = rng.random(self.weight.shape) if is_random else None
        self._forward_to(self._best_rows(scores))
        self.renew(0)

    def renew(self, step: int) -> None:
        """Find the masks of the weights as they are now; that of the forward product only if it is not a random one."""
        if not self._is_random:
            self._forward_to(self._best_rows(None))
            if step % KEPT_FOR == 0:
                orders = [self._rng.permutation(self.out_features) for _ in range(ORDERS)]
                self._order = max(orders, key=lambda order: int(self._backward(order).sum()))
        self.backward_mask = torch.from_numpy(self._backward(self._order))

    def _best_rows(self, scores: np.ndarray | None) -> np.ndarray:
        scores = self.weight.detach().numpy() if scores is None else scores
        return ms.solve_matrix(scores, self._pattern.n, self._pattern.m, direction="rows")

    def _forward_to(self, mask: np.ndarray) -> None:
        self.forward_mask = torch.from_numpy(mask)

    def _backward(self, order: np.ndarray) -> np.ndarray:
        """Prune once more, along the outputs in some order."""
        kept = self.forward_mask.numpy()[order]
        scores = np.abs(self.weight.detach().numpy()[order]) * kept
        n, m = self._pattern.n, self._pattern.m
        mask = np.empty_like(kept)
        mask[order] = ms.solve_matrix(scores, n, m, direction="columns", saturated=False) & kept
        return mask

    def forward(self, x: Tensor) -> Tensor:
        """Multiply; the layer's input has any leading axes."""
        product = _Product.apply(x, self.weight, self.forward_mask, self.backward_mask, self._decay)
        return product if self.bias is None else product + self.bias
