"""Matrices, ragged edges and convolutions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import masksolve as ms
from masksolve._pattern import Pattern
from masksolve._tiles import convolution_matrices, regions, tile_grids
from tests import oracle, strategies
from tests.tables import Pair, spread, weights_of


@given(
    hnp.array_shapes(min_dims=2, max_dims=4, max_side=9),
    strategies.patterns,
    strategies.readings,
    strategies.directions,
    strategies.layouts,
)
def test_tiles_cover_a_matrix_once_without_a_copy(
    shape: tuple[int, ...], pattern: Pair, saturated: bool, direction: str, layout: str
) -> None:
    array = strategies.LAYOUTS[layout](np.zeros(shape, np.int16))
    array.flags.writeable = True
    for region in regions(*shape[-2:], Pattern(*pattern), direction, saturated):  # type: ignore[arg-type]
        for grid in tile_grids(array, region):
            assert grid.shape[2:] == region.tile_shape
            assert np.shares_memory(grid, array)
            grid += 1
    assert (array == 1).all()


@given(
    hnp.array_shapes(min_dims=2, max_dims=3, max_side=9), strategies.patterns, strategies.readings, st.integers(0, 99)
)
def test_a_matrix_gets_the_masks_of_its_tiles(
    shape: tuple[int, ...], pattern: Pair, saturated: bool, seed: int
) -> None:
    n, m = pattern
    # Each with one optimum: of several, a tile may get another in other company.
    weights = weights_of("gaussian float32", shape, seed)
    mask = ms.solve_matrix(weights, n, m, saturated=saturated)
    for where, *_ in oracle.tiles(shape, m, saturated, "both"):
        assert (ms.solve_matrix(weights[where], n, m, saturated=saturated) == mask[where]).all()


@pytest.mark.parametrize(
    ("method", "shape", "pattern"),
    spread(
        ["exact", "greedy", "two-approx", "flow", "lp"],
        [(1, 1), (1, 7), (7, 1), (3, 3), (4, 5), (9, 4), (1, 100), (100, 1)],
        [(0, 4), (1, 4), (3, 4), (4, 4), (5, 8), (5, 64)],
        one_in=3,
    ),
)
def test_partial_groups_keep_at_most_n(shape: tuple[int, int], pattern: Pair, method: str) -> None:
    n, m = pattern
    weights = weights_of("gaussian float32", shape)
    mask = ms.solve_matrix(weights, n, m, method=method)
    assert oracle.is_valid(mask, n, m, saturated=method in ("exact", "flow", "lp"))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_lone_weight_is_kept(n: int) -> None:
    assert ms.solve_matrix([[-0.5]], n, 3).all()
    assert ms.solve_matrix([[[-0.5]], [[1e-30]]], n, 3).all()


def test_weights_of_a_convolution_are_a_matrix_for_every_kernel_position() -> None:
    weights = weights_of("gaussian float32", (8, 12, 3, 2))
    matrices = convolution_matrices(weights)
    assert matrices.shape == (3, 2, 8, 12)
    assert np.shares_memory(matrices, weights)
    for y, x in np.ndindex(3, 2):
        assert (matrices[y, x] == weights[:, :, y, x]).all()


@pytest.mark.parametrize("kernel", [(), (3,), (3, 3), (1, 2, 3)])
@pytest.mark.parametrize("axis", [0, 1], ids=["outputs", "inputs"])
def test_a_pruned_convolution_is_sparse_along_both_its_channel_axes(kernel: tuple[int, ...], axis: int) -> None:
    weights = weights_of("gaussian float32", (8, 12, *kernel))
    mask = np.moveaxis(ms.solve_matrix(convolution_matrices(weights), 3, 4), (-2, -1), (0, 1))
    assert mask.shape == weights.shape
    groups = np.moveaxis(mask, axis, -1).reshape(-1, 4)
    assert (groups.sum(axis=1) == 3).all()


def test_a_linear_weight_is_the_convolution_without_a_kernel() -> None:
    weights = weights_of("int8", (5, 6))
    assert convolution_matrices(weights) is weights or np.shares_memory(convolution_matrices(weights), weights)
    assert (convolution_matrices(weights) == weights).all()
