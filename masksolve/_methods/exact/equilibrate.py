"""The exact solver of many tiles at once: equilibration of row and column potentials, one tile in each vector lane.

Given column potentials v, each row prefers the N entries with the largest c - v. Where that puts exactly N into every
column, and in every row the N-th and the (N+1)-th largest differ, the mask is proven to be the only optimum:
docs/proof.md says why, in floating point too. The potentials are found by moving every line's, in turn, to the middle
between its N-th and its (N+1)-th largest reduced entry, a bit too far, and again. No sorting, no branches.

Tiles go through passes. First come all, as "exactly N", in 16-bit integers (`narrow`), and those that are not proven
again, finer, with weights of few bits perturbed, which may tie; then the others in the dtype of the weights (`strict`).
Under "at most N" a mask is optimal too where shifted potentials are not negative; only the other tiles are equilibrated
again, with potentials clamped at zero. Where zeros abound, "exactly N" is solved as "at most N" first, in which zeros
do not tie, and filled up with zeros. Tiles that more rounds do not certify go on in float64 (`perturbed`): most of them
tie, and are perturbed until the optimum is unique. What that does not prove is left to augmenting paths.

Partial tiles are whole ones whose missing entries no line chooses. Where their rows are full and their columns may be
short, or the other way round, the potentials of the latter are clamped in every pass.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from masksolve._errors import UnusableWeightError
from masksolve._machine_code import address_of
from masksolve._methods.exact.inner_loops import narrow_program, program
from masksolve._methods.exact.lanes import AS_AT_MOST, AS_EXACTLY, TIES_EXACTLY, Tiles
from masksolve._methods.exact.layout import Vectors, clamped_on_one_side, is_large_enough, new_memory, vectors_in
from masksolve._methods.exact.narrow import layout as narrow_layout
from masksolve._methods.exact.narrow.passes import (
    Grain,
    Pass,
    solve_as_at_most,
    solve_exactly,
    solve_exactly_again,
)
from masksolve._methods.exact.perturbed import PerturbedRounds, equilibrate_perturbed
from masksolve._methods.exact.strict import Relaxations, Rounds, equilibrate_strict
from masksolve._tiles import Margins
from masksolve._translated import constant, prepared


def equilibrate_tiles(
    tiles: NDArray[Any],
    masks: NDArray[np.bool_],
    shape: tuple[int, int],
    margins: Margins,
    potentials: NDArray[Any] | None,
    warm: bool,
) -> Tiles | None:
    """Fill masks (P, Q, m, m) with optimal masks of tiles (P, Q, m, m); return the tiles that remain, or None.

    Tiles are of float32 or float64, the entries of each row one after the other. `shape` is that of a tile; what
    partial ones lack of m x m has to repeat their entries. `potentials` (P * Q, m), of the same dtype, is filled with
    column potentials; where `warm`, it holds those to start from.

    Raises
    ------
    UnusableWeightError
        If a weight is not finite.
    """
    m, itemsize = tiles.shape[3], tiles.itemsize
    found = _NO_POTENTIALS[itemsize] if potentials is None else potentials
    grid = _grid(tiles, masks, shape)
    if shape == (m, m) and m <= LARGEST_NARROW:
        queue = _NarrowCall(tiles, grid, margins, found, warm).solve()
    else:
        # Partial tiles are few, and of three shapes, each of which would have to be compiled.
        is_free = not (margins.exact_rows or margins.exact_columns)
        stage = AS_AT_MOST if shape != (m, m) and is_free else AS_EXACTLY
        where = _all_tiles(*tiles.shape[:2])
        queue = _Queue(where, found if warm else None, np.full(len(where), stage, np.int8), warm)
    return None if queue is None else _equilibrate_queue(queue, m, tiles.dtype, grid, margins, found)


class FewTiles:
    """A few whole tiles, m <= `LARGEST_NARROW`, to be filled in and solved again and again.

    `tiles` (P, Q, m, m) and `masks` lie in memory as those of a matrix do.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], margins: Margins) -> None:
        down, across, m, _ = shape
        self.tiles, self.masks = (
            np.zeros((down, m, across, m), kind).swapaxes(1, 2) for kind in (dtype, np.dtype(np.bool_))
        )
        self._margins, self._nothing = margins, _NO_POTENTIALS[dtype.itemsize]
        self._grid = _grid(self.tiles, self.masks, (m, m))
        self._narrow = _NarrowCall(self.tiles, self._grid, margins, self._nothing, False)
        self._narrow.prepare()

    def solve(self) -> Tiles | None:
        """Do as `equilibrate_tiles`."""
        queue = self._narrow.solve()
        if queue is None:
            return None
        m, dtype = self.tiles.shape[3], self.tiles.dtype
        return _equilibrate_queue(queue, m, dtype, self._grid, self._margins, self._nothing)


