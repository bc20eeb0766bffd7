"""Judges the masks of single lines, each by itself: it keeps the n largest, or, where it may, all that is not zero."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding, ir
from numpy.typing import NDArray

# Importing it says whether there is machine code.
import masksolve._judge.inner_loops  # noqa: F401
from masksolve import _translated
from masksolve._judge.kernels import judge_lines, line_buffers
from masksolve._machine_code import VECTOR_BYTES, address_of, lock, new_engine, pointer_to

# Of longer lines, whose code would be long.
_LONGEST = 64
_BOOL, _BYTE, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
_DOUBLE = ir.DoubleType()
_ARGUMENTS = (
    *("weights", "masks", "down", "weights_down", "masks_down", "across", "weights_apart", "masks_apart"),
    *("n", "exact", "scale", "importance", "kept", "optimal", "out_down"),
)
_PROTOTYPE = ir.FunctionType(_I64, [_I64] * len(_ARGUMENTS))
_CALL = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * len(_ARGUMENTS))


def judge(
    lines: NDArray[Any],
    masks: NDArray[np.bool_],
    n: int,
    exact: bool,
    shift: int,
    sums: tuple[NDArray[np.float64], NDArray[np.float64]],
    optimal: NDArray[np.bool_],
) -> bool:
    """Judge the masks of lines (p, q, k) of float32 or float64; return whether they can be judged.

    They can if no mask keeps more than n, and all weights are finite. `exact` is whether a line holds n; `sums`, two of
    (p, q), are filled with all importance and what is kept, times 2**-shift, and `optimal` (p, q) with the verdicts.
    """
    given = _Given(lines, masks, (*sums, optimal))
    if _translated.has_machine_code and lines.shape[2] <= _LONGEST:
        for own in (given, given.turned()):
            for side_by_side in (True, False):
                if _can_take(own, side_by_side):
                    return _judge_in_lanes(own, n, exact, shift, side_by_side)
    # Vectors run along the second axis.
    own = given.turned() if lines.shape[1] < lines.shape[0] else given
    buffers = tuple(line_buffers(lines.shape[2], lines.dtype))
    return bool(judge_lines(own.lines, own.masks, n, exact, shift, *own.out, buffers))


class _Given(NamedTuple):
    """Lines and masks (p, q, k), and what is to be filled (p, q): all importance, what is kept, the verdicts."""

    lines: NDArray[Any]
    masks: NDArray[np.bool_]
    out: tuple[NDArray[Any], ...]

    def turned(self) -> _Given:
        """Return the same with p and q exchanged."""
        return _Given(
            self.lines.swapaxes(0, 1), self.masks.swapaxes(0, 1), tuple(array.swapaxes(0, 1) for array in self.out)
        )


def _can_take(given: _Given, side_by_side: bool) -> bool:
    axis = 1 if side_by_side else 2
    lie_together = all(array.strides[axis] == array.itemsize for array in given[:2])
    return lie_together and given.lines.shape[1] >= VECTOR_BYTES // given.lines.itemsize


def _judge_in_lanes(given: _Given, n: int, exact: bool, shift: int, side_by_side: bool) -> bool:
    lines, masks, out = given
    down, across, length = lines.shape
    function = _function(length, lines.itemsize, side_by_side)
    apart = 2 if side_by_side else 1
    # Results are written one line after the other.
    written = [each if each.strides[1] == each.itemsize else np.empty(each.shape, each.dtype) for each in out]
    bad: int = function(
        address_of(lines),
        address_of(masks),
        down,
        lines.strides[0],
        masks.strides[0],
        across,
        lines.strides[apart],
        masks.strides[apart],
        n,
        exact,
        int(np.float64(2.0**-shift).view(np.int64)),
        *map(address_of, written),
        written[2].strides[0],
    )
    for each, result in zip(out, written, strict=True):
        if each is not result:
            each[...] = result
    return bad == 0


@cache
def _function(*arguments: int) -> Callable[..., int]:
    with lock:
        return _CALL(_engine_of(*arguments).get_function_address("judge"))


@cache
def _engine_of(*arguments: int) -> binding.ExecutionEngine:
    return new_engine(write_module, arguments, "judge-lines", f"lines of {arguments[0]}")


def write_module(length: int, itemsize: int, side_by_side: bool) -> str:
    """Return the LLVM IR of the function that judges lines of this length, of floats of this size."""
    module = ir.Module()
    function = ir.Function(module, _PROTOTYPE, "judge")
    builder = ir.IRBuilder(function.append_basic_block())
    _Writer(builder, function.args, length, itemsize, side_by_side).write()
    return str(module)


class _Writer:
    """Writes the function: a line in each lane.

    Floats that are not negative are compared as the integers that their bits are. The sign of an entry says whether it
    is kept: so the least integer of a line is the least entry that is kept, if any is, and the largest is the largest
    other one.
    """

    def __init__(
        self, builder: ir.IRBuilder, arguments: Sequence[ir.Value], length: int, itemsize: int, side_by_side: bool
    ) -> None:
        self.builder, self.length, self.itemsize, self.side_by_side = builder, length, itemsize, side_by_side
        self.given = dict(zip(_ARGUMENTS, arguments, strict=True))
        self.lanes = VECTOR_BYTES // itemsize
        self.element = ir.IntType(8 * itemsize)
        self.integers = ir.VectorType(self.element, self.lanes)
        self.doubles = ir.VectorType(_DOUBLE, self.lanes)
        self.floats = self.doubles if itemsize == 8 else ir.VectorType(ir.FloatType(), self.lanes)

    def number(self, value: int) -> ir.Value:
        return ir.Constant(self.integers, [value] * self.lanes)

    def splat(self, scalar: ir.Value) -> ir.Value:
        kind = ir.VectorType(scalar.type, self.lanes)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, _I32(0))
        return self.shuffled(one, one, [0] * self.lanes)

    def shuffled(self, a: ir.Value, b: ir.Value, order: Sequence[int]) -> ir.Value:
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(order)), list(order)))

    def place(self, name: str, *steps: tuple[ir.Value, ir.Value | int]) -> ir.Value:
        """Return an address that was given, some steps further: their number, and the bytes of each."""
        address = self.given[name]
        for number, step in steps:
            size = _I64(step) if isinstance(step, int) else step
            address = self.builder.add(address, self.builder.mul(number, size))
        return address

    def read(self, address: ir.Value, element: ir.Type, count: int) -> ir.Value:
        kind = ir.VectorType(element, count)
        return self.builder.load(self.builder.inttoptr(address, pointer_to(kind)), align=1, typ=kind)

    def store(self, value: ir.Value, address: ir.Value) -> None:
        self.builder.store(value, self.builder.inttoptr(address, pointer_to(value.type)), align=1)

    def for_each(self, count: ir.Value, body: Callable[[ir.Value], None]) -> None:
        """Write a loop over 0 ... count - 1; it runs at least once."""
        builder, before = self.builder, self.builder.block
        loop, after = builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        index = builder.phi(_I64)
        index.add_incoming(_I64(0), before)
        body(index)
        following = builder.add(index, _I64(1))
        index.add_incoming(following, builder.block)
        builder.cbranch(builder.icmp_unsigned("<", following, count), loop, after)
        builder.position_at_end(after)

    def write(self) -> None:
        builder, given = self.builder, self.given
        wrong = builder.alloca(_I64)
        builder.store(_I64(0), wrong)
        last = builder.sub(given["across"], _I64(self.lanes))

        def judge_row(p: ir.Value) -> None:
            def judge_group(group: ir.Value) -> None:
                # The last group ends where the lines do; it may have lines of the one before.
                first = builder.mul(group, _I64(self.lanes))
                first = builder.select(builder.icmp_signed("<", first, last), first, last)
                bad = builder.zext(self.judge(p, first), _I64)
                builder.store(builder.or_(builder.load(wrong, typ=_I64), bad), wrong)

            groups = builder.udiv(builder.add(given["across"], _I64(self.lanes - 1)), _I64(self.lanes))
            self.for_each(groups, judge_group)

        self.for_each(given["down"], judge_row)
        builder.ret(builder.load(wrong, typ=_I64))

    def judge(self, p: ir.Value, first: ir.Value) -> ir.Value:
        """Judge the lines from `first` on; return bits of those that cannot be judged."""
        builder, given = self.builder, self.given
        magnitude = self.number((1 << (8 * self.itemsize - 1)) - 1)
        nothing = ir.Constant(self.doubles, [0.0] * self.lanes)
        least, largest, ones, total, kept = magnitude, self.number(-1), self.number(0), nothing, nothing
        scale = self.splat(builder.bitcast(given["scale"], _DOUBLE)) if self.itemsize == 8 else None
        for entry in self.entries(p, first):
            least = builder.select(builder.icmp_signed("<", entry, least), entry, least)
            largest = builder.select(builder.icmp_signed(">", entry, largest), entry, largest)
            is_kept = builder.ashr(entry, self.number(8 * self.itemsize - 1))
            ones = builder.sub(ones, is_kept)
            weight = builder.and_(entry, magnitude)
            total = builder.fadd(total, self.scaled(weight, scale))
            kept = builder.fadd(kept, self.scaled(builder.and_(weight, is_kept), scale))
        zero = self.number(0)
        least = builder.select(builder.icmp_signed("<", least, zero), builder.and_(least, magnitude), magnitude)
        n = self.splat(given["n"] if self.itemsize == 8 else builder.trunc(given["n"], self.element))
        # Where nothing is left, the largest is negative.
        is_best = builder.icmp_signed(">=", least, largest)
        may_be_short = self.splat(builder.icmp_signed("==", given["exact"], _I64(0)))
        is_all = builder.and_(builder.icmp_signed("<=", largest, zero), may_be_short)
        is_full = builder.icmp_signed("==", ones, n)
        optimal = builder.select(is_full, is_best, is_all)
        for value, name, size in ((total, "importance", 8), (kept, "kept", 8), (optimal, "optimal", 1)):
            line = builder.add(builder.mul(p, given["out_down"]), first)
            value = builder.zext(value, ir.VectorType(_BYTE, self.lanes)) if size == 1 else value
            self.store(value, self.place(name, (line, size)))
        is_finite = builder.fcmp_ordered("<", total, ir.Constant(self.doubles, [float("inf")] * self.lanes))
        bad = builder.or_(builder.icmp_signed(">", ones, n), builder.not_(is_finite))
        return builder.bitcast(bad, ir.IntType(self.lanes))

    def scaled(self, bits: ir.Value, scale: ir.Value | None) -> ir.Value:
        value = self.builder.bitcast(bits, self.floats)
        return self.builder.fpext(value, self.doubles) if scale is None else self.builder.fmul(value, scale)

    def entries(self, p: ir.Value, first: ir.Value) -> list[ir.Value]:
        """Return the entries of lines, one in each lane: magnitudes, with a sign if they are kept."""
        given, size = self.given, self.itemsize
        if self.side_by_side:
            weights = self.place("weights", (p, given["weights_down"]), (first, size))
            masks = self.place("masks", (p, given["masks_down"]), (first, 1))
            found = []
            for k in range(self.length):
                if k > 0:
                    weights = self.builder.add(weights, given["weights_apart"])
                    masks = self.builder.add(masks, given["masks_apart"])
                values = self.read(weights, self.element, self.lanes)
                found.append(self.signed(values, self.read(masks, _BYTE, self.lanes)))
            return found
        # In parts of 16 bytes, within which all shuffles stay.
        places, found = 16 // size, []
        starts = [
            (
                self.place("weights", (p, given["weights_down"]), (first, given["weights_apart"])),
                self.place("masks", (p, given["masks_down"]), (first, given["masks_apart"])),
            )
        ]
        for _ in range(1, self.lanes):
            steps = given["weights_apart"], given["masks_apart"]
            starts.append(tuple(self.builder.add(start, step) for start, step in zip(starts[-1], steps, strict=True)))
        for k in range(0, self.length, places):
            count = min(places, self.length - k)
            vectors = []
            for j in range(places):
                weights, masks = [], []
                for own_weights, own_masks in starts[j::places]:
                    weights.append(self.part(own_weights, k, self.element, count, places))
                    masks.append(self.part(own_masks, k, _BYTE, count, places))
                vectors.append(self.signed(self.joined(weights), self.joined(masks)))
            found += self.exchanged(vectors)[:count]
        return found

    def part(self, line: ir.Value, first: int, element: ir.Type, count: int, places: int) -> ir.Value:
        """Return some entries of a line, filled up."""
        size = element.width // 8
        value = self.read(self.builder.add(line, _I64(first * size)), element, count)
        return self.shuffled(value, value, [k if k < count else 0 for k in range(places)])

    def joined(self, parts: Sequence[ir.Value]) -> ir.Value:
        """Return the elements of a power of two of vectors, one after the other."""
        return functools.reduce(self.joined_two, parts)

    def joined_two(self, a: ir.Value, b: ir.Value) -> ir.Value:
        have, more = a.type.count, b.type.count
        wide = self.shuffled(b, b, [k % more for k in range(have)])
        return self.shuffled(a, wide, [*range(have), *range(have, have + more)])

    def signed(self, weights: ir.Value, masks: ir.Value) -> ir.Value:
        builder, width = self.builder, 8 * self.itemsize
        magnitudes = builder.and_(weights, self.number((1 << (width - 1)) - 1))
        is_kept = builder.icmp_unsigned("!=", masks, ir.Constant(masks.type, [0] * self.lanes))
        sign = builder.and_(builder.sext(is_kept, self.integers), self.number(-(1 << (width - 1))))
        return builder.or_(magnitudes, sign)

    def exchanged(self, vectors: list[ir.Value]) -> list[ir.Value]:
        """Exchange the number of a vector with the place in each part of as many elements."""
        places, step = len(vectors), 1
        while step < places:
            after = list(vectors)
            for k in range(places):
                if k & step == 0:
                    a, b = vectors[k], vectors[k + step]
                    low, high = [], []
                    for lane in range(self.lanes):
                        other = lane & step != 0
                        low.append(self.lanes + lane - step if other else lane)
                        high.append(self.lanes + lane if other else lane + step)
                    after[k], after[k + step] = self.shuffled(a, b, low), self.shuffled(a, b, high)
            vectors, step = after, 2 * step
        return vectors
