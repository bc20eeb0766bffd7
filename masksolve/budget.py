"""Budgets: which N of a fixed M each layer gets, so that all of them together keep a given share of their weights.

A larger N keeps more of a layer's importance, or leaves less of an error, and costs more of the budget. Choosing one N
for each layer is a multiple-choice knapsack, solved exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from masksolve._inputs import as_count, as_weights, check_direction, check_number
from masksolve._knapsack import TooManySumsError, solve
from masksolve._pattern import Pattern
from masksolve._patterns import globs_of_names
from masksolve._solve import solve_matrix
from masksolve._tiles import Direction
from masksolve._words import counted

__all__ = ["Budget", "LayerBudget", "choose_patterns", "kept_by_n", "spend"]


@dataclass(frozen=True)
class LayerBudget:
    """One layer of a `Budget`.

    Attributes
    ----------
    name : str
    size : int
        Its number of weights.
    pattern : Pattern
        The pattern that was chosen.
    values : tuple of float
        What the layer is worth at each n that could be chosen: its kept importance, or an error with its sign changed.
    counts : tuple of int
        How many of its weights are kept at each of these n.
    """

    name: str
    size: int
    pattern: Pattern
    values: tuple[float, ...]
    counts: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the layer as JSON has it."""
        figures = {"values": list(self.values), "counts": list(self.counts)}
        return {"name": self.name, "size": self.size, "pattern": str(self.pattern), **figures}