def _grid(tiles: NDArray[Any], masks: NDArray[np.bool_], shape: tuple[int, int]) -> tuple[int, ...]:
    """Return what `Grid` holds, as a plain tuple: Numba takes four times as long over the type of a named one."""
    itemsize, (down, across, row, _) = tiles.itemsize, tiles.strides
    strides = down // itemsize, across // itemsize, row // itemsize
    return (address_of(tiles), *strides, address_of(masks), *masks.strides[:3], tiles.shape[1], *shape)


class _Queue(NamedTuple):
    """Tiles that are not solved yet: where they are, column potentials to start from or None, and their stages.

    `tried` says whether the potentials are nearly optimal.
    """

    where: NDArray[np.int64]
    potentials: NDArray[Any] | None
    stages: NDArray[np.int8]
    tried: bool


class _NarrowCall:
    """The passes in 16-bit integers over whole tiles (P, Q, m, m)."""

    def __init__(
        self, tiles: NDArray[Any], grid: tuple[int, ...], margins: Margins, found: NDArray[Any], warm: bool
    ) -> None:
        down, across, m, _ = tiles.shape
        n, itemsize, schedule, memory = margins.kept, tiles.itemsize, _schedule(m), _narrow_memory(m)
        start = found if warm else _NO_POTENTIALS[itemsize]
        (self._where, self._columns, _), queue = _narrow_queue(down * across, m)
        self._n, self._m, self._itemsize, self._schedule, self._warm = n, m, itemsize, schedule, warm
        self._count, self._at_most = down * across, not margins.exact_rows
        self._rest = schedule.given_shares, found, *queue
        self._given = grid, start, memory
        self._program = _narrow_program(n, m, False, itemsize)
        passes = schedule.warm_passes if warm else schedule.passes
        tiles_given = _all_tiles_given(down, across)
        self._arguments = self._program, n, grid, tiles_given, start, memory, passes, *self._rest, self._at_most
        self._solve_exactly: Callable[[], Any] | None = None

    def prepare(self) -> None:
        """Have arguments looked at once, for many calls: they must stay where they are."""
        self._solve_exactly = prepared(solve_exactly, *self._arguments)

    def solve(self) -> _Queue | None:
        """Solve what can be solved; return the other tiles, None if there are none."""
        call = self._solve_exactly
        left, others, untried = solve_exactly(*self._arguments) if call is None else call()
        if left == others == 0:
            return None
        n, (grid, start, memory) = self._n, self._given
        if others > 0:
            before, clamped = left, _narrow_program(n, self._m, True, self._itemsize)
            passes = self._schedule.clamped_passes
            left, others = solve_as_at_most(
                clamped, n, grid, start, memory, passes, *self._rest, left, others, untried, self._at_most
            )
            if left > before:
                passes = self._schedule.passes
                left = solve_exactly_again(self._program, n, grid, memory, passes, *self._rest, before, left)
        if left < 0:
            raise UnusableWeightError
        if left + others == 0:
            return None
        # Of what few tiles are left where most are proven, nearly all tie.
        tried = 2 * (left + others) < self._count
        stages = np.full(left + others, TIES_EXACTLY if tried else AS_EXACTLY, np.int8)
        stages[left:] = AS_AT_MOST
        potentials = np.concatenate([self._columns[0, :left], self._columns[1, :others]])
        # Those of weights near the ends of float32 may lie beyond it.
        potentials[~np.isfinite(potentials)] = 0
        where = np.concatenate([self._where[0, :left], self._where[1, :others]])
        return _Queue(where, potentials, stages, self._warm or tried)


