"""The bridge to torch.nn.utils.prune: a transposable mask as one of its prunings."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from masksolve._pattern import Pattern, as_pattern
from masksolve.torch._layers import layout_of
from masksolve.torch._solver.solve import MaskFunction, Recipe, solve_masks
from masksolve.torch._training.masking import masked_parameter


def transposable(
    module: nn.Module,
    name: str,
    pattern: str | Pattern,
    *,
    method: str | MaskFunction = "exact",
    saturated: bool = True,
    importance_scores: Tensor | None = None,
) -> nn.Module:
    """Prune a parameter with `torch.nn.utils.prune.custom_from_mask` and its best transposable N:M mask.

    Parameters
    ----------
    module : nn.Module
    name : str
        The parameter's name in the module, of two or more dimensions. A convolution is masked at each kernel position.
    pattern : str or Pattern
        N **kept** of every M, such as "4:8".
    method, saturated
        As for `Sparsifier`.
    importance_scores : Tensor, optional
        What to keep most of instead of abs(weight), shaped like it, not negative.

    Returns
    -------
    module : nn.Module
        The same, with NAME_orig and NAME_mask in place of NAME; `torch.nn.utils.prune.remove` makes it permanent.

    Raises
    ------
    ValueError, TypeError
        For a name that is no parameter, one that is masked, parametrized or on the meta device, scores of another shape
        or below zero, NaN weights and whatever `solve_matrix` refuses.

    Examples
    --------
    >>> import torch
    >>> layer = transposable(torch.nn.Linear(8, 8), "weight", "2:8")
    >>> int(layer.weight_mask.sum())
    16
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{type(module).__name__} has no parameter {name!r}")
    if parametrize.is_parametrized(module, name):
        raise ValueError(f"parameter {name!r} is parametrized; remove the parametrization before pruning")
    if masked_parameter(module, name) is not None:
        raise ValueError(f"parameter {name!r} is masked by a Sparsifier; finalize it before pruning")
    if weight.is_meta:
        raise ValueError(f"parameter {name!r} is on the meta device and has no values; materialise the module first")
    scores = weight if importance_scores is None else importance_scores
    if scores.shape != weight.shape:
        raise ValueError(
            f"importance_scores have shape {tuple(scores.shape)}; parameter {name!r} needs {tuple(weight.shape)}"
        )
    if importance_scores is not None and bool((scores < 0).any()):
        raise ValueError(f"importance_scores of parameter {name!r} hold negative ones; pass their absolute values")
    layout = layout_of(module, name)
    found = solve_masks(
        layout.matrices(scores.detach()), Recipe(pattern=as_pattern(pattern), method=method, saturated=saturated)
    )
    prune.custom_from_mask(module, name, layout.weight(found.masks))
    return module
