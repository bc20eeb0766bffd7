"""Equilibration in 16-bit integers: what it calls proven is optimal, whatever potentials it starts from."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from llvmlite import binding
from numpy.typing import NDArray

from masksolve._machine_code import target_machine
from masksolve._methods import exact
from masksolve._methods.exact.inner_loops import narrow_program
from masksolve._methods.exact.narrow.codegen import write_module
from masksolve._methods.exact.narrow.layout import LANES, new_memory
from masksolve._methods.exact.narrow.passes import solve_as_at_most, solve_exactly
from masksolve._networks import selection_network
from masksolve._tiles import Margins
from tests import processes
from tests.tables import FAMILIES, PATTERNS, weights_of

# n, rows and columns of tiles; LLVM takes six seconds for the code of the last.
ALL_SQUARES = [(n, m, m) for n, m in PATTERNS if n < m]
SQUARES = [each if each[1] <= 32 else pytest.param(*each, marks=pytest.mark.slow) for each in ALL_SQUARES]
RECTANGLES = [(2, 3, 5, False, True), (2, 5, 3, True, False), (7, 31, 9, False, False)]
# Augmenting paths, which judge, take seconds for others of this size.
LARGE_TILES = ["gaussian float32", "gaussian float64", "int8", "half zero"]
# Of each pass: what its `Grain` holds, and its rounds.
FEW_ROUNDS, PASSES = [(0, 0, 0, 1)], [(0, 0, 0, 12), (6, 0, 0, 8), (12, 0, 0, 8)]
TIES = [(0, 0, 0, 12), (8, 12, 256, 12), (8, 16, 4096, 12)]
TIES_AT_ONCE = [(0, 8, 64, 8), (2, 8, 64, 8), (8, 8, 64, 8)]
Passes = list[tuple[int, int, int, int]]


def grid_of(tiles: NDArray[Any], masks: NDArray[np.bool_]) -> tuple[int, ...]:
    """Tiles (k, r, c) one below the other, and their masks, as the passes take them."""
    _, rows, cols = tiles.shape
    return tiles.ctypes.data, rows * cols, 0, cols, masks.ctypes.data, rows * cols, 0, cols, 1, rows, cols


def schedule_of(passes: Passes) -> NDArray[np.float64]:
    return np.array([(*each, 1.2, 0.02, 1.5) for each in passes])


def is_done(where: NDArray[np.int64], left: int, others: int) -> NDArray[np.bool_]:
    """Which tiles are not among those that are left, or left as others."""
    done = np.ones(where.shape[1], np.bool_)
    done[np.concatenate([where[0, :left], where[1, :others]]) >> 32] = False
    return done


def proven_masks(
    tiles: NDArray[Any], margins: Margins, passes: Passes, start: NDArray[Any] | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Masks of tiles (k, r, c) of float32 or float64, and which of them are called proven."""
    count, rows, cols = tiles.shape
    masks = np.zeros(tiles.shape, np.bool_)
    program = narrow_program(
        margins.kept, rows, cols, not margins.exact_rows, not margins.exact_columns, tiles.itemsize
    )
    where = np.empty((2, count), np.int64)
    if start is not None:
        with np.errstate(all="ignore"):
            start = start.astype(tiles.dtype)
    left, others, _ = solve_exactly(
        program,
        margins.kept,
        grid_of(tiles, masks),
        np.arange(count) << 32,
        np.empty((0, 1), tiles.dtype) if start is None else start,
        new_memory(rows, cols),
        schedule_of(passes),
        np.random.default_rng(1).random((rows, cols)),
        np.empty((0, 1), tiles.dtype),
        where,
        np.empty((2, count, cols), np.float32),
        np.empty((2, count, rows), np.float32),
        False,
    )
    return masks, is_done(where, left, others)


def tiles_of(family: str, count: int, rows: int, cols: int) -> NDArray[Any]:
    weights = weights_of(family, (count * rows, cols)).astype(np.float64)
    tiles = weights.reshape(count, rows, cols)
    with np.errstate(all="ignore"):
        narrowed = tiles.astype(np.float32)
    return narrowed if (narrowed == tiles).all() else tiles