def _equilibrate_queue(
    queue: _Queue, m: int, dtype: np.dtype[Any], grid: tuple[int, ...], margins: Margins, found: NDArray[Any]
) -> Tiles | None:
    """Solve tiles in their own dtype, and in float64; return those that remain, or None."""
    n, itemsize, exact, schedule = (
        margins.kept,
        dtype.itemsize,
        (margins.exact_rows, margins.exact_columns),
        _schedule(m),
    )
    count = len(queue.where)
    remaining, start, stages = np.empty((2, count), np.int64), np.zeros((2, count, m), dtype), queue.stages
    remaining[0] = queue.where
    if queue.potentials is not None:
        start[0] = queue.potentials
    if (stages < TIES_EXACTLY).any():
        count = equilibrate_strict(
            _program(n, m, itemsize, itemsize, *exact),
            grid,
            *_vectors_of(m, itemsize),
            schedule.rounds,
            schedule.relaxations,
            found,
            remaining,
            start,
            stages,
            count,
            queue.tried,
            *exact,
        )
    if count < 0:
        raise UnusableWeightError
    if count > 0:
        previous, start = start, np.empty((2, count, m))
        start[0] = previous[0, :count]
        count = equilibrate_perturbed(
            _program(n, m, 8, itemsize, *exact),
            grid,
            *_vectors_of(m, 8),
            schedule.perturbed_rounds,
            schedule.perturbed_relaxation,
            address_of(schedule.shares),
            found,
            remaining,
            start,
            stages,
            count,
            *exact,
        )
    return Tiles(remaining[0, :count], start[0, :count], stages[:count]) if count > 0 else None


@functools.cache
def _program(n: int, m: int, itemsize: int, source_itemsize: int, exact_rows: bool, exact_columns: bool) -> Any:
    whole = program(n, m, itemsize, source_itemsize)
    return constant(whole if exact_rows == exact_columns else clamped_on_one_side(whole, rows=exact_columns))


@functools.cache
def _narrow_program(n: int, m: int, clamped: bool, itemsize: int) -> Any:
    return constant(narrow_program(n, m, m, clamped, clamped, itemsize))


class _Memory(threading.local):
    def __init__(self) -> None:
        self.block = np.zeros(0, np.int8)
        self.vectors: dict[tuple[int, int], Vectors] = {}
        self.narrow: dict[int, Any] = {}
        self.queue_m, self.queue_length = 0, 0
        self.queue: tuple[tuple[NDArray[Any], ...], tuple[Any, ...]] = (), ()

    def replace(self, block: NDArray[np.int8]) -> None:
        self.block = block
        self.vectors.clear()
        self.narrow.clear()


# Vectors are used within one call of a kernel, which runs no Python: nothing can come between.
_memory = _Memory()


def _vectors_of(m: int, itemsize: int) -> Vectors:
    """Return the vectors of the thread that asks, kept for its next call; nothing is read of what they hold."""
    vectors = _memory.vectors.get((m, itemsize))
    if vectors is None:
        # All lie in one block of memory, that of the largest tiles so far.
        if not is_large_enough(_memory.block, m, itemsize):
            _memory.replace(new_memory(m, itemsize))
        vectors = _memory.vectors[m, itemsize] = vectors_in(_memory.block, m, itemsize)
    return vectors


