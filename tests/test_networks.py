"""Selection networks against sorting."""

import numpy as np
import pytest
from numpy.typing import NDArray

from masksolve._networks import selection_network


def run(n: int, values: NDArray[np.int8]) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """The n-th and the (n+1)-th largest of each column."""
    network = selection_network(n, len(values))
    wires = list(values)
    for is_max, a, b in network.steps:
        wires.append((np.maximum if is_max else np.minimum)(wires[a], wires[b]))
    return wires[network.nth], wires[network.following]


@pytest.mark.parametrize("m", range(2, 17))
def test_all_zeros_and_ones_are_selected_right_and_with_them_all_values(m: int) -> None:
    # The zero-one principle: Knuth, The Art of Computer Programming 3, section 5.3.4, theorem Z.
    values = (np.arange(2**m) >> np.arange(m)[:, np.newaxis] & 1).astype(np.int8)
    ones = values.sum(axis=0)
    for n in range(1, m):
        nth, following = run(n, values)
        assert np.array_equal(nth, ones >= n)
        assert np.array_equal(following, ones > n)


@pytest.mark.parametrize(
    "m", [m if m in (17, 24, 31, 32, 33, 63, 64) else pytest.param(m, marks=pytest.mark.slow) for m in range(17, 65)]
)
def test_random_values_are_selected_right(m: int) -> None:
    rng = np.random.default_rng(m)
    for n in range(1, m):
        values = rng.permuted(np.repeat(np.arange(m, dtype=np.int8)[:, np.newaxis], 50, axis=1), axis=0)
        ones = (values >= m - n).astype(np.int8)
        for case in (values, ones, values // 3):
            nth, following = run(n, case)
            descending = -np.sort(-case, axis=0)
            assert np.array_equal(nth, descending[n - 1])
            assert np.array_equal(following, descending[n])


@pytest.mark.parametrize(("n", "m", "steps"), [(2, 4, 8), (4, 8, 28), (8, 16, 92), (16, 32, 272), (4, 16, 72)])
def test_networks_stay_as_short_as_they_are(n: int, m: int, steps: int) -> None:
    assert len(selection_network(n, m).steps) <= steps