@dataclass(frozen=True, kw_only=True, repr=False)
class Budget:
    """The result of `choose_patterns` and `spend`, with the figures that it was chosen from.

    Attributes
    ----------
    m : int
        Length of a group.
    asked : float
        The density that was asked for.
    least, most : int
        The bounds of n; the figures of the layers are those of n = least ... most.
    layers : tuple of LayerBudget
    """

    m: int
    asked: float
    least: int
    most: int
    layers: tuple[LayerBudget, ...]

    @property
    def patterns(self) -> dict[str, Pattern]:
        """The patterns by globs, of which each matches its layer alone, for whatever takes a `pattern`."""
        return globs_of_names({layer.name: layer.pattern for layer in self.layers})

    @property
    def density(self) -> float:
        """The share of all weights that the patterns keep, at most what was asked for."""
        return self._kept() / self._size

    @property
    def value(self) -> float:
        """The worth of all layers together under their patterns."""
        return self._worth()

    @property
    def uniform(self) -> Pattern | None:
        """The one pattern that keeps the most within the same budget if all layers get it; None if none is within."""
        within = [n for n in range(self.least, self.most + 1) if self._kept(n) / self._size <= self.asked]
        return Pattern(within[-1], self.m) if within else None

    @property
    def uniform_value(self) -> float | None:
        """The worth of all layers together under `uniform`; None if there is none."""
        return None if self.uniform is None else self._worth(self.uniform.n)

    @property
    def _size(self) -> int:
        return sum(layer.size for layer in self.layers)

    def _kept(self, n: int | None = None) -> int:
        """Return how many weights are kept, of each layer at its own n or of all at one."""
        return sum(layer.counts[(layer.pattern.n if n is None else n) - self.least] for layer in self.layers)

    def _worth(self, n: int | None = None) -> float:
        """Return what the layers are worth together, each at its own n or all at one."""
        return math.fsum(layer.values[(layer.pattern.n if n is None else n) - self.least] for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the budget as JSON has it: the fields and properties, with a Pattern as "N:M"."""
        return {
            "m": self.m,
            "asked": self.asked,
            "least": self.least,
            "most": self.most,
            "layers": [layer.to_dict() for layer in self.layers],
            "patterns": {glob: str(pattern) for glob, pattern in self.patterns.items()},
            "density": self.density,
            "value": self.value,
            "uniform": None if self.uniform is None else str(self.uniform),
            "uniform_value": self.uniform_value,
        }

    def __repr__(self) -> str:
        beside = "" if self.uniform is None else f", {self.uniform_value:.6g} at {self.uniform} for all"
        return (
            f"<Budget of {counted(len(self.layers), 'layer')}, {self.least} to {self.most} of {self.m}: density "
            f"{self.density:.4g} (asked for {self.asked:.4g}), value {self.value:.6g}{beside}>"
        )


def choose_patterns(
    weights: Mapping[str, ArrayLike],
    m: int,
    density: float,
    *,
    direction: str = "both",
    least: int = 1,
    most: int | None = None,
) -> Budget:
    """Choose N of M for each layer so that all of them together keep the most importance at a density.

    Parameters
    ----------
    weights : mapping of str to array_like, shape (..., R, C)
        The weights of each layer, or what importance is measured by: their absolute values count.
    m : int
        Length of a group.
    density : float
        The share of all these weights that may be kept.
    direction : {"both", "rows", "columns"}
        As for `masksolve.solve_matrix`.
    least, most : int
        Bounds of every n; by default 1, so that no layer is zeroed whole, and m, which leaves one dense.

    Returns
    -------
    Budget
        Its values are kept importance: of all choices within the budget it has the largest sum.

    Raises
    ------
    ValueError, TypeError
        For weights that `masksolve.solve_matrix` refuses, and a budget that cannot be met.

    Notes
    -----
    Importance is compared across layers as it is: a layer whose weights are twice as large counts twice. Divide each
    layer's weights by their mean magnitude to compare shares instead.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> weights = {"wide.weight": rng.standard_normal((64, 64)), "small.weight": 3 * rng.standard_normal((16, 16))}
    >>> budget = choose_patterns(weights, 8, 0.4)
    >>> {name: str(pattern) for name, pattern in budget.patterns.items()}, str(budget.uniform)
    ({'wide.weight': '3:8', 'small.weight': '6:8'}, '3:8')
    """
    m, lowest, highest = check_budget(m, density, least, most)
    checked = check_direction(direction)
    found = {
        name: _curve_of_layer(name, each, m, checked, range(lowest, highest + 1))
        for name, each in _as_mapping(weights, "weights").items()
    }
    curves, sizes = (
        {name: curve for name, (curve, _) in found.items()},
        {name: size for name, (_, size) in found.items()},
    )
    return budget_of(curves, sizes, density, m=m, least=lowest, most=highest)


def kept_by_n(weights: ArrayLike, m: int, *, direction: str = "both") -> NDArray[np.float64]:
    """Return the kept importance of the best n:m masks of some weights, for n = 0 ... m.

    Parameters
    ----------
    weights : array_like, shape (..., R, C)
    m : int
    direction : {"both", "rows", "columns"}
        As for `masksolve.solve_matrix`.

    Returns
    -------
    ndarray of float64, shape (m + 1,)

    Raises
    ------
    ValueError, TypeError
        As for `masksolve.solve_matrix`.

    Examples
    --------
    >>> kept_by_n([[3.0, 1.0], [1.0, 2.0]], 2)
    array([0., 5., 7.])
    """
    values, _ = curve_of(as_weights(weights), m, check_direction(direction), range(Pattern(0, m).m + 1))
    return np.array(values)


def spend(
    values: Mapping[str, ArrayLike],
    sizes: Mapping[str, SupportsIndex],
    density: float,
    *,
    least: int = 1,
    most: int | None = None,
) -> Budget:
    """Choose N of M for each layer by figures that are known already: the most importance, or the least error.

    Parameters
    ----------
    values : mapping of str to array_like, shape (m + 1,)
        What each layer is worth at n = 0 ... m, larger being better: kept importance, or an error with its sign
        changed. The m is the same for all.
    sizes : mapping of str to int
        How many weights each layer has, of which n of every m are kept.
    density : float
        The share of all weights that may be kept.
    least, most : int
        As for `choose_patterns`.

    Returns
    -------
    Budget
        Of all choices within the budget it has the largest sum of values, up to the rounding of float64 sums; among
        equals, one that keeps the fewest weights.

    Raises
    ------
    ValueError, TypeError
        For figures that are not finite, not of one m or not of the same layers, and a budget that cannot be met.
    ArithmeticError
        If many millions of choices are so nearly equal that the best cannot be told from them in bounded memory. Of
        layers that differ in more than size that has not been seen.

    Examples
    --------
    The least sum of errors, of reconstruction for example:

    >>> errors = {"first.weight": [9.0, 1.0, 0.0], "second.weight": [9.0, 4.0, 0.0]}
    >>> values = {name: -np.array(each) for name, each in errors.items()}
    >>> budget = spend(values, {"first.weight": 100, "second.weight": 100}, 0.75)
    >>> {name: str(pattern) for name, pattern in budget.patterns.items()}, budget.value
    ({'first.weight': '1:2', 'second.weight': '2:2'}, -1.0)
    """
    figures = {name: _as_values(name, each) for name, each in _as_mapping(values, "values").items()}
    m, lowest, highest = check_budget(_only_m(figures), density, least, most)
    if figures.keys() != _as_mapping(sizes, "sizes").keys():
        odd = next(name for name in [*figures, *sizes] if name not in figures or name not in sizes)
        has, lacks = ("values", "sizes") if odd in figures else ("sizes", "values")
        raise ValueError(f"layer {odd!r} is in {has} but not in {lacks}; give both of each layer")
    numbers = {name: as_count(sizes[name], f"the size of layer {name!r}", 1) for name in figures}
    curves = {
        name: (
            tuple(float(value) for value in each[lowest : highest + 1]),
            # A part of a weight is a whole one.
            tuple(-(-n * numbers[name] // m) for n in range(lowest, highest + 1)),
        )
        for name, each in figures.items()
    }
    return budget_of(curves, numbers, density, m=m, least=lowest, most=highest)


# What a layer is worth, and how many of its weights are kept, at n = least ... most.
Curve = tuple[tuple[float, ...], tuple[int, ...]]


def budget_of(
    curves: Mapping[str, Curve], sizes: Mapping[str, int], density: float, *, m: int, least: int, most: int
) -> Budget:
    """Return the best budget of layers of these curves, whose bounds and density are checked already."""
    everything = sum(sizes.values())
    reached = [sum(counts[at] for _, counts in curves.values()) / everything for at in (0, -1)]
    if not reached[0] <= density or (most < m and density > reached[1]):
        raise ValueError(
            f"a density of {density!r} cannot be met: with {least} to {most} of every {m} kept, it is at least "
            f"{reached[0]:.6g} and at most {reached[1]:.6g}; ask for one between them, or for other bounds of n by "
            "`least` and `most`"
        )
    try:
        chosen = solve(
            [np.array(values) for values, _ in curves.values()],
            [np.array(counts, np.int64) for _, counts in curves.values()],
            _room(density, everything),
        )
    except TooManySumsError:
        raise ArithmeticError(
            f"too many choices for the {len(curves)} layers are nearly as good as the best to tell which it is; bound "
            "n closer by `least` and `most`, or ask for another density"
        ) from None
    layers = [
        LayerBudget(name, sizes[name], Pattern(least + at, m), *curve)
        for at, (name, curve) in zip(chosen, curves.items(), strict=True)
    ]
    return Budget(m=m, asked=float(density), least=least, most=most, layers=tuple(layers))


def _room(density: float, size: int) -> int:
    """Return the most weights that are no larger a share than the density, as floats: 1/3 of 3 is 1."""
    room = min(size, math.floor(density * size) + 1)
    while room / size > density:
        room -= 1
    return room


def curve_of(
    weights: NDArray[Any], m: int, direction: str, choices: Iterable[int], threads: int | None = None
) -> Curve:
    """Return the kept importance and the number of kept weights of the best masks, at some n.

    Raises
    ------
    ValueError, TypeError
        As for `masksolve.solve_matrix`, and for weights whose importance adds up to more than a float64 holds.
    """
    importance = np.abs(weights.astype(np.float64))
    kept = np.empty_like(importance)
    values, counts = [], []
    for n in choices:
        mask = solve_matrix(weights, n, m, direction=direction, threads=threads)
        # NumPy sums an eighth as fast with `where`.
        np.multiply(importance, mask, out=kept)
        with np.errstate(over="ignore"):
            values.append(float(kept.sum()))
        counts.append(int(np.count_nonzero(mask)))
    if not math.isfinite(max(values)):
        raise ValueError("the sum of abs(weights) is beyond float64; divide all weights by a power of two")
    return tuple(values), tuple(counts)


def check_budget(m: int, density: float, least: int, most: int | None) -> tuple[int, int, int]:
    """Return m and the bounds of n, the numbers that they have to be; refuse densities that no weights have."""
    m = Pattern(0, m).m
    lowest = as_count(least, "least", 0)
    highest = m if most is None else as_count(most, "most", 0)
    if not lowest <= highest <= m:
        raise ValueError(
            f"the bounds of n must be 0 <= least <= most <= m={m}, got least={lowest} and most={highest}; n counts "
            f"what is kept of every {m}"
        )
    check_number(density, "density")
    if not 0 < density <= 1:
        raise ValueError(
            f"density must be more than 0 and at most 1, got {density!r}; it is the share of weights to keep, such as "
            "0.5 for half of them"
        )
    return m, lowest, highest


def _curve_of_layer(name: str, weights: ArrayLike, m: int, direction: Direction, choices: range) -> tuple[Curve, int]:
    try:
        array = as_weights(weights)
        rows, columns = array.shape[-2:]
        if (direction != "columns" and columns < m) or (direction != "rows" and rows < m):
            missing = f"{m}x{m} tile" if direction == "both" else f"group of {m} along its {direction}"
            raise ValueError(f"{rows}x{columns} weights hold no whole {missing}; leave it out, or take a smaller m")
        return curve_of(array, m, direction, choices), array.size
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {name!r}: {error}") from None


def _as_mapping(given: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """Return a mapping of layers by name, at least one."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} must map names of layers to theirs, got {type(given).__name__}")
    if not given:
        raise ValueError(f"{what} is an empty mapping; give at least one layer, as {{'layers.0.weight': ...}}")
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"{what} must map names of layers, which are strings; got the name {name!r}")
    return given


def _as_values(name: str, given: ArrayLike) -> NDArray[np.float64]:
    """Return what one layer is worth as an array."""
    try:
        values = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(
            f"layer {name!r} has the values {given!r}; give m + 1 finite numbers, what it is worth at n = 0 ... m"
        )
    return values


def _only_m(figures: Mapping[str, NDArray[np.float64]]) -> int:
    """Return the m of which all layers have their figures."""
    names = {len(values) - 1: name for name, values in figures.items()}
    if len(names) > 1:
        (m, one), (other_m, other), *_ = names.items()
        raise ValueError(
            f"layer {one!r} has values for n = 0 ... {m}, layer {other!r} for n = 0 ... {other_m}; give them for one m"
        )
    return next(iter(names))