@pytest.mark.parametrize(
    ("n", "rows", "cols", "exact_rows", "exact_columns"),
    [
        pytest.param(*square, exact_, exact_, marks=[pytest.mark.slow] if square[1] > 32 else [])
        for square in ALL_SQUARES
        for exact_ in (True, False)
    ]
    + RECTANGLES,
    ids=str,
)
def test_what_is_called_proven_is_optimal(n: int, rows: int, cols: int, exact_rows: bool, exact_columns: bool) -> None:
    margins = Margins(n, exact_rows, exact_columns)
    rng = np.random.default_rng(0)
    for family in FAMILIES if cols <= 16 else LARGE_TILES:
        tiles = tiles_of(family, LANES + 3, rows, cols)
        somewhere = rng.standard_normal((len(tiles), cols)) * (np.abs(tiles).max() / 2**20)
        for start, passes in (
            *((None, passes) for passes in (FEW_ROUNDS, PASSES, TIES, TIES_AT_ONCE)),
            *((somewhere, passes) for passes in (FEW_ROUNDS, TIES)),
            *((somewhere * 2**18, passes) for passes in (PASSES, TIES)),
        ):
            masks, proven = proven_masks(tiles, margins, passes, start)
            if proven.any():
                importance = np.abs(tiles[proven].astype(np.float64))[np.newaxis]
                _, _, optimal = exact.solve_importance(importance, margins, None, masks[proven][np.newaxis])
                assert optimal.all(), (family, passes)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "rows", "cols"), SQUARES, ids=str)
def test_nearly_all_gaussian_tiles_are_proven(n: int, rows: int, cols: int, dtype: type) -> None:
    tiles = np.random.default_rng(0).standard_normal((10 * LANES, rows, cols)).astype(dtype)
    passes = [(*grain, max(rounds, rows // 2)) for *grain, rounds in PASSES]
    _, proven = proven_masks(tiles, Margins(n, True, True), passes)
    assert proven.mean() > 0.95


@pytest.mark.parametrize("family", ["int8-valued", "bfloat16-valued"])
@pytest.mark.parametrize(("n", "rows", "cols"), [shape for shape in ALL_SQUARES if shape[1] <= 32], ids=str)
def test_most_tiles_that_tie_are_proven(n: int, rows: int, cols: int, family: str) -> None:
    gaussian = np.random.default_rng(0).standard_normal((2 * LANES, rows, cols)).astype(np.float32)
    tiles = {
        "int8-valued": np.round(40 * gaussian),
        "bfloat16-valued": (gaussian.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32),
    }[family]
    passes = [(*grain, max(rounds, rows // 2)) for *grain, rounds in TIES]
    _, proven = proven_masks(tiles, Margins(n, True, True), passes)
    assert proven.mean() > 0.9


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.8])
@pytest.mark.parametrize(("n", "rows", "cols"), SQUARES, ids=str)
def test_what_is_filled_up_with_zeros_is_optimal(n: int, rows: int, cols: int, density: float) -> None:
    rng = np.random.default_rng(0)
    count = LANES + 3 if cols <= 32 else 4
    tiles = (
        np.round(9 * rng.standard_normal((count, rows, cols))) * (rng.random((count, rows, cols)) < density)
    ).astype(np.float32)
    masks = np.zeros(tiles.shape, np.bool_)
    where = np.tile(np.arange(count) << 32, (2, 1))
    left, others = solve_as_at_most(
        narrow_program(n, rows, cols, True, True, 4),
        n,
        grid_of(tiles, masks),
        np.empty((0, 1), np.float32),
        new_memory(rows, cols),
        schedule_of(TIES),
        rng.random((rows, cols)),
        np.empty((0, 1), np.float32),
        where,
        np.empty((2, count, cols), np.float32),
        np.empty((2, count, rows), np.float32),
        *(0, count, 0),
        False,
    )
    solved = is_done(where, left, others)
    assert solved.all() or density > 0
    importance = np.abs(tiles[solved].astype(np.float64))[np.newaxis]
    if solved.any():
        _, _, optimal = exact.solve_importance(importance, Margins(n, True, True), None, masks[solved][np.newaxis])
        assert optimal.all()


@processes.X86_64
def test_selection_is_packed_min_and_max_of_sixteen_bits_alone() -> None:
    assembly = target_machine().emit_assembly(binding.parse_assembly(write_module(3, 7, 7, False, False, 4)))
    moves = assembly.split("\nmove_rows:")[1].split(".size")[0]
    assert len(re.findall(r"\bv?p(?:min|max)sw\b", moves)) == len(selection_network(3, 7).steps)
    assert len(re.findall(r"\bv?pmulhw\b", moves)) == 1


@processes.X86_64
@processes.EVERY_PROCESSOR
@processes.some_sizes([3, 5, 8, 9, 17], [2, 4, 7, 15, 16, 31, 33, 64])
def test_tiles_of_every_size_can_be_loaded_and_proven_on_every_kind_of_processor(
    processor: str, sizes: list[int]
) -> None:
    modules = """
from masksolve._methods.exact.narrow import codegen

for size in sizes:
    module = ir.Module()
    for name in ("load", codegen.FIND_POTENTIALS, "prove"):
        function = ir.Function(module, codegen._PROTOTYPE, name)
        builder = ir.IRBuilder(function.append_basic_block())
        writer = codegen._Writer(builder, function.args, 1, 3, size, size % 2 == 0, size % 3 == 0, 4)
        getattr(writer, name)()
        builder.ret_void()
    yield module
"""
    processes.compile_for(processor, sizes, modules, optimised=False)
