"""The multiple-choice knapsack: one option for each item, of the largest total value whose total cost fits, exactly.

At a price for each unit of cost, no choice is worth more than the room at that price and each item's best option, less
what that costs (the Lagrangian bound). What another option of an item is worth less than its best is a loss; a choice
can be left out if its losses add up to more than what the best choice known lacks of the bound. What remains is a
dynamic programme over few sums of cost and value, none of which another one beats: items are added in turn to the
shorter of two lists of them, in which each time the pair is found that fits best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

# Sums that are looked at when one item is added; each takes a few dozen bytes.
_MOST_SUMS = 1 << 23
# Of what is added up: what sums are off by through rounding, several times over.
_ROUNDING = 2.0**-50

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class TooManySumsError(ArithmeticError):
    """The knapsack cannot be solved exactly in bounded memory."""


@dataclass(frozen=True)
class _Options:
    """The options of an item that no other option beats, by rising cost and value; `numbers` is which they are."""

    numbers: Integers
    costs: Integers
    values: Floats

    @classmethod
    def of(cls, values: Floats, costs: Integers) -> _Options:
        """Return those of one item."""
        order = np.lexsort((-values, costs))
        kept = order[_rises(values[order])]
        return cls(kept, costs[kept], values[kept])

    def hull(self) -> list[int]:
        """Return those that are best at some price: the corners of the least concave function above all."""
        corners: list[int] = []
        for new in range(len(self.costs)):
            while len(corners) > 1 and self._slope(corners[-2], corners[-1]) <= self._slope(corners[-1], new):
                corners.pop()
            corners.append(new)
        return corners

    def _slope(self, one: int, other: int) -> float:
        return float((self.values[other] - self.values[one]) / (self.costs[other] - self.costs[one]))


@dataclass
class _Sums:
    """Sums of cost and of value that choices from some items come to, by rising cost and value.

    Both count from the items' first choices. `steps` is where each sum came from: for each item its place, and for
    each sum at that time the sum before it and the option that was added.
    """

    costs: Integers = field(default_factory=lambda: np.zeros(1, np.int64))
    values: Floats = field(default_factory=lambda: np.zeros(1))
    steps: list[tuple[int, Integers, Integers]] = field(default_factory=list)

    def add(self, item: int, options: _Options, price: float, window: float) -> None:
        """Add an item to all sums, but for those that lose more than the window."""
        parts = []
        for cost, value, number in zip(options.costs, options.values, options.numbers, strict=True):
            # In this order a loss of zero is exactly zero, not rounded.
            within = np.flatnonzero(price * (self.costs + cost) - (self.values + value) <= window)
            parts.append((self.costs[within] + cost, self.values[within] + value, within, np.full(len(within), number)))
            if sum(len(part[0]) for part in parts) > _MOST_SUMS:
                raise TooManySumsError
        costs, values, before, numbers = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((-values, costs))
        kept = order[_rises(values[order])]
        self.costs, self.values = costs[kept], values[kept]
        self.steps.append((item, before[kept], numbers[kept]))

    def choices(self, index: int) -> dict[int, int]:
        """Return the option of each item that a sum consists of."""
        found = {}
        for item, before, numbers in reversed(self.steps):
            found[item] = int(numbers[index])
            index = int(before[index])
        return found


def solve(values: Sequence[Floats], costs: Sequence[Integers], room: int) -> list[int]:
    """Return the option of each item, of the largest total value among those that cost no more than the room.

    Among choices of equal value it is one of the cheapest.

    Parameters
    ----------
    values, costs : sequence of ndarray of float64, of int64
        Those of each item's options. The cheapest options of all items together fit.
    room : int

    Raises
    ------
    TooManySumsError
        If too many choices are as good as the best, but for differences that decide.
    """
    # Differences and sums of the largest floats would overflow.
    exponent = max(int(np.frexp(np.abs(each).max())[1]) for each in values)
    items = [_Options.of(np.ldexp(worth, -exponent), cost) for worth, cost in zip(values, costs, strict=True)]
    first, price, last = _relaxed(items, room)
    chosen = [int(item.numbers[at]) for item, at in zip(items, first, strict=True)]
    if price == 0:
        return chosen
    left = room - sum(int(item.costs[at]) for item, at in zip(items, first, strict=True))
    # Where all costs are multiples of a unit, room for less than one is none, and the bound need not count it.
    unit = int(np.gcd.reduce(np.concatenate([item.costs - item.costs[0] for item in items])))
    left, price = left // unit, price * unit
    moves = [
        _Options(item.numbers, (item.costs - item.costs[at]) // unit, item.values - item.values[at])
        for item, at in zip(items, first, strict=True)
    ]
    sides = (_Sums(), _Sums())
    best, pair = _best_pair(sides, left)
    losses = [np.maximum(price * move.costs - move.values, 0) for move in moves]
    sizes = [price * np.abs(move.costs) + np.abs(move.values) for move in moves]
    # Not of moves that lose too much to be made, which may be larger than all others by far.
    rounding = _ROUNDING * math.fsum(
        [price * left, *(float(size[loss <= 2 * price * left].max()) for size, loss in zip(sizes, losses, strict=True))]
    )
    # First those that lose least by a change: they fill the room that is left. Of equals, those around the item that
    # did not fit: some of them can take room, the others give some.
    least = [float(np.partition(loss, 1)[1]) if len(loss) > 1 else math.inf for loss in losses]
    for item in sorted(range(len(items)), key=lambda item: (least[item], abs(item - last))):
        window = price * left - best + rounding
        within = losses[item] <= window
        if within.sum() == 1:
            continue
        move = moves[item]
        side = min(sides, key=lambda each: len(each.costs))
        side.add(item, _Options(move.numbers[within], move.costs[within], move.values[within]), price, window)
        best, pair = _best_pair(sides, left)
        if price * left - best <= rounding:
            break
    for side, index in zip(sides, pair, strict=True):
        for item, number in side.choices(index).items():
            chosen[item] = number
    return chosen


def _best_pair(sides: tuple[_Sums, _Sums], left: int) -> tuple[float, tuple[int, int]]:
    """Return the largest value of two sums, one of each side, that fit, and which they are; the cheapest of equals."""
    one, other = sides
    at = np.searchsorted(other.costs, left - one.costs, "right") - 1
    fits = np.flatnonzero(at >= 0)
    values = one.values[fits] + other.values[at[fits]]
    best = float(values.max())
    equal = fits[values == best]
    cheapest = equal[np.argmin(one.costs[equal] + other.costs[at[equal]])]
    return best, (int(cheapest), int(at[cheapest]))


def _relaxed(items: Sequence[_Options], room: int) -> tuple[list[int], float, int]:
    """Buy options in order of value for cost until one does not fit: return the choice, the price, and that one's item.

    The price is zero if all fit.
    """
    steps = []
    for number, item in enumerate(items):
        corners = item.hull()
        for one, other in pairwise(corners):
            steps.append((-item._slope(one, other), number, other))
    left = room - sum(int(item.costs[0]) for item in items)
    at = [0] * len(items)
    for slope, number, other in sorted(steps):
        cost = int(items[number].costs[other] - items[number].costs[at[number]])
        if cost > left:
            return at, -slope, number
        at[number], left = other, left - cost
    return at, 0.0, 0


def _rises(values: Floats) -> NDArray[np.bool_]:
    """Return where a value is larger than all before it."""
    before = np.concatenate([[-np.inf], np.maximum.accumulate(values)[:-1]])
    return values > before
