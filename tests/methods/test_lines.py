"""One-sided masks: the largest entries of every group, whatever its length and wherever it lies."""

import numpy as np
import pytest

import masksolve as ms
from masksolve._tiles import Direction
from tests.tables import FAMILIES, Weights, weights_of

# The last is longer than what is ranked by comparing pairs.
LENGTHS = [(2, 4), (3, 8), (7, 13), (5, 64), (20, 65)]
# Many groups along either axis, few of them, and a ragged end.
SHAPES = [(3, 1), (2, 150), (150, 2), (1, 1)]


def largest(weights: Weights, n: int, m: int) -> np.ndarray:
    """The slow and obvious: sort every group, of equal magnitudes the first comes first."""
    mask = np.zeros(weights.shape, np.bool_)
    for row, kept in zip(weights, mask, strict=True):
        for start in range(0, len(row), m):
            group = [abs(float(value)) for value in row[start : start + m]]
            for index in sorted(range(len(group)), key=lambda index: (-group[index], index))[:n]:
                kept[start + index] = True
    return mask


@pytest.mark.parametrize("direction", ["rows", "columns"])
@pytest.mark.parametrize(("n", "m"), LENGTHS, ids=lambda value: str(value))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_group_keeps_its_largest_entries_and_of_equal_ones_the_first(
    family: str, n: int, m: int, direction: Direction
) -> None:
    for seed, (rows, groups) in enumerate(SHAPES):
        weights = weights_of(family, (rows, groups * m + m // 3), seed)
        given = weights if direction == "rows" else weights.T
        mask = ms.solve_matrix(given, n, m, direction=direction)
        assert np.array_equal(mask if direction == "rows" else mask.T, largest(weights, n, m)), (rows, groups)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("direction", ["rows", "columns"])
@pytest.mark.parametrize("m", [4, 100])
def test_a_value_that_is_not_finite_is_named_wherever_it_is(m: int, direction: Direction, value: float) -> None:
    for where in [(0, 0), (7, 205), (8, 299)]:
        weights = np.ones((9, 300), np.float32)
        weights[where] = value
        with pytest.raises(ValueError, match=rf"weights\[{where[0]}, {where[1]}\] is {value}"):
            ms.solve_matrix(weights, 2, m, direction=direction)
