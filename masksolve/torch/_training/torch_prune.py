"""The bridge to torch.nn.utils.prune: an N:M mask as one of its prunings."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from masksolve._inputs import check_choice, check_direction
from masksolve._pattern import PatternLike, as_pattern
from masksolve._tiles import Direction
from masksolve.torch._layers import check_module, layout_of
from masksolve.torch._solver.solve import MaskFunction, Recipe, solve_masks
from masksolve.torch._training.masking import masked_parameter


def semi_structured(
    module: nn.Module,
    name: str,
    pattern: PatternLike,
    *,
    direction: Direction = "both",
    importance: Literal["magnitude"] | Tensor = "magnitude",
    method: str | MaskFunction = "exact",
    saturated: bool = True,
) -> nn.Module:
    """Prune a parameter with `torch.nn.utils.prune.custom_from_mask` and its best N:M mask.

    Parameters
    ----------
    module : nn.Module
    name : str
        The parameter's name in the module, of two or more dimensions. A convolution is masked at each kernel position.
    pattern : str, (int, int) or Pattern
        N **kept** of every M, such as "4:8" or (4, 8).
    direction, method, saturated
        As for `Sparsifier`.
    importance : {"magnitude"} or Tensor
        What to keep most of: abs(weight), or scores of its shape, not negative.

    Returns
    -------
    module : nn.Module
        The same, with NAME_orig and NAME_mask in place of NAME; `torch.nn.utils.prune.remove` makes it permanent.

    Raises
    ------
    ValueError, TypeError
        For a name that is not a parameter, one that is masked, parametrized or on the meta device, scores of another
        shape or below zero, NaN weights and whatever `solve_matrix` refuses.

    Examples
    --------
    >>> import torch
    >>> layer = semi_structured(torch.nn.Linear(8, 8), "weight", "2:8")
    >>> int(layer.weight_mask.sum())
    16
    """
    check_module(module, "module")
    if parametrize.is_parametrized(module, name):
        raise ValueError(f"parameter {name!r} is parametrized; remove the parametrization before pruning")
    if masked_parameter(module, name) is not None:
        raise ValueError(f"parameter {name!r} is masked by a Sparsifier; finalize it before pruning")
    # One that is pruned already is a parameter by another name.
    is_parameter = name in module._parameters or f"{name}_orig" in module._parameters
    weight = getattr(module, name, None) if is_parameter else None
    if not isinstance(weight, Tensor):
        raise ValueError(f"{type(module).__name__} has no parameter {name!r}")
    if weight.is_meta:
        raise ValueError(f"parameter {name!r} is on the meta device and has no values; materialise the module first")
    recipe = Recipe(
        pattern=as_pattern(pattern), method=method, saturated=saturated, direction=check_direction(direction)
    )
    scores = _scores(importance, weight, name)
    layout = layout_of(module, name)
    if weight.ndim > 1:
        layout = layout.for_masks(weight.shape, recipe.pattern.m, recipe.direction)
    found = solve_masks(layout.matrices(scores.detach()), recipe)
    prune.custom_from_mask(module, name, layout.weight(found.masks).to(weight.device))
    return module


def _scores(importance: Literal["magnitude"] | Tensor, weight: Tensor, name: str) -> Tensor:
    if not isinstance(importance, Tensor):
        if not isinstance(importance, str):
            raise TypeError(f"importance must be 'magnitude' or a Tensor of scores, got {importance!r}")
        check_choice(importance, "importance", ("magnitude",))
        return weight
    if importance.is_meta or importance.is_complex() or importance.dtype == torch.bool:
        raise TypeError(
            f"importance is {importance.dtype} on device {importance.device}; parameter {name!r} needs real "
            "scores that have values"
        )
    if importance.shape != weight.shape:
        raise ValueError(
            f"importance has shape {tuple(importance.shape)}; parameter {name!r} needs {tuple(weight.shape)}"
        )
    if bool((importance < 0).any()):
        raise ValueError(f"importance of parameter {name!r} holds negative scores; pass their absolute values")
    return importance
