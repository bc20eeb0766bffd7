"""Importance scores by name: those of each weight, and those that are found together with the mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from masksolve.torch._adaprune.admm import admm
from masksolve.torch._adaprune.curvature import Curvature
from masksolve.torch._adaprune.sparsegpt import sparsegpt

Score = Literal["magnitude", "wanda", "ria", "hessian", "sparsegpt", "admm"]
SCORES: tuple[Score, ...] = get_args(Score)


def scores_of(
    score: Score,
    weight: Tensor,
    norms: Tensor,
    curvature: Curvature,
    width: int,
    project: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Return the importance of weights (groups, outputs, inputs).

    Parameters
    ----------
    score : {"magnitude", "wanda", "ria", "hessian", "sparsegpt", "admm"}
        abs(w); abs(w) times the norm of its input (Sun et al. 2023, arXiv 2306.11695); abs(w) as a share of its row's
        sum and of its column's, both added, times the root of the norm (Zhang et al. 2024, "Plug-and-play: an efficient
        post-training pruning method for large language models"); w² / [H⁻¹]_jj, the error that the best repair of all
        other weights leaves (Hassibi and Stork 1993, "Second order derivatives for network pruning: optimal brain
        surgeon"); what `sparsegpt` finds, or `admm`.
    weight : Tensor of float64, shape (groups, outputs, inputs)
    norms : Tensor of float64, shape (groups, inputs)
        The norm of each input over the calibration data.
    curvature : Curvature
        H, damped before it is inverted.
    width : int
        How many inputs a tile has.
    project : callable
        Returns the mask that keeps most of the scores of some inputs, of which it is given the first.
    """
    if score == "magnitude":
        return weight.abs()
    if score == "wanda":
        return weight.abs() * norms.unsqueeze(1)
    if score == "ria":
        shares = [_share(weight.abs(), axis) for axis in (1, 2)]
        return (shares[0] + shares[1]) * norms.unsqueeze(1).sqrt()
    if score == "sparsegpt":
        return sparsegpt(weight, curvature.inverse, width, project)
    if score == "admm":
        return admm(weight, curvature.system, project).square()
    return weight.square() / curvature.inverse.diagonal(dim1=1, dim2=2).unsqueeze(1)


def _share(magnitudes: Tensor, axis: int) -> Tensor:
    total = magnitudes.sum(axis, keepdim=True)
    return magnitudes / torch.where(total > 0, total, 1.0)


def one_step(weight: Tensor, repaired: Tensor, gram: Tensor) -> Tensor:
    """Return each weight moved to its optimum alone: of a pruned one, the value if it alone came back.

    Masks are found again from these values; the repaired weights are optimal already, and stay.
    """
    curvature = gram.diagonal(dim1=1, dim2=2).unsqueeze(1)
    step = ((weight - repaired) @ gram) / torch.where(curvature > 0, curvature, 1.0)
    return repaired + step
