"""From scores to masks: the one place where tensors reach the solvers, that of the CPU and that of other devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from masksolve._check import check_mask
from masksolve._errors import InvalidMaskError
from masksolve._inputs import check_choice, check_direction, check_flag
from masksolve._methods import load_method
from masksolve._pattern import Pattern
from masksolve._solve import solve_matrix
from masksolve._tiles import Direction, potentials_shape
from masksolve.torch._dtensor import as_plain, is_sharded
from masksolve.torch._solver.device import solve_on_device
from masksolve.torch._solver.solution import MaskSolution

# Scores (..., R, C) and a pattern -> a boolean mask of the same shape, on the same device.
MaskFunction = Callable[[Tensor, Pattern], Tensor]
# The name of a parameter and the parameter -> scores of its shape, not negative.
Importance = Callable[[str, nn.Parameter], Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The masks asked for: their pattern, the method that finds them, and whether lines hold exactly N or at most,
    and which lines: those of both directions, or of one.
    """

    pattern: Pattern
    method: str | MaskFunction
    saturated: bool = True
    direction: Direction = "both"

    def __post_init__(self) -> None:
        check_flag(self.saturated, "saturated")
        check_direction(self.direction)
        if not callable(self.method):
            load_method(self.method, ())
        elif self.direction != "both":
            raise ValueError(
                f"direction={self.direction!r} is for the methods of masksolve; a callable method makes masks of any "
                "structure by itself: leave out direction"
            )

    @property
    def tile_shape(self) -> tuple[int, int]:
        """Rows and columns of the smallest part of a matrix that is solved by itself."""
        m = self.pattern.m
        return (1 if self.direction == "rows" else m), (1 if self.direction == "columns" else m)


# Weights of a part that stays in a core's cache.
_CACHED = 1 << 16
# Up to this M, moving potentials in and out takes longer than the rounds that they save ("gain of a warm start" in the
# README).
_COLD_UP_TO = 4


def solve_masks(scores: Tensor, recipe: Recipe, potentials: Tensor | None = None) -> MaskSolution:
    """Find the masks of matrices of scores.

    Exact masks of scores on a GPU, or any other device, are found there.

    Parameters
    ----------
    scores : Tensor, shape (..., R, C)
        Weights, or any importance that is not negative: float16, bfloat16, float32 or float64, any strides, any device.
    recipe : Recipe
    potentials : Tensor, optional
        Those of an earlier call for nearly the same scores, on any device. Those of matrices of other shapes are
        ignored: the parameter may have been sharded since.

    Returns
    -------
    MaskSolution
        Without potentials for methods that have none, and for tiles so small that they start cold.
    """
    pattern = recipe.pattern
    scores = scores.detach()
    if callable(recipe.method):
        if not bool(torch.isfinite(scores).all()):
            raise ValueError("weights hold NaN or infinities, which have no importance; replace them first")
        return MaskSolution(masks=_checked(recipe.method(scores, pattern), scores))
    if potentials is not None and potentials.shape != potentials_shape(scores.shape, pattern.m):
        potentials = None
    if recipe.method == "exact" and _is_solved_where_it_lies(scores):
        return solve_on_device(
            scores, pattern, saturated=recipe.saturated, direction=recipe.direction, potentials=potentials
        )
    # NumPy has no bfloat16; float32 holds it exactly.
    array = (scores.float() if scores.dtype == torch.bfloat16 else scores).cpu().numpy()
    n, m, threads = pattern.n, pattern.m, torch.get_num_threads()
    if recipe.method != "exact" or recipe.direction != "both" or m <= _COLD_UP_TO:
        mask = solve_matrix(
            array,
            n,
            m,
            method=recipe.method,
            saturated=recipe.saturated,
            direction=recipe.direction,
            threads=threads,
        )
        return MaskSolution(masks=torch.from_numpy(mask).to(scores.device))
    mask, found = solve_matrix(
        array,
        n,
        m,
        saturated=recipe.saturated,
        threads=threads,
        potentials=None if potentials is None else potentials.cpu().numpy(),
        return_potentials=True,
    )
    return MaskSolution(masks=torch.from_numpy(mask), potentials=torch.from_numpy(found))


def check_importance(importance: object, names: Sequence[str]) -> None:
    """Check that an importance that is not a callable is one of the names."""
    if not isinstance(importance, str):
        raise TypeError(
            f"importance must be one of {', '.join(map(repr, names))}, or a callable of a name and a Parameter, got "
            f"{importance!r}"
        )
    check_choice(importance, "importance", names)


def checked_scores(scores: Tensor, name: str, parameter: nn.Parameter) -> Tensor:
    """Return what a callable importance has returned for a parameter, if it can be."""
    is_tensor = isinstance(scores, Tensor) and not scores.is_meta
    if not is_tensor or scores.shape != parameter.shape or not scores.is_floating_point():
        given = described(scores)
        raise ValueError(
            f"importance returned {given} for parameter {name!r}; return floats of shape {tuple(parameter.shape)}"
        )
    if bool(as_plain((scores < 0).any())):
        raise ValueError(f"importance returned negative scores for parameter {name!r}; return their absolute values")
    return scores.detach()


def kept_importance(scores: Tensor, mask: Tensor) -> float:
    """Return the share of the importance that a mask keeps; shards of both may lie anywhere."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    total = kept = torch.zeros((), dtype=dtype, device=scores.device)
    for part, ones in _parts(scores, mask):
        importance = part.to(dtype).abs()
        total = total + as_plain(importance.sum())
        kept = kept + as_plain((importance * ones).sum())
    return float(kept / total) if total > 0 else 1.0


def mask_fault(masks: Tensor, recipe: Recipe) -> str | None:
    """Say why masks (..., R, C) cannot be of a recipe; return None if they can, as any can be of a callable's."""
    if callable(recipe.method):
        return None
    pattern = recipe.pattern
    saturated = recipe.saturated and recipe.method == "exact"
    try:
        array = masks.bool().cpu().numpy()
        check_mask(array, pattern.n, pattern.m, saturated=saturated, direction=recipe.direction)
    except InvalidMaskError as error:
        return str(error)
    return None


def described(given: object) -> str:
    """Describe in words what was given in place of a tensor that will do."""
    if not isinstance(given, Tensor):
        return "None" if given is None else f"a {type(given).__name__}"
    return f"{given.dtype} of shape {tuple(given.shape)}{' on the meta device' if given.is_meta else ''}"


def _is_solved_where_it_lies(scores: Tensor) -> bool:
    return scores.device.type != "cpu"


def _checked(mask: Tensor, scores: Tensor) -> Tensor:
    is_tensor = isinstance(mask, Tensor) and not mask.is_meta
    if not is_tensor or mask.dtype != torch.bool or mask.shape != scores.shape:
        raise ValueError(
            f"method returned {described(mask)}; it must return a bool tensor of shape {tuple(scores.shape)}"
        )
    return mask.to(scores.device)


def _parts(scores: Tensor, mask: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Split scores and mask into parts that stay in a CPU's cache, which takes a third of the time."""
    if is_sharded(scores) or scores.device.type != "cpu":
        return [(scores, mask)]
    rows = max(1, _CACHED // scores[0].numel())
    return zip(scores.split(rows), mask.split(rows), strict=True)