def _narrow_memory(m: int) -> Any:
    """Return the memory of a group of tiles in 16-bit lanes, which is that of the vectors: they are used after it."""
    memory = _memory.narrow.get(m)
    if memory is None:
        size = narrow_layout.layout(m, m).size
        if _memory.block.nbytes < size:
            _memory.replace(narrow_layout.new_memory(m, m))
        memory = _memory.narrow[m] = constant(_memory.block[:size])
    return memory


def _narrow_queue(count: int, m: int) -> tuple[tuple[NDArray[Any], ...], tuple[Any, ...]]:
    """Return `where`, `columns` and `rows` of 16-bit passes, for this many tiles at least, and what they take for them.

    The thread keeps them: fresh memory takes as long as a small call.
    """
    if _memory.queue_m != m or _memory.queue_length < count:
        arrays = np.empty((2, count), np.int64), *np.empty((2, 2, count, m), np.float32)
        _memory.queue_m, _memory.queue_length = m, count
        _memory.queue = arrays, tuple(map(constant, arrays))
    return _memory.queue


@functools.lru_cache(maxsize=8)
def _all_tiles(down: int, across: int) -> NDArray[np.int64]:
    """Return tile row * 2**32 + tile column of every tile of a grid."""
    # To divide a tile's number by the tiles in a row would take half as long as all else.
    return (np.arange(down)[:, np.newaxis] << 32 | np.arange(across)).ravel()


@functools.lru_cache(maxsize=8)
def _all_tiles_given(down: int, across: int) -> Any:
    return constant(_all_tiles(down, across))


_NO_POTENTIALS = {4: constant(np.empty((0, 1), np.float32)), 8: constant(np.empty((0, 1), np.float64))}


@dataclass(frozen=True)
class _Schedule:
    """The schedule of equilibration, as plain tuples of what `Rounds`, `Relaxations` and `PerturbedRounds` hold.

    `shares` (m, m): the perturbation of each entry, between 0 and 1 times what the tile allows. `given_shares`,
    `passes`, `warm_passes` and `clamped_passes` are what 16-bit passes take.
    """

    rounds: tuple[int, ...]
    relaxations: tuple[float, ...]
    perturbed_rounds: tuple[int, ...]
    perturbed_relaxation: float
    shares: NDArray[np.float64]
    given_shares: Any
    passes: Any
    warm_passes: Any
    clamped_passes: Any


# For larger tiles the selection networks take too long to compile in two widths.
LARGEST_NARROW = 64

