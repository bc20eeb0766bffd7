"""The counts of `benchmarks.bounds`."""

import platform

import pytest

from benchmarks.bounds import count, functions_of
from masksolve._networks import selection_network

pytestmark = [
    pytest.mark.studies,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the instructions' names are those of x86-64"),
]


@pytest.mark.parametrize(
    ("n", "m", "itemsize"),
    [
        (3, 7, 4),
        (3, 8, 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 4, 4), (3, 8, 8), (7, 17, 2)]),
    ],
)
def test_a_round_is_counted_to_take_the_min_and_max_of_the_network_once_a_line(n: int, m: int, itemsize: int) -> None:
    functions = functions_of(n, m, itemsize, ("move_rows", "move_columns"))
    for name in ("move_rows", "move_columns"):
        assert functions[name]["min/max"] == m * len(selection_network(n, m).steps)
        # Every entry and every potential across is loaded, and every potential of a line stored.
        assert functions[name]["loads"] >= 2 * m * m
        assert functions[name]["stores"] >= m


def test_ties_take_more_instructions() -> None:
    gaussian, ties = (count(3, 8, family, saturated=True) for family in ("gaussian", "int8-valued"))
    assert 1 < gaussian.rounds < ties.rounds
    assert 0 < gaussian.clocks < ties.clocks
