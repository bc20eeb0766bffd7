"""Permutations: an order of the rows and columns of a weight in which the best N:M mask keeps more. Needs scipy.

Reordering the channels that two layers share changes no output of a network, but which weights share a tile. Under
transposable masks rows and columns count, under one-sided ones the axis along which the groups of M lie.

The search takes one line out of every stripe of M lines and gives each stripe the one with which all together keep the
most: a linear assignment over the exact kept importance of every stripe with every line (Zhang et al. 2024, "RIA",
arXiv 2402.17762, for one-sided masks). That is repeated with other lines, rows and columns in turn, until nothing
changes; then a few lines are exchanged at random, and what comes out is kept if it is better.

Large transposable tiles take long to solve with every line, and begin with something cheaper: the potentials of a tile
price its columns, and at these prices a line is worth its N largest entries less their prices, whatever the others
are. So several lines can be taken out of a stripe at once. Sums of prices are bounds, by weak duality, not what is
kept: the stripes among which lines have gone round are solved again, and where they keep less they are put back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from masksolve._errors import NotInstalledError
from masksolve._inputs import (
    as_count,
    as_generator,
    as_weights,
    check_choice,
    check_direction,
    check_seconds,
    check_threads,
)
from masksolve._pattern import Pattern, PatternLike, as_pattern
from masksolve._solve import solve_matrix
from masksolve._tiles import Direction

__all__ = ["Permutation", "search"]

Axes = Literal["rows", "columns", "both"]
Scores = NDArray[np.float32]

# The axis whose order counts for one-sided masks: that along which their groups lie.
_AXIS: dict[str, Axes] = {"rows": "columns", "columns": "rows"}
# Weights of tiles that are solved at a time, and tiles of one assignment.
_AT_ONCE, _MOST_TILES = 1 << 22, 1 << 22
# An axis is done after as many assignments in a row that gain less than this share of what is kept.
_PATIENCE, _SMALL = 12, 3e-5
# Transposable tiles of at least this M begin with prices, by which M over this many lines of a stripe move at a time.
_PRICED_FROM, _PRICED_PART = 8, 4
# Exchanges of an escape, as a share of the stripes.
_EXCHANGED = 0.1
# Gains below this share of what is kept are rounding.
_ROUNDING = 1e-7


@dataclass(frozen=True, eq=False)
class Permutation:
    """An order of rows and columns.

    Attributes
    ----------
    rows, columns : ndarray of int
        The places that the rows and columns in the new order have in the old one: W[rows][:, columns] is reordered.
    kept_before, kept_after : float
        The share of the importance that the best mask keeps.
    trace : tuple of float
        The same after each assignment that gained.
    """

    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    kept_before: float
    kept_after: float
    trace: tuple[float, ...]

    def apply(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """Return a matrix (..., R, C) in the new order.

        Raises
        ------
        ValueError
            If it has other numbers of rows or columns.
        """
        self._check(matrix)
        return np.take(np.take(matrix, self.rows, axis=-2), self.columns, axis=-1)

    def undo(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """Return a matrix (..., R, C) that is in the new order in the old one."""
        self._check(matrix)
        return np.take(np.take(matrix, np.argsort(self.rows), axis=-2), np.argsort(self.columns), axis=-1)

    def _check(self, matrix: NDArray[Any]) -> None:
        shape = (len(self.rows), len(self.columns))
        if np.shape(matrix)[-2:] != shape:
            raise ValueError(f"the permutation is of {shape[0]}x{shape[1]} matrices, got shape {np.shape(matrix)}")

    def __repr__(self) -> str:
        shape = f"{len(self.rows)}x{len(self.columns)}"
        return f"Permutation({shape}, kept importance {self.kept_before:.2%} -> {self.kept_after:.2%})"


def search(
    weights: ArrayLike | Sequence[ArrayLike],
    pattern: PatternLike,
    *,
    axes: Axes = "both",
    scores: ArrayLike | Sequence[ArrayLike] | None = None,
    groups: int = 1,
    direction: Direction = "both",
    escapes: int = 0,
    time_limit: float | None = None,
    threads: int | None = None,
    rng: int | np.random.Generator | None = 0,
    on_progress: Callable[[Permutation], object] | None = None,
) -> Permutation:
    """Find an order of rows, columns or both in which the best mask keeps more importance.

    Parameters
    ----------
    weights : array_like, shape (R, C), or a sequence of them
        Several, with axes="rows", have to have the same number of rows: these get one order together, as the hidden
        channels of a feed-forward block have, the rows of its first matrices and the columns of its last, transposed.
    pattern : str, (int, int) or Pattern
        N **kept** of every M.
    axes : {"rows", "columns", "both"}
        What may be reordered.
    scores : array_like or a sequence of them, optional
        What masks keep most of, in place of abs(weights): of the same shapes, not negative.
    groups : int
        For one axis: lines move only within their group, one of so many of the same size, as the channels of a head.
    direction : {"both", "rows", "columns"}
        Transposable masks, or N of every M consecutive inputs of an output ("rows"), for which only columns count, or
        outputs of an input ("columns"), for which only rows do.
    escapes : int
        How often to go on from a random exchange of lines when nothing gains any more; about as long again each time.
    time_limit : float, optional
        Seconds after which no further assignment begins. What is found then depends on the machine.
    threads : int, optional
        As for `solve_blocks`.
    rng : int, Generator or None
        The same seed gives the same permutation.
    on_progress : callable, optional
        Gets the best permutation so far after every gain, as for a search that is interrupted.

    Returns
    -------
    Permutation
        Never one that keeps less than the order as it is. Lines of a stripe of fewer than M, at the end of an axis,
        stay where they are. For several matrices `columns` is that of all of them side by side, unchanged.

    Raises
    ------
    ValueError, TypeError
        For bad weights, scores or options.
    NotInstalledError
        Without scipy: pip install 'masksolve[permute]'.

    Notes
    -----
    An assignment of R x C weights solves (C/m)² R/m tiles for columns, or a random part of them if these are many. An
    axis is done when twelve of them in a row have gained less than 3e-5 of what is kept each.

    Examples
    --------
    >>> import numpy as np
    >>> weights = np.random.default_rng(0).normal(size=(64, 32))
    >>> found = search(weights, "2:4")
    >>> found
    Permutation(64x32, kept importance 69.95% -> 74.18%)
    >>> np.array_equal(found.undo(found.apply(weights)), weights)
    True
    """
    require_scipy()
    pattern = as_pattern(pattern)
    check_choice(axes, "axes", get_args(Axes))
    check_direction(direction)
    check_threads(threads)
    escapes, groups = as_count(escapes, "escapes", 0), as_count(groups, "groups", 1)
    matrices = _importance(weights, scores)
    if len(matrices) > 1 and axes != "rows":
        raise ValueError(
            f"several matrices share their rows, got axes={axes!r}; pass axes='rows', and transpose those that share "
            "columns"
        )
    if direction != "both" and axes not in ("both", _AXIS[direction]):
        raise ValueError(
            f"one-sided masks of direction={direction!r} keep the same in every order of the {axes}; pass "
            f"axes={_AXIS[direction]!r}"
        )
    _check_groups(groups, axes, matrices[0].shape, pattern.m)
    check_seconds(time_limit, "time_limit")
    generator = as_generator(rng)
    end = math.inf if time_limit is None else time.monotonic() + time_limit
    found = _Search(matrices, pattern, direction, groups, threads, generator, end)
    return found.run(axes, escapes, on_progress)


def require_scipy() -> None:
    """Refuse to begin what would need it later."""
    try:
        import scipy.optimize  # noqa: F401
    except ModuleNotFoundError as error:
        raise NotInstalledError(
            "masksolve.permute needs scipy, which is not installed; pip install 'masksolve[permute]'", name="scipy"
        ) from error


def _importance(weights: Any, scores: Any) -> list[Scores]:
    """Return what masks keep most of, a matrix for each that was given."""
    several = isinstance(weights, (list, tuple)) and all(np.ndim(each) == 2 for each in weights) and len(weights) > 0
    given = [as_weights(each, ndim=2) for each in (weights if several else [weights])]
    if scores is not None:
        if several and (not isinstance(scores, (list, tuple)) or len(scores) != len(given)):
            raise ValueError(f"scores must be a sequence of {len(given)} matrices, as the weights are")
        chosen = [as_weights(each, ndim=2) for each in (scores if several else [scores])]
        for weight, score in zip(given, chosen, strict=True):
            if score.shape != weight.shape:
                raise ValueError(f"scores of shape {score.shape} for weights of shape {weight.shape}; they must agree")
            if (score < 0).any():
                raise ValueError("scores must not be negative; pass their absolute values")
        given = chosen
    rows = {len(each) for each in given}
    if len(rows) > 1:
        raise ValueError(
            f"matrices that share their rows must have the same number of them, got shapes "
            f"{', '.join(str(each.shape) for each in given)}; transpose those that share columns"
        )
    largest = max(float(np.max(np.abs(each), initial=0)) for each in given)
    # In a scale that float32 holds whatever theirs is. By a power of two, so that weights which are equal, as many are
    # that were quantised, stay so: of weights that are nearly equal, exact takes many times as long.
    exponent = -int(np.frexp(largest)[1])
    return [np.ldexp(np.abs(each.astype(np.float64)), exponent).astype(np.float32) for each in given]


def _check_groups(groups: int, axes: Axes, shape: tuple[int, int], m: int) -> None:
    if groups == 1:
        return
    if axes == "both":
        raise ValueError(f"groups={groups} are of the lines of one axis; pass axes='rows' or 'columns'")
    lines = shape[0 if axes == "rows" else 1]
    if lines % groups or lines // groups % m:
        raise ValueError(
            f"{lines} {axes} do not make groups={groups} of whole stripes of {m}; leave groups out, or choose another "
            "pattern"
        )


class _Search:
    """Matrices of scores that share their rows, and the order that the lines have by now; columns of one matrix."""

    def __init__(
        self,
        matrices: Sequence[Scores],
        pattern: Pattern,
        direction: Direction,
        groups: int,
        threads: int | None,
        rng: np.random.Generator,
        end: float,
    ) -> None:
        self._matrices, self._pattern, self._direction = matrices, pattern, direction
        self._groups, self._threads, self._rng, self._end = groups, threads, rng, end
        columns = sum(each.shape[1] for each in matrices)
        self._orders = [np.arange(len(matrices[0])), np.arange(columns)]

    def run(self, axes: Axes, escapes: int, on_progress: Callable[[Permutation], object] | None) -> Permutation:
        """Search."""
        moving = axes if self._direction == "both" else _AXIS[self._direction]
        moved = {"rows": (0,), "columns": (1,), "both": (0, 1)}[moving]
        total = sum(float(each.sum(dtype=np.float64)) for each in self._matrices) or 1.0
        share = self._kept() / total
        best = Permutation(self._orders[0], self._orders[1], share, share, ())
        for attempt in range(escapes + 1):
            if attempt > 0:
                self._orders = [best.rows, best.columns]
                self._exchange(moved)
            for kept in self._climb(moved):
                share = kept / total
                if share > best.kept_after * (1 + _ROUNDING):
                    rows, columns = self._orders
                    best = Permutation(rows, columns, best.kept_before, share, (*best.trace, share))
                    if on_progress is not None:
                        on_progress(best)
        return best

    def _now(self) -> list[Scores]:
        """Return the scores in the order of now."""
        if len(self._matrices) == 1:
            return [self._matrices[0][np.ix_(*self._orders)]]
        return [each[self._orders[0]] for each in self._matrices]

    def _kept(self) -> float:
        return sum(float(self._kept_of(each[None], self._direction)[0]) for each in self._now())

    def _kept_of(self, stack: Scores, direction: Direction) -> NDArray[np.float64]:
        """Return what the best mask of each matrix of a stack keeps."""
        mask = solve_matrix(stack, self._pattern.n, self._pattern.m, direction=direction, threads=self._threads)
        kept: NDArray[np.float64] = np.einsum("tij,tij->t", stack, mask.astype(np.float32), dtype=np.float64)
        return kept

    def _climb(self, moved: Sequence[int]) -> Iterator[float]:
        """Assign lines to stripes until that gains hardly anything; yield what is kept after each gain."""
        kept = self._kept()
        priced = self._direction == "both" and self._pattern.m >= _PRICED_FROM
        lines = self._pattern.m // _PRICED_PART if priced else 0
        while lines > 0:
            waited = 0
            for axis in moved:
                if time.monotonic() > self._end:
                    return
                gain = self._assign_by_prices(axis, lines)
                waited += gain <= _SMALL * kept
                if gain > 0:
                    kept += gain
                    yield kept
            if waited == len(moved):
                lines //= 2
        waits = dict.fromkeys(moved, 0)
        while min(waits.values()) < _PATIENCE:
            for axis in moved:
                if time.monotonic() > self._end:
                    return
                gain = self._assign(axis)
                waits = dict.fromkeys(moved, 0) if gain > _SMALL * kept else {**waits, axis: waits[axis] + 1}
                if gain > 0:
                    kept += gain
                    yield kept

    def _stripes(self, axis: int) -> list[NDArray[np.intp]]:
        """Return the stripes, by number, among which lines are exchanged: those of each group, or random parts."""
        length, across, m = len(self._orders[axis]), len(self._orders[1 - axis]), self._pattern.m
        tiles = -(-across // m) if self._direction == "both" else across
        most = max(2, int((_MOST_TILES / tiles) ** 0.5))
        parts = []
        for group in np.split(np.arange(length // m), self._groups):
            shuffled = group if len(group) <= most else self._rng.permutation(group)
            parts += [shuffled[start : start + most] for start in range(0, len(group), most)]
        return [part for part in parts if len(part) > 1]

    def _exchange(self, moved: Sequence[int]) -> None:
        """Exchange lines between some stripes at random."""
        m = self._pattern.m
        for axis in moved:
            order = self._orders[axis].copy()
            for stripes in self._stripes(axis):
                chosen = self._rng.permutation(stripes)[: max(2, int(_EXCHANGED * len(stripes)))]
                lines = chosen * m + self._rng.integers(m, size=len(chosen))
                order[lines] = order[np.roll(lines, 1)]
            self._orders[axis] = order

    def _assign(self, axis: int) -> float:
        """Take a line out of every stripe and give each the one with which all keep the most; how much that gains."""
        from scipy.optimize import linear_sum_assignment

        m = self._pattern.m
        now = [each if axis == 0 else each.T for each in self._now()]
        order, gain = self._orders[axis].copy(), 0.0
        for stripes in self._stripes(axis):
            places = self._rng.integers(m, size=len(stripes))
            lines = stripes * m + places
            kept = np.sum([self._kept_with(each, stripes, places) for each in now], axis=0)
            receivers, givers = linear_sum_assignment(kept, maximize=True)
            found, before = kept[receivers, givers].sum(), np.trace(kept)
            if found > before * (1 + _ROUNDING):
                order[lines[receivers]] = self._orders[axis][lines[givers]]
                gain += float(found - before)
        self._orders[axis] = order
        return gain

    def _assign_by_prices(self, axis: int, number: int) -> float:
        """Take so many lines out of every stripe and assign them at the prices of now; how much that gains."""
        from scipy.optimize import linear_sum_assignment
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        m, places = self._pattern.m, np.arange(len(self._orders[axis]))
        now = [np.ascontiguousarray(each if axis == 0 else each.T) for each in self._now()]
        kept, prices = self._priced(now)
        source = places.copy()
        for stripes in self._stripes(axis):
            taken = np.argsort(self._rng.random((len(stripes), m)), axis=1)[:, :number]
            lines = (stripes[:, None] * m + taken).ravel()
            worth = sum(self._worth(each[lines], paid[stripes]) for each, paid in zip(now, prices, strict=True))
            receivers, givers = linear_sum_assignment(np.repeat(worth, number, axis=0), maximize=True)
            source[lines[receivers]] = lines[givers]
        # Stripes gain or lose together with those that they give to and take from.
        moves = places[source != places] // m, source[source != places] // m
        links = coo_matrix((np.ones(len(moves[0])), moves), shape=(len(kept), len(kept)))
        number_of_parts, part = connected_components(links, directed=False)
        gain = np.bincount(part, self._priced([each[source] for each in now])[0] - kept, minlength=number_of_parts)
        gained = gain > _ROUNDING * kept.sum()
        whole = len(kept) * m
        source[:whole] = np.where(np.repeat(gained[part], m), source[:whole], places[:whole])
        self._orders[axis] = self._orders[axis][source]
        return float(gain[gained].sum())

    def _priced(self, now: Sequence[Scores]) -> tuple[NDArray[np.float64], list[NDArray[np.floating[Any]]]]:
        """Return what each stripe of rows keeps, and the prices (stripes, tiles, m) of the columns of each matrix."""
        n, m = self._pattern.n, self._pattern.m
        kept, prices = np.zeros(len(now[0]) // m), []
        for each in now:
            mask, paid = solve_matrix(each, n, m, threads=self._threads, return_potentials=True)
            of_lines = np.einsum("ij,ij->i", each, mask.astype(np.float32), dtype=np.float64)
            kept += of_lines[: len(kept) * m].reshape(-1, m).sum(1)
            prices.append(paid)
        return kept, prices

    def _worth(self, lines: Scores, prices: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Return the N largest entries of each line in each tile, less their prices, summed, for each stripe."""
        n, m, across = self._pattern.n, self._pattern.m, prices.shape[1] * prices.shape[2]
        whole, paid = lines[:, :across], prices.reshape(len(prices), across).astype(np.float32)
        worth = np.zeros((len(prices), len(lines)))
        if across == 0:
            return worth
        step = max(1, _AT_ONCE // max(1, whole.size))
        for first in range(0, len(prices), step):
            some = slice(first, first + step)
            # Positive, as magnitudes are compared; that adds the same to every line.
            profit = whole - paid[some, None] + paid[some].max(1, initial=0.0)[:, None, None]
            mask = solve_matrix(profit, n, m, direction="rows", threads=self._threads)
            worth[some] = np.einsum("tij,tij->ti", profit, mask.astype(np.float32))
        return worth

    def _kept_with(self, now: Scores, stripes: NDArray[np.intp], places: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return what each of some stripes of rows keeps with the line of each other in place of its own.

        Parameters
        ----------
        now : ndarray, shape (lines, across)
            For one-sided masks, whose order is sought along their groups: across these.
        stripes, places : ndarray of int, shape (k,)
            The place is that in the stripe of the line that is taken out.

        Returns
        -------
        ndarray of float64, shape (k, k)
        """
        m, count = self._pattern.m, len(stripes)
        rows = now[: len(now) // m * m].reshape(-1, m, now.shape[1])[stripes]
        taken = rows[np.arange(count), places]
        if self._direction != "both":
            return self._lines_kept_with(rows, taken, places)
        kept = np.empty((count, count))
        step = max(1, _AT_ONCE // (rows[0].size * count))
        for first in range(0, count, step):
            some = slice(first, first + step)
            trials = np.repeat(rows[some, None], count, axis=1)
            trials[np.arange(len(trials)), :, places[some]] = taken
            kept[some] = self._kept_of(trials.reshape(-1, m, now.shape[1]), "both").reshape(-1, count)
        return kept

    def _lines_kept_with(self, rows: Scores, taken: Scores, places: NDArray[np.intp]) -> NDArray[np.float64]:
        """Do so for one-sided masks, whose groups lie across the stripe's rows."""
        n, count = self._pattern.n, len(rows)
        if n == 0:
            return np.zeros((count, count))
        rest = rows.copy()
        rest[np.arange(count), places] = -1.0
        rest = -np.sort(-rest, axis=1)[:, : max(n, 1)]
        # The best n of a group are n - 1 of the others, and the larger of the next of them and the new one.
        sure = rest[:, : n - 1].sum((1, 2), dtype=np.float64)
        next_one = rest[:, n - 1]
        kept = np.empty((count, count))
        for stripe in range(count):
            kept[stripe] = sure[stripe] + np.maximum(next_one[stripe], taken).sum(1, dtype=np.float64)
        return kept
