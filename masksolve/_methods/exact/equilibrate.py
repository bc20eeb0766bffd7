"""The exact solver of many tiles at once: equilibration of row and column potentials, one tile in each vector lane.

Given column potentials v, each row prefers the N entries with the largest c - v. Where that puts exactly N into
every column, and in every row the N-th and the (N+1)-th largest differ, the mask is proven to be the only optimum
(DESIGN, "Duality"): rounding is monotone, so a strict order after rounding is one before. The potentials are found
by moving every line's, in turn, to the middle between its N-th and its (N+1)-th largest reduced entry, a bit too
far, and again. No sorting, no branches.

"At most N" is the same with potentials that are not negative, where lines with a potential of zero need not be
full. It is first solved as "exactly N": with t the least column potential, u + t and v - t prove that mask too if
no u + t is negative. Only the other tiles are equilibrated under the clamp.

Tiles go through passes. A group of lanes takes as many rounds as its slowest tile; so in haste, the few that are not
certified when most are, are left to a pass of their own. Tiles that more rounds do not certify go on in float64.
Most of them tie: several masks are optimal, and no order is strict. So they are perturbed, c' = c + p, which makes
the optimum x of c' unique. Let r be the reduced costs of c, without p, by the potentials found for c', and `wrong` the
sum of those that are on the wrong side: below zero in x, above zero outside. No mask y of c beats x by more than
`wrong` (weak duality). So x is optimal for c if

(a) `wrong` is less than the largest power of two that divides all weights, and with them every difference of masks; or
(b) only zeros are on the wrong side, and every other weight lies on the right side by more than `wrong`: a mask y that
    differs from x in more than zeros loses more than it can gain.

Otherwise the perturbation is made smaller, and again. Where zeros abound, "exactly N" is first solved as "at most
N", in which zeros do not tie, and filled up with zeros: nothing is worth more.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from masksolve._errors import UnusableWeightError
from masksolve._methods.exact.inner_loops import program
from masksolve._methods.exact.lanes import Tiles
from masksolve._methods.exact.layout import Vectors, is_large_enough, new_memory, vectors_in
from masksolve._methods.exact.perturbed import equilibrate_perturbed
from masksolve._methods.exact.strict import equilibrate_strict
from masksolve._tiles import Margins


def equilibrate_tiles(
    tiles: NDArray[Any],
    masks: NDArray[np.bool_],
    margins: Margins,
    potentials: NDArray[Any] | None,
    warm: bool,
) -> Tiles | None:
    """Fill masks (P, Q, m, m) with optimal masks of tiles (P, Q, m, m); return the tiles left, or None.

    Tiles are of float32 or float64, the entries of each row one after the other. `potentials` (P * Q, m), of the same
    dtype, is filled with column potentials; where `warm`, it holds those to start from.

    Raises
    ------
    UnusableWeightError
        If a weight is not finite.
    """
    down, across, m, _ = tiles.shape
    n, itemsize, at_most = margins.kept, tiles.itemsize, not margins.exact_rows
    nothing = _NO_POTENTIALS[itemsize]
    found = nothing if potentials is None else potentials
    strides = (tiles.strides[0] // itemsize, tiles.strides[1] // itemsize, tiles.strides[2] // itemsize)
    grid = (_address(tiles), *strides, _address(masks), *masks.strides[:3], across)
    plan, count = _plan(m), down * across
    left, start, stages = np.empty((2, count), np.int64), np.empty((2, count, m), tiles.dtype), np.empty(count, np.int8)
    count = equilibrate_strict(
        program(n, m, itemsize, itemsize),
        grid,
        _all_tiles(down, across),
        found if warm else nothing,
        *_vectors_of(m, itemsize),
        plan.rounds,
        plan.relaxations,
        found,
        left,
        start,
        stages,
        at_most,
    )
    if count < 0:
        raise UnusableWeightError
    if count > 0:
        narrow, start = start, np.empty((2, count, m))
        start[0] = narrow[0, :count]
        count = equilibrate_perturbed(
            program(n, m, 8, itemsize),
            grid,
            *_vectors_of(m, 8),
            plan.more_rounds,
            plan.more_relaxation,
            _address(plan.shares),
            found,
            left,
            start,
            stages,
            count,
            at_most,
        )
    return Tiles(left[0, :count], start[0, :count], stages[:count]) if count > 0 else None


class _Memory(threading.local):
    def __init__(self) -> None:
        self.block = np.zeros(0, np.int8)
        self.vectors: dict[tuple[int, int], Vectors] = {}


# Vectors are used within one call of a kernel, which runs no Python: nothing can come between.
_memory = _Memory()


def _vectors_of(m: int, itemsize: int) -> Vectors:
    """The vectors of the thread that asks, kept for its next call; nothing is read of what they hold.

    All lie in one block of memory, that of the largest tiles so far.
    """
    vectors = _memory.vectors.get((m, itemsize))
    if vectors is None:
        if not is_large_enough(_memory.block, m, itemsize):
            _memory.block = new_memory(m, itemsize)
            _memory.vectors.clear()
        vectors = _memory.vectors[m, itemsize] = vectors_in(_memory.block, m, itemsize)
    return vectors


@functools.lru_cache(maxsize=8)
def _all_tiles(down: int, across: int) -> NDArray[np.int64]:
    """Tile row * 2**32 + tile column of every tile of a grid."""
    return (np.arange(down)[:, np.newaxis] << 32 | np.arange(across)).ravel()


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


_NO_POTENTIALS: dict[int, NDArray[Any]] = {4: np.empty((0, 1), np.float32), 8: np.empty((0, 1), np.float64)}


@dataclass(frozen=True)
class _Plan:
    """How tiles are equilibrated; see the parameters of `equilibrate_strict` and `equilibrate_perturbed`."""

    rounds: tuple[int, int, int, int]
    relaxations: tuple[float, float, float, float]
    more_rounds: tuple[int, int, int]
    more_relaxation: float
    shares: NDArray[np.float64]


@functools.cache
def _plan(m: int) -> _Plan:
    # Measured on Gaussian tiles: larger ones need more rounds, and to go further beyond the middle, at first less so.
    if m <= 4:
        numbers = (2, 8, 2, 2), (1.1, 0.02, 1.2, 1.4), (3, 40, 2), 1.4
    elif m <= 8:
        numbers = (4, 12, 3, 2), (1.2, 0.02, 1.4, 1.45), (4, 60, 2), 1.4
    elif m <= 16:
        numbers = (6, 20, 5, 4), (1.2, 0.07, 1.4, 1.5), (6, 80, 3), 1.4
    elif m <= 32:
        numbers = (10, 32, 8, 6), (1.3, 0.04, 1.55, 1.6), (8, 120, 4), 1.65
    else:
        numbers = (15, 56, 14, 8), (1.2, 0.07, 1.7, 1.6), (16, 160, 5), 1.6
    # Any fixed numbers without a pattern will do.
    return _Plan(*numbers, shares=0.25 + 0.749 * np.random.default_rng(7).random(m * m))
