"""Importance scores by name: magnitude, Wanda's and optimal brain surgeon's."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from masksolve.torch._adaprune.curvature import Curvature

Score = Literal["magnitude", "wanda", "hessian"]
SCORES: tuple[Score, ...] = get_args(Score)


def scores_of(score: Score, weight: Tensor, norms: Tensor, curvature: Curvature) -> Tensor:
    """Return the importance of weights (groups, outputs, inputs).

    Parameters
    ----------
    score : {"magnitude", "wanda", "hessian"}
        abs(w); abs(w) times the norm of its input (Sun et al. 2023, arXiv 2306.11695); w² / [H⁻¹]_jj, the error that
        the best repair of all other weights leaves (Hassibi and Stork 1993, "Second order derivatives for network
        pruning: optimal brain surgeon").
    weight : Tensor of float64, shape (groups, outputs, inputs)
    norms : Tensor of float64, shape (groups, inputs)
        The norm of each input over the calibration data.
    curvature : Curvature
        H, damped before it is inverted.
    """
    if score == "magnitude":
        return weight.abs()
    if score == "wanda":
        return weight.abs() * norms.unsqueeze(1)
    return weight.square() / curvature.inverse.diagonal(dim1=1, dim2=2).unsqueeze(1)


def one_step(weight: Tensor, repaired: Tensor, gram: Tensor) -> Tensor:
    """Return each weight moved to its optimum alone: of a pruned one, the value if it alone came back.

    Masks are found again from these values; the repaired weights are optimal already, and stay.
    """
    curvature = gram.diagonal(dim1=1, dim2=2).unsqueeze(1)
    step = ((weight - repaired) @ gram) / torch.where(curvature > 0, curvature, 1.0)
    return repaired + step
