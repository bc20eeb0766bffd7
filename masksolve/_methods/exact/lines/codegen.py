"""The largest entries of many lines at once, as machine code: a line in each vector lane, a network that selects."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numpy.typing import NDArray

from masksolve._machine_code import VECTOR_BYTES, address_of, lock, new_engine, pointer_to
from masksolve._methods.exact.vector_writer import VectorWriter

_BYTE = ir.IntType(8)
_I64 = ir.IntType(64)
_PROTOTYPE = ir.FunctionType(_I64, [_I64] * 9)
_CALL = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 9)

# Lines that lie side by side are taken as many at a time, so that whole lines of the cache are read and written.
SIDE_BY_SIDE = 64
# Entries whose masks are stored at once.
_STORED_AT_ONCE = 32


def lines_at_once(itemsize: int, side_by_side: bool) -> int:
    """Return how many lines there have to be at least."""
    return max(SIDE_BY_SIDE, VECTOR_BYTES // itemsize) if side_by_side else VECTOR_BYTES // itemsize


def choose(lines: NDArray[Any], masks: NDArray[np.bool_], kept: int, exponent_bits: int, side_by_side: bool) -> bool:
    """Fill masks (p, q, k) with the `kept` largest magnitudes of lines (p, q, k); return whether all are finite.

    Either the lines of each p lie side by side, entry by entry, or one after the other.
    """
    down, across, length = lines.shape
    itemsize = lines.itemsize
    function = _function(kept, length, itemsize, exponent_bits, side_by_side)
    memory = np.empty((length + 4) * lines_at_once(itemsize, side_by_side) * itemsize + VECTOR_BYTES, np.int8)
    start = address_of(memory)
    start += -start % VECTOR_BYTES
    wrong: int = function(
        address_of(lines),
        address_of(masks),
        start,
        down,
        lines.strides[0],
        masks.strides[0],
        across,
        lines.strides[2],
        masks.strides[2],
    )
    return wrong == 0


@cache
def _function(*arguments: int) -> Callable[..., int]:
    with lock:
        return _CALL(_engine_of(*arguments).get_function_address("choose"))


@cache
def _engine_of(*arguments: int) -> binding.ExecutionEngine:
    n, length, *_ = arguments
    return new_engine(write_module, arguments, "lines", f"{n} of each line of {length}")


def write_module(n: int, length: int, itemsize: int, exponent_bits: int, side_by_side: bool) -> str:
    """Return the LLVM IR of the function that chooses."""
    module = ir.Module()
    function = ir.Function(module, _PROTOTYPE, "choose")
    builder = ir.IRBuilder(function.append_basic_block())
    kind = _SideBySide if side_by_side else _InARow
    kind(builder, function.args, n, length, itemsize, exponent_bits).write()
    return str(module)


class _Writer(VectorWriter, ABC):
    """Writes the function for lines of magnitudes, whose bits grow with them as integers, infinity and NaN last."""

    width: int

    def __init__(
        self,
        builder: ir.IRBuilder,
        arguments: Sequence[ir.Value],
        n: int,
        length: int,
        itemsize: int,
        exponent_bits: int,
    ) -> None:
        super().__init__(builder)
        self.weights, self.masks, self.memory, self.down, self.weights_down, self.masks_down = arguments[:6]
        self.across, self.weights_step, self.masks_step = arguments[6:]
        self.n, self.length, self.itemsize = n, length, itemsize
        self.element = ir.IntType(8 * itemsize)
        self.lanes = VECTOR_BYTES // itemsize
        self.vector = ir.VectorType(self.element, self.lanes)
        # What makes a number without a sign negative if all bits of its exponent are set.
        self.overflow = 1 << (8 * itemsize - 1 - exponent_bits)
        # Bytes for an entry of all lines. In memory stand the magnitudes, entry by entry; of each line one less than
        # the n-th largest and the last entry that is chosen of those which equal that; whether any tie; and what shows
        # entries that are not finite.
        self.entry = self.width * itemsize
        self.levels = self.entry * length
        self.last = self.levels + self.entry
        self.tied = self.last + self.entry
        self.wrong = self.tied + self.entry

    # Memory

    def pointer(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        return self.builder.inttoptr(address, pointer_to(kind))

    def read(self, address: ir.Value, count: int, align: int) -> ir.Value:
        kind = ir.VectorType(self.element, count)
        return self.builder.load(self.pointer(address, kind), align=align, typ=kind)

    def get(self, offset: int | ir.Value, count: int) -> ir.Value:
        return self.read(self.at(offset), count, VECTOR_BYTES)

    def put(self, value: ir.Value, offset: int | ir.Value) -> None:
        self.builder.store(value, self.pointer(self.at(offset), value.type), align=VECTOR_BYTES)

    def at(self, offset: int | ir.Value) -> ir.Value:
        return self.builder.add(self.memory, _I64(offset) if isinstance(offset, int) else offset)

    def times(self, index: ir.Value, step: int) -> ir.Value:
        return self.builder.mul(index, _I64(step))

    # The function

    def write(self) -> None:
        builder = self.builder
        self.put(self.constant(self.element, 0, self.lanes), self.wrong)

        def choose_in(p: ir.Value) -> None:
            weights = builder.add(self.weights, builder.mul(p, self.weights_down))
            masks = builder.add(self.masks, builder.mul(p, self.masks_down))

            def choose_group(group: ir.Value) -> None:
                # The last group ends where the lines do; it may have lines of the one before.
                first, last = self.times(group, self.width), builder.sub(self.across, _I64(self.width))
                self.choose(builder.select(builder.icmp_signed("<", first, last), first, last), weights, masks)

            groups = builder.udiv(builder.add(self.across, _I64(self.width - 1)), _I64(self.width))
            self.for_each(groups, choose_group)

        self.for_each(self.down, choose_in)
        is_wrong = builder.icmp_signed(
            "<", self.get(self.wrong, self.lanes), self.constant(self.element, 0, self.lanes)
        )
        bits = builder.bitcast(is_wrong, ir.IntType(self.lanes))
        builder.ret(builder.zext(builder.icmp_unsigned("!=", bits, bits.type(0)), _I64))

    def choose(self, first: ir.Value, weights: ir.Value, masks: ir.Value) -> None:
        builder = self.builder
        weights = builder.add(weights, self.times(first, self.first_weight))
        masks = builder.add(masks, self.times(first, self.first_mask))
        self.load(weights)
        self.select()
        tied = builder.bitcast(
            builder.icmp_signed("<", self.get(self.tied, self.lanes), self.constant(self.element, 0, self.lanes)),
            ir.IntType(self.lanes),
        )
        with builder.if_else(builder.icmp_unsigned("!=", tied, tied.type(0))) as (if_tied, if_not):
            with if_tied:
                self.find_last()
                self.store(weights, masks, tied=True)
            with if_not:
                self.store(weights, masks, tied=False)

    first_weight: int
    first_mask: int

    @abstractmethod
    def load(self, weights: ir.Value) -> None:
        """Fill memory with the magnitudes."""

    @abstractmethod
    def store(self, weights: ir.Value, masks: ir.Value, tied: bool) -> None:
        """Store the masks of lines, of which some may tie."""

    def magnitudes(self, value: ir.Value) -> ir.Value:
        without_sign = (1 << (8 * self.itemsize - 1)) - 1
        return self.builder.and_(value, self.constant(self.element, without_sign, value.type.count))

    def look_for_wrong(self, magnitudes: Sequence[ir.Value]) -> None:
        wrong = self.get(self.wrong, self.lanes)
        for value in magnitudes:
            wrong = self.builder.or_(
                wrong, self.builder.add(value, self.constant(self.element, self.overflow, self.lanes))
            )
        self.put(wrong, self.wrong)

    def as_numbers(self, value: ir.Value) -> ir.Value:
        """Return what is compared by one instruction: for want of one for integers of 64 bits, floats."""
        return self.builder.bitcast(value, ir.VectorType(ir.DoubleType(), self.lanes)) if self.itemsize == 8 else value

    def select(self) -> None:
        """Fill `levels` and `tied`."""
        builder = self.builder
        self.put(self.constant(self.element, 0, self.lanes), self.tied)

        def select_in(part: ir.Value) -> None:
            start = self.times(part, VECTOR_BYTES)
            values = [
                self.as_numbers(self.get(builder.add(start, _I64(self.entry * k)), self.lanes))
                for k in range(self.length)
            ]
            nth, following = (builder.bitcast(value, self.vector) for value in self.best_two(values, self.n))
            self.put(
                builder.sub(nth, self.constant(self.element, 1, self.lanes)), builder.add(start, _I64(self.levels))
            )
            tied = builder.sext(builder.icmp_signed("==", nth, following), self.vector)
            self.put(builder.or_(self.get(self.tied, self.lanes), tied), self.tied)

        self.for_each(self.width // self.lanes, select_in)

    def find_last(self) -> None:
        builder = self.builder

        def number(value: int) -> ir.Value:
            return self.constant(self.element, value, self.lanes)

        def find_in(part: ir.Value) -> None:
            start = self.times(part, VECTOR_BYTES)
            nth = builder.add(self.get(builder.add(start, _I64(self.levels)), self.lanes), number(1))
            room = number(self.n)
            for k in range(self.length):
                value = self.get(builder.add(start, _I64(self.entry * k)), self.lanes)
                room = builder.add(room, builder.sext(builder.icmp_signed(">", value, nth), self.vector))
            last = number(0)
            for k in range(self.length):
                value = self.get(builder.add(start, _I64(self.entry * k)), self.lanes)
                is_nth = builder.icmp_signed("==", value, nth)
                takes = builder.and_(is_nth, builder.icmp_signed(">", room, number(0)))
                room = builder.add(room, builder.sext(is_nth, self.vector))
                last = builder.select(takes, number(k), last)
            self.put(last, builder.add(start, _I64(self.last)))

        self.for_each(self.width // self.lanes, find_in)

    def store_chosen(
        self, values: ir.Value, levels: ir.Value, numbers: ir.Value, last: ir.Value | None, mask: ir.Value
    ) -> None:
        """Store the mask of entries, whose numbers in their lines these are."""
        builder = self.builder
        if last is not None:
            is_after = builder.icmp_signed(">", numbers, last)
            levels = builder.add(levels, builder.zext(is_after, levels.type))
        chosen = builder.icmp_signed(">", values, levels)
        ones = builder.zext(chosen, ir.VectorType(_BYTE, values.type.count))
        builder.store(ones, self.pointer(mask, ones.type), align=1)


class _SideBySide(_Writer):
    """For lines of which the first entries lie one after the other, then the second ones, and so on."""

    def __init__(self, builder: ir.IRBuilder, arguments: Sequence[ir.Value], *shape: int) -> None:
        itemsize = shape[2]
        self.width = lines_at_once(itemsize, side_by_side=True)
        self.first_weight, self.first_mask = itemsize, 1
        super().__init__(builder, arguments, *shape)

    def load(self, weights: ir.Value) -> None:
        def load_entry(k: ir.Value) -> None:
            start = self.builder.add(weights, self.builder.mul(k, self.weights_step))
            parts = []
            for part in range(self.width // self.lanes):
                place = self.builder.add(start, _I64(part * VECTOR_BYTES))
                magnitudes = self.magnitudes(self.read(place, self.lanes, 1))
                self.put(magnitudes, self.builder.add(self.times(k, self.entry), _I64(part * VECTOR_BYTES)))
                parts.append(magnitudes)
            self.look_for_wrong(parts)

        self.for_each(self.length, load_entry)

    def store(self, weights: ir.Value, masks: ir.Value, tied: bool) -> None:
        levels = self.get(self.levels, self.width)
        last = self.get(self.last, self.width) if tied else None

        def store_entry(k: ir.Value) -> None:
            number = k if self.itemsize == 8 else self.builder.trunc(k, self.element)
            values = self.get(self.times(k, self.entry), self.width)
            mask = self.builder.add(masks, self.builder.mul(k, self.masks_step))
            self.store_chosen(values, levels, self.splat(number, self.width), last, mask)

        self.for_each(self.length, store_entry)


class _InARow(_Writer):
    """For lines that lie one after the other."""

    def __init__(self, builder: ir.IRBuilder, arguments: Sequence[ir.Value], *shape: int) -> None:
        _, length, itemsize, _ = shape
        self.width = lines_at_once(itemsize, side_by_side=False)
        self.first_weight, self.first_mask = length * itemsize, length
        super().__init__(builder, arguments, *shape)

    def load(self, weights: ir.Value) -> None:
        builder = self.builder
        # Vectors are transposed in parts of as many bytes as one instruction shuffles.
        places = 16 // self.itemsize
        found = []
        for first in range(0, self.length, places):
            count = min(places, self.length - first)
            vectors = []
            for j in range(places):
                parts = []
                for line in range(j, self.lanes, places):
                    start = builder.add(weights, _I64((line * self.length + first) * self.itemsize))
                    parts.append(self.filled_up(self.read(start, count, 1), places))
                vectors.append(self.magnitudes(self.joined(parts)))
            for k, vector in enumerate(self.transposed(vectors)[:count]):
                self.put(vector, self.entry * (first + k))
                found.append(vector)
        self.look_for_wrong(found)

    def store(self, weights: ir.Value, masks: ir.Value, tied: bool) -> None:
        levels = self.get(self.levels, self.lanes)
        last = self.get(self.last, self.lanes) if tied else levels
        size = self.lanes * self.length
        for first in range(0, size, _STORED_AT_ONCE):
            entries = range(first, min(first + _STORED_AT_ONCE, size))
            lines = [entry // self.length for entry in entries]
            start = self.builder.add(weights, _I64(first * self.itemsize))
            numbers = ir.Constant(ir.VectorType(self.element, len(entries)), [entry % self.length for entry in entries])
            self.store_chosen(
                self.magnitudes(self.read(start, len(entries), 1)),
                self.picked(levels, levels, lines),
                numbers,
                self.picked(last, last, lines) if tied else None,
                self.builder.add(masks, _I64(first)),
            )
