"""The mask of a layer found together with its weights, by the alternating direction method of multipliers (ADMM).

Meng et al. 2024 ("ALPS", arXiv 2406.07831): W is to reconstruct the dense layer's output, D is to be masked, and both
are to be equal. Their proof that they become so, as rho grows, wants of the step that masks that it keeps at least as
much of the squares as the last mask would; an exact mask does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The authors' settings: rho grows with the share of entries that have come or gone since the last look, and is much too
# large if hardly any have at the first.
_FIRST, _LARGEST, _FALL, _LOOKS = 0.1, 1e6, 5.0, 3
_GROWTHS = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
_STEPS, _ENOUGH, _SETTLED = 300, 30, 3e-4
# Where no rho makes a difference, as for inputs that are not correlated, the first mask is the best.
_SMALLEST = 1e-4
# Least rho for which float32 finds an inverse: the inputs' count over it is the largest condition number.
_FLOAT32 = 1e-2


def admm(weight: Tensor, system: Tensor, project: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return values whose squares are what the mask is to keep most of.

    Parameters
    ----------
    weight : Tensor of float64, shape (groups, outputs, inputs)
    system : Tensor of float64, shape (groups, inputs, inputs)
        H, damped: the error is that of the outputs.
    project : callable
        Returns the mask that keeps most of the scores of all inputs from one on, 0: float32, shaped like the weight.

    Returns
    -------
    Tensor of float64, shaped like the weight
        W in units of the inputs' norms, where a weight's square is what it adds to the error if all else stays.
    """
    norms = system.diagonal(dim1=1, dim2=2).sqrt()
    scaled = weight * norms.unsqueeze(1)
    size = scaled.abs().max()
    if size == 0:
        return scaled
    steps = _Steps((scaled / size).float(), system / norms.unsqueeze(1) / norms.unsqueeze(2), project)
    rho, is_growing, before = _FIRST, False, steps.mask
    for number in range(1, _STEPS + 1):
        steps.step(rho)
        if number % _LOOKS:
            continue
        changed, kept = int((steps.mask != before).sum()), int(steps.mask.sum())
        if number > _ENOUGH and changed < _SETTLED * kept:
            break
        if not is_growing and changed < _GROWTHS[1][0] * kept and rho > _SMALLEST:
            rho /= _FALL
            if changed > 0:
                steps.start()
        elif changed == 0:
            break
        else:
            is_growing = True
            rho = min(_LARGEST, rho * next(growth for share, growth in _GROWTHS if changed >= share * kept))
        before = steps.mask
    return steps.weight.double() * size


class _Steps:
    """The state of the method.

    Attributes
    ----------
    weight : Tensor of float32
        W.
    masked : Tensor of float32
        D.
    prices : Tensor of float32
        V, of W = D.
    mask : Tensor of bool
        That of D.
    """

    def __init__(self, dense: Tensor, system: Tensor, project: Callable[[Tensor, int], Tensor]) -> None:
        self._dense, self._system, self._project = dense, system, project
        self._inverse: tuple[float, Any] = (0.0, None)
        self.start()

    def start(self) -> None:
        """Begin with the dense weight and its mask."""
        self.weight, self.prices = self._dense, torch.zeros_like(self._dense)
        self._mask_of(self._dense)

    def step(self, rho: float) -> None:
        """Move W to the least error, and D to W's mask, as far as the prices of W = D allow."""
        # (H + rho I)⁻¹ (H W₀ - V + rho D), without the sums that H W₀ would round.
        self.weight = self._dense + (rho * (self.masked - self._dense) - self.prices) @ self._inverse_for(rho)
        moved = self.weight + self.prices / rho
        self._mask_of(moved)
        self.prices = rho * (moved - self.masked)

    def _mask_of(self, values: Tensor) -> None:
        self.mask = self._project(values.square(), 0)
        self.masked = torch.where(self.mask, values, 0.0)

    def _inverse_for(self, rho: float) -> Tensor:
        """Return (H + rho I)⁻¹, which three steps share."""
        if self._inverse[0] != rho:
            # Of a unit diagonal: float32 has digits enough, and takes half the time, unless rho is tiny.
            damped = self._system.to(torch.float32 if rho >= _FLOAT32 else torch.float64, copy=True)
            damped.diagonal(dim1=1, dim2=2).add_(rho)
            self._inverse = rho, torch.cholesky_inverse(torch.linalg.cholesky(damped)).float()
        found: Tensor = self._inverse[1]
        return found