# By the largest m that they are for. Measured on Gaussian tiles (`python -m benchmarks.tune`): larger ones need more
# rounds, and to go further beyond the middle, at first less so.
_ROUNDS = {
    4: Rounds(first_check=2, last=8, if_tied=2, first_check_deferred=2),
    8: Rounds(first_check=4, last=12, if_tied=3, first_check_deferred=2),
    16: Rounds(first_check=6, last=20, if_tied=5, first_check_deferred=4),
    32: Rounds(first_check=10, last=32, if_tied=8, first_check_deferred=6),
    64: Rounds(first_check=15, last=56, if_tied=14, first_check_deferred=8),
    128: Rounds(first_check=20, last=80, if_tied=20, first_check_deferred=12),
}
_RELAXATIONS = {
    4: Relaxations(first=1.1, growth=0.02, largest=1.2, clamped=1.4),
    8: Relaxations(first=1.2, growth=0.02, largest=1.4, clamped=1.45),
    16: Relaxations(first=1.2, growth=0.07, largest=1.4, clamped=1.5),
    32: Relaxations(first=1.3, growth=0.04, largest=1.55, clamped=1.6),
    64: Relaxations(first=1.2, growth=0.07, largest=1.7, clamped=1.6),
    128: Relaxations(first=1.2, growth=0.07, largest=1.75, clamped=1.7),
}
# Rounds of small tiles always take less time than augmenting paths: no patience is too much.
_PERTURBED_ROUNDS = {
    4: PerturbedRounds(first_check=3, last=40, between_checks=2, patience=40),
    8: PerturbedRounds(first_check=4, last=60, between_checks=2, patience=60),
    16: PerturbedRounds(first_check=6, last=80, between_checks=3, patience=2),
    32: PerturbedRounds(first_check=8, last=120, between_checks=4, patience=1),
    64: PerturbedRounds(first_check=16, last=160, between_checks=5, patience=1),
    # Here augmenting paths soon take less time than rounds.
    128: PerturbedRounds(first_check=12, last=30, between_checks=6, patience=1),
}
_PERTURBED_RELAXATIONS = {4: 1.4, 8: 1.4, 16: 1.4, 32: 1.65, 64: 1.6, 128: 1.75}
# Of 16-bit passes: the first, those that are finer, and the rounds of the first if it starts warm.
_FIRST_PASS = {
    4: Pass(rounds=4, relaxation=1.1, growth=0.02, largest=1.2),
    8: Pass(rounds=6, relaxation=1.2, growth=0.02, largest=1.4),
    16: Pass(rounds=9, relaxation=1.2, growth=0.07, largest=1.4),
    32: Pass(rounds=13, relaxation=1.3, growth=0.04, largest=1.55),
    64: Pass(rounds=20, relaxation=1.2, growth=0.07, largest=1.7),
}
_LATER_PASSES = {
    4: Pass(rounds=4, relaxation=1.2, growth=0.0, largest=1.2),
    8: Pass(rounds=6, relaxation=1.4, growth=0.0, largest=1.4),
    16: Pass(rounds=8, relaxation=1.4, growth=0.0, largest=1.4),
    32: Pass(rounds=12, relaxation=1.5, growth=0.0, largest=1.5),
    64: Pass(rounds=20, relaxation=1.6, growth=0.0, largest=1.6),
}
# In both, what ties is perturbed: weights of few bits, and of fewer bits.
_TIES = dict.fromkeys(_LATER_PASSES, Grain(finer=8, quantum=12, spread=256.0))
_COARSE_TIES = dict.fromkeys(_LATER_PASSES, Grain(finer=8, quantum=16, spread=4096.0))
_COARSEST, _FINER, _FINEST = Grain(finer=0), Grain(finer=6), Grain(finer=12)
_WARM_ROUNDS = {4: 2, 8: 3, 16: 4, 32: 6, 64: 8}


@functools.cache
def _schedule(m: int) -> _Schedule:
    size = next(largest for largest in _ROUNDS if m <= largest)
    narrow_size = min(size, LARGEST_NARROW)
    later = _LATER_PASSES[narrow_size]
    ties = _TIES[narrow_size]
    finer = [(_FINER, later), (ties, later), (_COARSE_TIES[narrow_size], later), (_FINEST, later)]
    # Any fixed numbers without a pattern will do.
    shares = 0.25 + 0.749 * np.random.default_rng(7).random((m, m))
    return _Schedule(
        tuple(_ROUNDS[size]),
        tuple(_RELAXATIONS[size]),
        tuple(_PERTURBED_ROUNDS[size]),
        _PERTURBED_RELAXATIONS[size],
        shares,
        given_shares=constant(shares),
        passes=_passes((_COARSEST, _FIRST_PASS[narrow_size]), *finer),
        # Most tiles keep their mask from one step of training to the next; what proves it is there already.
        warm_passes=_passes(
            *[(grain, later._replace(rounds=0)) for grain in (_COARSEST, _FINER, ties)],
            (_COARSEST, later._replace(rounds=_WARM_ROUNDS[narrow_size])),
            *finer,
        ),
        clamped_passes=_passes((_COARSEST, later), *finer),
    )


def _passes(*passes: tuple[Grain, Pass]) -> Any:
    """Return passes as rows: what the `Grain` and the `Pass` of each hold."""
    return constant(np.array([(*grain, *each) for grain, each in passes], np.float64))
