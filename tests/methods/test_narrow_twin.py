"""The functions of `narrow.layout.Code`: the twin, run by Python, leaves in memory what machine code does."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

from masksolve._methods.exact.narrow import codegen, plain
from masksolve._methods.exact.narrow.layout import KEEP_COLUMNS, KEEP_ROWS, LANES, Code, layout, new_memory
from tests.tables import weights_of

# n, rows, columns: of one to three pieces of eight columns, with columns and rows that there are not.
SHAPES = [(1, 2, 2), (2, 3, 3), (3, 4, 4), (2, 5, 3), (4, 8, 8), (5, 9, 9), (3, 9, 17)]
# What is kept of the potentials, and the bits by which units are finer than those of the first pass.
STARTS = [0, KEEP_COLUMNS, KEEP_COLUMNS | KEEP_ROWS | 6]
QUANTUM, SPREAD = 10, 200
FIELDS = (
    *("largest", "units", "scales", "quanta", "zeros", "proven", "lowest_column", "lowest_row"),
    *("bits", "zero_bits", "short", "u", "v", "entries"),
)


def view_of(address: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(int(address)), dtype).reshape(shape)


@pytest.fixture(autouse=True)
def python_runs_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "carray", view_of)
    monkeypatch.setattr(plain, "pointer", lambda address: address)
    monkeypatch.setattr(plain, "pick", lambda larger, a, b: max(a, b) if larger else min(a, b))


class Both:
    """The memory of a group of tiles and their masks, for machine code, [0], and for the twin, [1]."""

    def __init__(self, tiles: NDArray[Any], n: int, at_most: bool) -> None:
        _, rows, cols = tiles.shape
        self.shape, self.tiles, self.at = (rows, cols), tiles, layout(rows, cols)
        arguments = (n, rows, cols, at_most, at_most, tiles.itemsize)
        self.programs = (codegen.program(*arguments), plain.program(*arguments))
        self.memories = (new_memory(rows, cols), new_memory(rows, cols))
        self.masks = (np.zeros((LANES, rows, cols), np.uint8), np.zeros((LANES, rows, cols), np.uint8))
        rng = np.random.default_rng(0)
        columns, row_potentials = rng.standard_normal((LANES, cols)), rng.standard_normal((LANES, rows))
        shares = np.rint(SPREAD * rng.random((rows, cols)))
        top = np.abs(tiles.astype(np.float64)).max()
        for memory in self.memories:
            at = self.at
            for start in (at.weights, at.masks):
                memory[start : start + 8 * LANES].view(np.int64)[:] = np.arange(LANES) * rows * cols
            for start, width, values in (
                (at.columns, at.column_width, columns * top / 8),
                (at.rows, at.row_width, (row_potentials + 4) * top / 8),
                (at.shares, at.column_width, shares),
            ):
                whole = memory[start : start + 4 * len(values) * width].view(np.float32).reshape(len(values), width)
                with np.errstate(all="ignore"):
                    whole[:, : values.shape[1]] = values

    def call(self, name: str, a: int = 0, b: int = 0, c: int = 0, d: int = 0) -> None:
        """Call both functions, `masks` for d meaning where each stores its own."""
        addresses = [int(program[Code._fields.index(name)]) for program in self.programs]
        stores = name in ("prove", "prove_perturbed", "store_filled")
        at = [masks.ctypes.data if stores else d for masks in self.masks]
        function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(addresses[0])
        function(self.memories[0].ctypes.data, a, b, c, at[0])
        which, numbers, count = view_of(addresses[1], (3,), np.int64)
        with np.errstate(all="ignore"):
            numbers = view_of(numbers, (count,), np.int64)
            plain._run(which, numbers, self.memories[1].ctypes.data, *(np.int64(each) for each in (a, b, c, at[1])))

    def assert_same(self, after: str) -> None:
        assert np.array_equal(*self.masks), after
        starts = [*self.at[: self.at._fields.index("size") + 1]]
        for field in FIELDS:
            k = self.at._fields.index(field)
            ours, twin = (memory[starts[k] : starts[k + 1]] for memory in self.memories)
            assert np.array_equal(ours, twin), (after, field)
        for start, width, count in (
            (self.at.columns, self.at.column_width, self.shape[1]),
            (self.at.rows, self.at.row_width, self.shape[0]),
        ):
            ours, twin = (
                memory[start : start + 4 * LANES * width].view(np.uint32).reshape(LANES, width)[:, :count]
                for memory in self.memories
            )
            assert np.array_equal(ours, twin), (after, "potentials")


CASES = [
    (*shape, at_most, family)
    for shape in SHAPES
    for at_most in (False, True)
    for family in ("gaussian float32", "gaussian float64", "int8", "half zero", "subnormal float32")
]
# Python takes seconds for the larger tiles.
QUICK = [
    (1, 2, 2, True, "half zero"),
    (2, 3, 3, True, "half zero"),
    (2, 3, 3, False, "subnormal float32"),
    (3, 4, 4, False, "gaussian float32"),
    (3, 4, 4, True, "gaussian float64"),
    (2, 5, 3, False, "int8"),
]


@pytest.mark.parametrize(
    ("n", "rows", "cols", "at_most", "family"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_every_function_leaves_the_same_in_memory(n: int, rows: int, cols: int, at_most: bool, family: str) -> None:
    weights = weights_of(family, (LANES * rows, cols))
    tiles = weights.astype(weights.dtype if weights.itemsize == 8 else np.float32).reshape(LANES, rows, cols)
    for perturbed in ("", "_perturbed"):
        for start in STARTS:
            both = Both(tiles, n, at_most)
            steps: list[tuple[Any, ...]] = [("load" + perturbed, tiles.ctypes.data, cols, start, QUANTUM)]
            for beyond in (0, 9000):
                steps += [("move_rows", beyond), ("move_columns", 9000)]
            steps += [("prove" + perturbed, tiles.ctypes.data, cols, cols), ("find_lowest",)]
            if at_most:
                steps += [("fill",), *(("store_filled", lane, 0, cols) for lane in range(LANES))]
            for name, *arguments in steps:
                both.call(name, *arguments)
                both.assert_same(f"{name} from {start}")
