"""solve_block, solve_blocks, solve_matrix: check the input, choose the method, hand on."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from masksolve._errors import UnusableWeightError
from masksolve._floating_point import IeeeArithmetic
from masksolve._inputs import (
    as_array,
    as_weights,
    check_direction,
    check_flag,
    check_threads,
    check_values,
    potentials_dtype,
)
from masksolve._methods import load_method
from masksolve._pattern import Pattern
from masksolve._tiles import grids, potentials_shape, regions, tile_grids

# Smaller tiles are solved from nothing as soon as potentials to start from are read.
_LARGEST_COLD = 4


def solve_block(
    weights: ArrayLike,
    n: int,
    m: int,
    *,
    method: str = "exact",
    saturated: bool = True,
    **options: Any,
) -> NDArray[np.bool_]:
    """Return the transposable n:m mask of one m x m block that keeps the largest sum of abs(weights).

    Parameters
    ----------
    weights : array_like, shape (m, m)
        Real weights, or any importance score that is not negative; any float or integer dtype, any strides.
    n, m : int
        The pattern: n entries are **kept** of every m, in every row and every column (1:4 keeps 1 and zeroes 3).
    method : str
        One of `available_methods()`. "exact" (the default), "flow", "lp" and "enumerate" find the optimum.
    saturated : bool
        True: exactly n ones in every row and column. False: at most n, which can keep more.
    **options
        "greedy" takes complete=True, to fill lines that it leaves short of n; "lp" takes backend="highs" or "pulp".

    Returns
    -------
    mask : ndarray of bool, shape (m, m)
        True = kept, in the memory order of the weights. Where several masks are optimal, the same call always returns
        the same one; the same block in a batch, or in another memory layout, may get another.

    Raises
    ------
    TypeError
        For a dtype that is not real, a masked array, an n or m that is not an integer, or an option that the method
        does not have.
    ValueError
        For a wrong shape, NaN or infinite weights, a pattern out of range or an unknown method.
    MethodNotInstalledError
        If the method's library is missing; the message names the extra to install.

    References
    ----------
    Hubara et al., NeurIPS 2021, arXiv 2102.08124.

    Examples
    --------
    >>> solve_block([[9, 1, 1, 8], [2, 9, 8, 1], [1, 8, 9, 2], [8, 2, 1, 9]], 2, 4).astype(int)
    array([[1, 0, 0, 1],
           [0, 1, 1, 0],
           [0, 1, 1, 0],
           [1, 0, 0, 1]])
    """
    pattern = Pattern(n, m)
    array = as_weights(weights, ndim=2)
    _check_block(array, pattern)
    return _solve(array, pattern, method, saturated, "both", 1, options)


def solve_blocks(
    blocks: ArrayLike,
    n: int,
    m: int,
    *,
    method: str = "exact",
    saturated: bool = True,
    threads: int | None = None,
    **options: Any,
) -> NDArray[np.bool_]:
    """Return the best transposable n:m mask of every m x m block of a batch.

    Parameters
    ----------
    blocks : array_like, shape (B, m, m)
    n, m, method, saturated, **options
        As for `solve_block`.
    threads : int, optional
        Threads to use; None takes every core that this process may use. The result does not depend on it.

    Returns
    -------
    masks : ndarray of bool, shape (B, m, m)
        In the memory order of the blocks.

    Raises
    ------
    TypeError, ValueError, MethodNotInstalledError
        As for `solve_block`.

    Examples
    --------
    >>> solve_blocks([[[3, 1], [1, 2]], [[1, 2], [4, 1]]], 1, 2).astype(int)
    array([[[1, 0],
            [0, 1]],
    <BLANKLINE>
           [[0, 1],
            [1, 0]]])
    """
    pattern = Pattern(n, m)
    array = as_weights(blocks, ndim=3)
    _check_block(array, pattern)
    return _solve(array, pattern, method, saturated, "both", threads, options)


@overload
def solve_matrix(
    weights: ArrayLike,
    n: int,
    m: int,
    *,
    method: str = ...,
    saturated: bool = ...,
    direction: str = ...,
    threads: int | None = ...,
    potentials: NDArray[np.floating[Any]] | None = ...,
    return_potentials: Literal[False] = ...,
    **options: Any,
) -> NDArray[np.bool_]: ...


@overload
def solve_matrix(
    weights: ArrayLike,
    n: int,
    m: int,
    *,
    method: str = ...,
    saturated: bool = ...,
    direction: str = ...,
    threads: int | None = ...,
    potentials: NDArray[np.floating[Any]] | None = ...,
    return_potentials: Literal[True],
    **options: Any,
) -> tuple[NDArray[np.bool_], NDArray[np.floating[Any]]]: ...


def solve_matrix(
    weights: ArrayLike,
    n: int,
    m: int,
    *,
    method: str = "exact",
    saturated: bool = True,
    direction: str = "both",
    threads: int | None = None,
    potentials: NDArray[np.floating[Any]] | None = None,
    return_potentials: bool = False,
    **options: Any,
) -> NDArray[np.bool_] | tuple[NDArray[np.bool_], NDArray[np.floating[Any]]]:
    """Return the n:m mask of a matrix, or a stack of them, that keeps the largest sum of abs(weights).

    The matrix is cut into m x m tiles from its top left corner. At a ragged edge, where a group has fewer than m
    entries, at most n of them are kept.

    Parameters
    ----------
    weights : array_like, shape (..., R, C)
        Any R, C >= 1. Any strides; nothing is copied whole, and Fortran's order is as fast as C's.
    n, m, method, saturated, **options
        As for `solve_block`.
    direction : {"both", "rows", "columns"}
        "both": transposable. "rows": one-sided, n of every m consecutive entries of a row. "columns": of a column.
    threads : int, optional
        Threads to use; None takes every core that this process may use. The mask does not depend on it.
    potentials : ndarray of float, shape (..., R // m, C // m, m), optional
        A warm start: the column potentials that an earlier call returned, for weights that have moved a little
        since. They make method "exact" faster, and never change how much is kept. For direction "both".
    return_potentials : bool
        Also return the column potentials found, in units of the weights, for the next call. For the same.

    Returns
    -------
    mask : ndarray of bool, shape (..., R, C)
        In the memory order of the weights, as NumPy's ``order="K"``.
    potentials : ndarray of float32 or float64, shape (..., R // m, C // m, m)
        Only with `return_potentials=True`. They bound what any mask keeps, by the weak duality that `certify` states:
        tightly, up to their rounding, but less so in tiles whose weights tie.

    Raises
    ------
    TypeError, ValueError, MethodNotInstalledError
        As for `solve_block`.

    Examples
    --------
    >>> solve_matrix([[5, 1, 7], [1, 4, 9]], 1, 2).astype(int)
    array([[1, 0, 0],
           [0, 1, 1]])
    >>> solve_matrix([[5, 1, 7], [6, 4, 9]], 1, 2, direction="rows").astype(int)
    array([[1, 0, 1],
           [1, 0, 1]])
    """
    pattern = Pattern(n, m)
    array = as_weights(weights)
    check_flag(return_potentials, "return_potentials")
    found, warm = None, False
    if potentials is not None or return_potentials:
        start = _checked_potentials(array, pattern, method, direction, potentials)
        warm = start is not None and pattern.m > _LARGEST_COLD
        if warm or return_potentials:
            found = np.zeros(potentials_shape(array.shape, pattern.m), potentials_dtype(array.dtype))
        if start is not None and found is not None and warm:
            largest = np.finfo(found.dtype).max
            np.clip(start, -largest, largest, out=found)
    mask = _solve(array, pattern, method, saturated, direction, threads, options, found, warm)
    if not return_potentials or found is None:
        return mask
    # Those of weights near the end of a float may lie beyond it. NumPy takes long to change what need not be.
    return mask, found if np.isfinite(found).all() else np.nan_to_num(found, copy=False)


def _solve(
    weights: NDArray[Any],
    pattern: Pattern,
    method: str,
    saturated: bool,
    direction: str,
    threads: int | None,
    options: dict[str, Any],
    potentials: NDArray[Any] | None = None,
    warm: bool = False,
) -> NDArray[np.bool_]:
    solve = load_method(method, options.keys())
    checked_direction = check_direction(direction)
    check_threads(threads)
    check_flag(saturated, "saturated")
    if pattern.zeros == 0 or pattern.kept == 0:
        check_values(weights)
        return np.full_like(weights, pattern.zeros == 0, np.bool_)
    # Small calls are made in loops, and `empty_like` takes longer.
    in_order = weights.flags.c_contiguous
    mask = np.empty(weights.shape, np.bool_) if in_order else np.empty_like(weights, np.bool_)
    try:
        with IeeeArithmetic():
            for region in regions(weights.shape[-2], weights.shape[-1], pattern, checked_direction, saturated):
                parts = zip(tile_grids(weights, region), tile_grids(mask, region), strict=True)
                if potentials is not None and region.tile_shape == (pattern.m, pattern.m):
                    for (tiles, masks), found in zip(parts, grids(potentials, inner=1), strict=True):
                        solve(tiles, masks, region.margins, threads=threads, potentials=found, warm=warm)
                else:
                    for tiles, masks in parts:
                        solve(tiles, masks, region.margins, threads=threads, **options)
    except UnusableWeightError:
        check_values(weights)
        raise
    return mask


def _checked_potentials(
    weights: NDArray[Any], pattern: Pattern, method: str, direction: str, given: NDArray[Any] | None
) -> NDArray[np.floating[Any]] | None:
    """Return the potentials to start from, if any are given; refuse them where there are none of the kind."""
    load_method(method, ())
    check_direction(direction)
    if method != "exact" or direction != "both":
        raise ValueError(
            f"method {method!r} with direction {direction!r} has no potentials to start from or to return; "
            "use method 'exact' and direction 'both'"
        )
    if given is None:
        return None
    start, shape = as_array(given, "potentials are"), potentials_shape(weights.shape, pattern.m)
    if start.shape != shape or start.dtype.kind != "f":
        raise ValueError(
            f"potentials have shape {start.shape} and dtype {start.dtype}; weights of shape {weights.shape} need "
            f"floats of shape {shape}, as return_potentials=True gives for {pattern}"
        )
    with np.errstate(all="ignore"):
        # A sum is faster, but may overflow.
        is_finite = np.isfinite(start.sum()) or np.isfinite(start).all()
    if not is_finite:
        raise ValueError("potentials hold NaN or infinities; pass those that an earlier call returned, unchanged")
    return start


def _check_block(blocks: NDArray[Any], pattern: Pattern) -> None:
    if blocks.shape[-2:] != (pattern.m, pattern.m):
        raise ValueError(
            f"weights have shape {blocks.shape}; {pattern} needs blocks of {pattern.m}x{pattern.m}; "
            "solve_matrix cuts a matrix of any shape into blocks"
        )
