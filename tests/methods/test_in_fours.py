"""Tiles in a multiple of four columns have functions of their own, which do what those of all do, bit for bit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from llvmlite import binding, ir
from numpy.typing import NDArray

from masksolve._machine_code import engine_of, target_machine
from masksolve._methods.exact.narrow import codegen
from masksolve._methods.exact.narrow.layout import LANES, layout, new_memory
from tests import processes
from tests.tables import FAMILIES, Pair, spread, weights_of

Place = tuple[int, int]
_CALL = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)
_NAMES = ("load", "move_rows", "move_columns", codegen.FIND_POTENTIALS, "prove")


@cache
def functions(n: int, size: int, kind: type) -> tuple[dict[str, Callable[..., None]], Any]:
    """Return what a writer writes, and the owner of it."""
    module = ir.Module()
    for name in _NAMES:
        function = ir.Function(module, codegen._PROTOTYPE, name)
        builder = ir.IRBuilder(function.append_basic_block())
        writer = kind(builder, function.args, n, size, size, False, False, 4)
        if name.startswith("move"):
            writer.move(along_rows=name == "move_rows")
        else:
            getattr(writer, name)()
        builder.ret_void()
    owner = engine_of(target_machine().emit_object(binding.parse_assembly(str(module))))
    return {name: _CALL(owner.get_function_address(name)) for name in _NAMES}, owner


def two_passes(
    weights: NDArray[np.float32], masks: NDArray[np.uint8], places: list[Place], n: int, size: int, kind: type
) -> list[dict[str, NDArray[np.generic]]]:
    """Return what a pass leaves in memory, and what a finer one leaves that goes on from there."""
    code, _ = functions(n, size, kind)
    at, memory = layout(size, size), new_memory(size, size)
    here, row = memory.ctypes.data, weights.strides[0] // 4

    def of(field: str, dtype: type, count: int) -> NDArray[np.generic]:
        start = getattr(at, field)
        return memory[start : start + np.dtype(dtype).itemsize * count].view(dtype)

    for field, array in (("weights", weights), ("masks", masks)):
        steps = [size * stride // array.itemsize for stride in array.strides]
        of(field, np.int64, LANES)[:] = [p * steps[0] + q * steps[1] for p, q in places]
    left = []
    for keeps in (0, codegen.KEEP_COLUMNS | codegen.KEEP_ROWS | 6):
        code["load"](here, weights.ctypes.data, row, keeps, 0)
        found = {field: of(field, np.int32, LANES).copy() for field in ("largest", "units", "scales")}
        left.append(found)
        if (found["largest"] >= 0x7F800000).any():
            return [{"largest": found["largest"] >= 0x7F800000}]
        found["entries"] = of("entries", np.int16, size * size * LANES).copy()
        for beyond in (0, 3000):
            code["move_rows"](here, beyond, 0, 0, 0)
            code["move_columns"](here, beyond, 0, 0, 0)
        code["prove"](here, weights.ctypes.data, row, masks.strides[0], masks.ctypes.data)
        found["proven"] = of("proven", np.int32, LANES).copy()
        for field, width in (("columns", at.column_width), ("rows", at.row_width)):
            found[field] = of(field, np.int32, width * LANES).reshape(LANES, -1)[:, :size].copy()
    return left


def places_of(kind: str, rng: np.random.Generator, down: int, across: int) -> list[Place]:
    """Tiles of a group: neighbours, as far as there are any, the last ones repeated, or any."""
    if kind == "any":
        return [(int(rng.integers(down)), int(rng.integers(across))) for _ in range(LANES)]
    start = int(rng.integers(down * across))
    numbers = [min(start + lane, down * across - 1) for lane in range(LANES)]
    return [divmod(number, across) for number in numbers]


@pytest.mark.parametrize(
    ("pattern", "family"), spread([(1, 4), (2, 4), (3, 4), (3, 8), (5, 12), (8, 16)], FAMILIES, one_in=2)
)
def test_tiles_are_left_as_by_the_functions_of_all_tiles(pattern: Pair, family: str) -> None:
    n, size = pattern
    rng = np.random.default_rng(n)
    own = codegen._FourByFour if size == 4 else codegen._InFours
    for order in ("neighbours", "any"):
        for across in (1, 3, 40):
            shape = (3 * size, size * across)
            with np.errstate(over="ignore"):
                weights = np.ascontiguousarray(weights_of(family, shape, across).astype(np.float32))
            places = places_of(order, rng, 3, across)
            found, stored = [], []
            for kind in (codegen._Writer, own):
                masks = np.full((shape[0], shape[1] + 5), 7, np.uint8)
                found.append(two_passes(weights, masks[:, 2:], places, n, size, kind))
                stored.append(masks)
            for one, other in zip(*found, strict=True):
                for field in one:
                    assert np.array_equal(one[field], other[field]), field
            assert np.array_equal(*stored)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("size", [4, 8])
def test_an_entry_that_is_not_finite_is_seen_wherever_it_is(size: int, value: float) -> None:
    own = codegen._FourByFour if size == 4 else codegen._InFours
    for lane in range(LANES):
        for where in np.ndindex(size, size):
            weights = np.ones((size, size * LANES), np.float32)
            weights[where[0], size * lane + where[1]] = value
            places = [(0, tile) for tile in range(LANES)]
            (found,) = two_passes(weights, np.zeros(weights.shape, np.uint8), places, 2, size, own)
            assert np.array_equal(np.flatnonzero(found["largest"]), [lane])


@processes.X86_64
@processes.EVERY_PROCESSOR
@processes.some_sizes([4, 12], [64])
def test_they_are_compiled_on_every_kind_of_processor(processor: str, sizes: list[int]) -> None:
    modules = """
from masksolve._methods.exact.narrow.codegen import write_module

for size in sizes:
    yield write_module(1, size, size, False, False, 4)
"""
    processes.compile_for(processor, sizes, modules)
