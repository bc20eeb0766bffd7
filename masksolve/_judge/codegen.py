"""The judge's functions as machine code: a row of a tile in a vector, or in several.

Nothing is shared with the solver's code, in which a vector holds one entry of many tiles: an error there shows here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import cache

from llvmlite import binding, ir

from masksolve._judge.interface import (
    CLEARANCE,
    EXACT_COLUMNS,
    EXACT_ROWS,
    FARTHEST,
    FILLED,
    HAS_ZEROS,
    KEPT,
    LARGEST,
    NOT_FINITE,
    NOT_NEGATIVE,
    OVERFULL,
    PROVEN,
    TOTAL,
    UNROUNDED,
    WITHOUT_ZEROS,
    WRONG,
    Program,
    group_of,
    unpack,
)
from masksolve._machine_code import VECTOR_BYTES, lock, new_engine, pointer_to
from masksolve._translated import inner, intrinsic

_BOOL, _BYTE, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
_DOUBLE = ir.DoubleType()
_PROTOTYPE = ir.FunctionType(_I64, [_I64] * 8)
_INFINITY = float("inf")


@intrinsic
def _call_address(
    builder: ir.IRBuilder,
    address: ir.Value,
    a: ir.Value,
    b: ir.Value,
    c: ir.Value,
    d: ir.Value,
    e: ir.Value,
    f: ir.Value,
    g: ir.Value,
    h: ir.Value,
) -> ir.Value:
    # In llvmlite, only the type of a pointer says what function is called.
    return builder.call(builder.inttoptr(address, _PROTOTYPE.as_pointer()), [a, b, c, d, e, f, g, h])


@inner
def prove(
    program: tuple[int, ...],
    weights: int,
    weights_row: int,
    mask: int,
    mask_row: int,
    potentials: int,
    rows: int,
    reading: int,
    out: int,
) -> int:
    """See `interface`."""
    bits: int = _call_address(
        unpack(program).prove, weights, weights_row, mask, mask_row, potentials, rows, reading, out
    )
    return bits


@inner
def weigh(
    program: tuple[int, ...],
    weights: int,
    weights_row: int,
    mask: int,
    mask_row: int,
    potentials: int,
    rows: int,
    reading: int,
    out: int,
) -> int:
    """See `interface`."""
    bits: int = _call_address(
        unpack(program).weigh, weights, weights_row, mask, mask_row, potentials, rows, reading, out
    )
    return bits


@inner
def differ(program: tuple[int, ...], other: int, other_row: int, mask: int, mask_row: int, rows: int) -> int:
    """See `interface`."""
    bits: int = _call_address(unpack(program).differ, other, other_row, mask, mask_row, 0, rows, 0, 0)
    return bits


@cache
def program(rows: int, columns: int, itemsize: int) -> Program:
    """Return the functions for tiles of this shape, of floats of this size."""
    group = group_of(rows, columns, itemsize)
    with lock:
        engine = _engine_of(columns, itemsize, group)
        prove_, weigh_, differ_ = (engine.get_function_address(name) for name in _FUNCTIONS)
    return Program(prove_, weigh_, differ_, columns, itemsize, group)


@cache
def _engine_of(*arguments: int) -> binding.ExecutionEngine:
    columns, _, _ = arguments
    return new_engine(write_module, arguments, "judge", f"{columns} columns")


def write_module(columns: int, itemsize: int, group: int) -> str:
    """Return the LLVM IR of the functions."""
    module = ir.Module()
    for name, write in _FUNCTIONS.items():
        function = ir.Function(module, _PROTOTYPE, name)
        builder = ir.IRBuilder(function.append_basic_block())
        builder.ret(write(_Writer(builder, function.args, columns, itemsize, group)))
    return str(module)


class _Writer:
    """Writes the code of one function where the builder stands.

    A vector holds `group` rows of `width` lanes, powers of two; lanes of a row from `columns` on are filled up so that
    nothing depends on them.
    """

    def __init__(
        self, builder: ir.IRBuilder, arguments: Sequence[ir.Value], columns: int, itemsize: int, group: int
    ) -> None:
        self.builder = builder
        self.weights, self.weights_row, self.mask, self.mask_row, self.potentials, self.rows, reading, self.out = (
            arguments
        )
        self.columns, self.group, self.width = columns, group, 1 << (columns - 1).bit_length()
        self.lanes = group * self.width
        self.narrow = ir.FloatType() if itemsize == 4 else _DOUBLE
        self.n = builder.and_(reading, _I64((1 << 16) - 1))
        self.exact_rows, self.exact_columns, self.without_zeros = (
            builder.icmp_signed("!=", builder.and_(reading, _I64(bit)), _I64(0))
            for bit in (EXACT_ROWS, EXACT_COLUMNS, WITHOUT_ZEROS)
        )
        self.bits = ir.Constant(
            ir.VectorType(_BOOL, self.lanes), [lane % self.width < columns for lane in range(self.lanes)]
        )

    # Values and memory

    def constant(self, value: float, kind: ir.Type) -> ir.Value:
        return ir.Constant(ir.VectorType(kind, self.lanes), [value] * self.lanes)

    def splat(self, scalar: ir.Value) -> ir.Value:
        undefined = ir.Constant(ir.VectorType(scalar.type, self.lanes), ir.Undefined)
        one = self.builder.insert_element(undefined, scalar, _I32(0))
        return self.shuffle(one, undefined, [0] * self.lanes)

    def shuffle(self, a: ir.Value, b: ir.Value, order: Sequence[int]) -> ir.Value:
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(order)), list(order)))

    def load(self, address: ir.Value, step: ir.Value, kind: ir.Type, fill: float) -> ir.Value:
        """Return numbers of the rows of a group, filled up: the first at an address, the others a step further each."""
        size = {_BYTE: 1, self.narrow: 8 if self.narrow == _DOUBLE else 4}[kind]
        group = self.constant(fill, kind)
        for row in range(self.group):
            first = 0
            while first < self.columns:
                width = 1 << ((self.columns - first).bit_length() - 1)
                part = ir.VectorType(kind, width)
                place = self.builder.inttoptr(self.builder.add(address, _I64(first * size)), pointer_to(part))
                loaded = self.builder.load(place, align=1, typ=part)
                wide = self.shuffle(
                    loaded, ir.Constant(part, ir.Undefined), [lane % width for lane in range(self.lanes)]
                )
                begin = row * self.width + first
                lanes = range(begin, begin + width)
                order = [self.lanes + lane if lane in lanes else lane for lane in range(self.lanes)]
                group, first = self.shuffle(group, wide, order), first + width
            address = self.builder.add(address, step)
        return group

    def store(self, value: ir.Value, index: int) -> None:
        place = self.builder.inttoptr(self.builder.add(self.out, _I64(8 * index)), pointer_to(_DOUBLE))
        self.builder.store(value, place)

    def for_each_group(
        self,
        starts: Sequence[ir.Value],
        body: Callable[..., Sequence[ir.Value]],
    ) -> Sequence[ir.Value]:
        """Write a loop over groups of rows: body(addresses in weights and mask, carried values) returns the next."""
        builder = self.builder
        steps = [builder.mul(step, _I64(self.group)) for step in (self.weights_row, self.mask_row)]
        before = builder.block
        loop, after = builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        firsts = [_I64(0), self.weights, self.mask, *starts]
        phis = [builder.phi(first.type) for first in firsts]
        row, weights, mask, *carried = phis
        carried = list(body(weights, mask, *carried))
        nexts = [
            builder.add(row, _I64(self.group)),
            builder.add(weights, steps[0]),
            builder.add(mask, steps[1]),
            *carried,
        ]
        for phi, first, following in zip(phis, firsts, nexts, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(following, builder.block)
        builder.cbranch(builder.icmp_signed("<", nexts[0], self.rows), loop, after)
        builder.position_at_end(after)
        return carried

    # Arithmetic

    def integers_beside(self, kind: ir.Type) -> ir.Type:
        """Return the integers as wide as floats: what is compared of these stays in their lanes."""
        return ir.VectorType(ir.IntType(64 if kind == _DOUBLE else 32), self.lanes)

    def magnitude(self, values: ir.Value) -> ir.Value:
        """Return abs(values)."""
        return self.builder.bitcast(self.magnitude_bits(values), values.type)

    def magnitude_bits(self, values: ir.Value) -> ir.Value:
        integers = self.integers_beside(values.type.element)
        mask = ir.Constant(integers, [(1 << (integers.element.width - 1)) - 1] * self.lanes)
        return self.builder.and_(self.builder.bitcast(values, integers), mask)

    def least(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return min, in the form that is a single packed instruction on x86."""
        return self.builder.select(self.builder.fcmp_ordered("<", a, b), a, b)

    def largest(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def least_integer(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.builder.select(self.builder.icmp_signed("<", a, b), a, b)

    def largest_integer(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.builder.select(self.builder.icmp_signed(">", a, b), a, b)

    def plus(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.builder.fadd(a, b)

    def reduce(self, combine: Callable[[ir.Value, ir.Value], ir.Value], values: ir.Value) -> ir.Value:
        """Return one number made of all lanes: of the halves of a vector, again and again."""
        while (half := values.type.count // 2) > 0:
            nothing = ir.Constant(values.type, ir.Undefined)
            left = self.shuffle(values, nothing, range(half))
            values = combine(left, self.shuffle(values, nothing, range(half, 2 * half)))
        return self.builder.extract_element(values, _I32(0))

    def in_rows(self, combine: Callable[[ir.Value, ir.Value], ir.Value], values: ir.Value) -> ir.Value:
        """Return one number made of a row's lanes, in all of them."""
        # As far as a row takes several registers, halves are one or more.
        registers = VECTOR_BYTES // (8 if values.type.element == _DOUBLE else 4)
        while self.group == 1 and values.type.count > registers:
            half, nothing = values.type.count // 2, ir.Constant(values.type, ir.Undefined)
            left = self.shuffle(values, nothing, range(half))
            values = combine(left, self.shuffle(values, nothing, range(half, 2 * half)))
        lanes = values.type.count
        step = min(lanes, self.width) // 2
        nothing = ir.Constant(values.type, ir.Undefined)
        while step > 0:
            values = combine(values, self.shuffle(values, nothing, [lane ^ step for lane in range(lanes)]))
            step //= 2
        return values if lanes == self.lanes else self.shuffle(values, nothing, [k % lanes for k in range(self.lanes)])

    def in_columns(self, sums: ir.Value) -> ir.Value:
        """Return the sums of all rows of a group, in each of them."""
        step, nothing = self.width, ir.Constant(sums.type, ir.Undefined)
        while step < self.lanes:
            sums = self.builder.add(sums, self.shuffle(sums, nothing, [lane ^ step for lane in range(self.lanes)]))
            step *= 2
        return sums

    def any(self, bits: ir.Value) -> ir.Value:
        return self.builder.icmp_unsigned("!=", self.packed(bits), ir.IntType(self.lanes)(0))

    def packed(self, bits: ir.Value) -> ir.Value:
        return self.builder.bitcast(bits, ir.IntType(self.lanes))

    def as_lanes(self, number: ir.Value, kind: ir.Type) -> ir.Value:
        """Return a number of 64 bits as integers of a kind, in all lanes."""
        return self.splat(number if kind == _I64 else self.builder.trunc(number, kind))

    def count(self, bits: ir.Value, kind: ir.Type) -> tuple[ir.Value, ir.Value]:
        """Return, of each row, whether n bits are set, and whether more are: of a group, in all lanes.

        The bits are of comparisons of floats of this kind.
        """
        builder = self.builder
        if self.group > 1:
            ones = self.in_rows(builder.add, builder.zext(bits, self.integers_beside(kind)))
            n = self.as_lanes(self.n, ones.type.element)
        else:
            word = ir.IntType(max(8, self.lanes))
            packed = self.packed(bits)
            if self.lanes < 8:
                packed = builder.zext(packed, word)
            ones = builder.call(builder.module.declare_intrinsic("llvm.ctpop", [word]), [packed])
            if word.width != 64:
                ones = builder.zext(ones, _I64) if word.width < 64 else builder.trunc(ones, _I64)
            n = self.n
        return builder.icmp_signed("==", ones, n), builder.icmp_signed(">", ones, n)

    def flags(self, *pairs: tuple[ir.Value, int]) -> ir.Value:
        bits = [self.builder.select(condition, _I64(bit), _I64(0)) for condition, bit in pairs]
        return functools.reduce(self.builder.or_, bits)

    def kept(self, mask: ir.Value, importance: ir.Value) -> ir.Value:
        """Return which entries of a row are kept, those of weight zero only if they count."""
        kind = importance.type.element
        ones = self.builder.zext(self.load(mask, self.mask_row, _BYTE, 0), self.integers_beside(kind))
        ones = self.builder.icmp_unsigned("!=", ones, self.constant(0, ones.type.element))
        least = self.builder.select(self.without_zeros, ir.Constant(kind, 0.0), ir.Constant(kind, -1.0))
        return self.builder.and_(ones, self.builder.fcmp_ordered(">", importance, self.splat(least)))

    # Functions

    def prove(self) -> ir.Value:
        builder, narrow = self.builder, self.narrow
        potentials = self.load(self.potentials, _I64(0), narrow, 0.0)
        # What fills rows up is below all else.
        offset = builder.select(self.bits, potentials, self.constant(_largest(narrow), narrow))
        zero, infinity = self.constant(0.0, narrow), self.constant(_INFINITY, narrow)
        smallest = self.constant(2.0**-1074 if narrow == _DOUBLE else 2.0**-149, narrow)
        integers = self.integers_beside(narrow)
        none, all_ones = self.constant(0, integers.element), self.constant(-1, integers.element)
        top_integer = self.constant((1 << (integers.element.width - 1)) - 1, integers.element)
        nothing = self.constant(0.0, _DOUBLE)
        flags = [_BOOL(1), _BOOL(0)] if self.group == 1 else [all_ones, none]
        start = [none, none, infinity, none, top_integer, nothing, nothing, *flags]

        def prove_row(
            weights: ir.Value,
            mask: ir.Value,
            sums: ir.Value,
            bad: ir.Value,
            lowest: ir.Value,
            largest: ir.Value,
            least: ir.Value,
            total: ir.Value,
            kept: ir.Value,
            filled: ir.Value,
            overfull: ir.Value,
        ) -> Sequence[ir.Value]:
            bits = self.magnitude_bits(self.load(weights, self.weights_row, narrow, 0.0))
            c = builder.bitcast(bits, zero.type)
            keep = self.kept(mask, c)
            difference = builder.fsub(c, offset)
            least_kept = self.in_rows(self.least, builder.select(keep, difference, infinity))
            is_full, has_more = self.count(keep, narrow)
            # Rounding is monotone: a strict order of rounded differences is one of the differences themselves. And a
            # difference of floats has the sign of what it is rounded from: it is above 0 or not.
            above = builder.fcmp_ordered(">=", difference, builder.select(is_full, least_kept, smallest))
            wide = builder.fpext(c, total.type) if narrow != _DOUBLE else c
            is_kept = builder.sext(keep, integers)
            if self.group > 1:
                is_full, has_more = builder.sext(is_full, integers), builder.sext(has_more, integers)
            return [
                builder.sub(sums, is_kept),
                builder.or_(bad, builder.and_(builder.sext(above, integers), builder.not_(is_kept))),
                self.least(lowest, least_kept),
                self.largest_integer(largest, bits),
                self.least_integer(least, builder.select(self.bits, bits, top_integer)),
                builder.fadd(total, wide),
                builder.fadd(kept, builder.select(keep, wide, nothing)),
                builder.and_(filled, is_full),
                builder.or_(overfull, has_more),
            ]

        sums, bad, lowest, largest, least, total, kept, filled, overfull = self.for_each_group(start, prove_row)
        sums = self.in_columns(sums)
        if self.group > 1:
            filled = self.all(builder.icmp_unsigned("!=", filled, none))
            overfull = self.any(builder.icmp_unsigned("!=", overfull, none))
        n = self.as_lanes(self.n, integers.element)
        others = builder.not_(self.bits)
        is_full = builder.or_(builder.icmp_unsigned("==", sums, n), others)
        full_rows, full_columns = filled, self.all(is_full)
        filled = builder.and_(
            builder.or_(full_rows, builder.not_(self.exact_rows)),
            builder.or_(full_columns, builder.not_(self.exact_columns)),
        )
        overfull = builder.or_(overfull, self.any(builder.icmp_signed(">", sums, n)))
        # (2) of docs/proof.md, of lines that may hold fewer than n.
        may_be_short = builder.and_(is_full, builder.fcmp_ordered(">=", potentials, zero))
        may_be_short = builder.or_(may_be_short, builder.fcmp_ordered("==", potentials, zero))
        columns = builder.or_(self.exact_columns, self.all(builder.or_(may_be_short, others)))
        rows = builder.or_(self.exact_rows, self.all(builder.fcmp_ordered(">=", lowest, zero)))
        # NaN compares false both ways, so it would slip through as proven.
        finite = self.all(builder.fcmp_ordered("<", self.magnitude(potentials), infinity))
        limit = self.constant(0x7FF0000000000000 if narrow == _DOUBLE else 0x7F800000, integers.element)
        is_infinite = self.any(builder.icmp_signed(">=", largest, limit))
        proven = functools.reduce(
            builder.and_, [columns, rows, finite, self.all(builder.icmp_unsigned("==", bad, none))]
        )
        # Where all weights are the same, every mask that is full is as good; where they are zero, every one.
        first = self.shuffle(largest, none, [0] * self.lanes)
        different = builder.or_(builder.icmp_unsigned("!=", largest, first), builder.icmp_unsigned("!=", least, first))
        are_equal = builder.not_(self.any(builder.and_(different, self.bits)))
        are_zero = builder.not_(self.any(builder.icmp_signed(">", largest, none)))
        is_constant = functools.reduce(builder.and_, [are_equal, full_rows, full_columns])
        proven = functools.reduce(builder.or_, [proven, are_zero, is_constant])
        proven = functools.reduce(builder.and_, [proven, filled, builder.not_(overfull), builder.not_(is_infinite)])
        self.store(self.reduce(self.plus, total), TOTAL)
        self.store(self.reduce(self.plus, kept), KEPT)
        has_zeros = self.any(builder.icmp_signed("==", least, none))
        return self.flags(
            (proven, PROVEN), (filled, FILLED), (overfull, OVERFULL), (is_infinite, NOT_FINITE), (has_zeros, HAS_ZEROS)
        )

    def all(self, bits: ir.Value) -> ir.Value:
        return self.builder.not_(self.any(self.builder.not_(bits)))

    def weigh(self) -> ir.Value:
        builder = self.builder
        potentials = self.widened(self.load(self.potentials, _I64(0), self.narrow, 0.0))
        zero, infinity = self.constant(0.0, _DOUBLE), self.constant(_INFINITY, _DOUBLE)
        below = self.constant(-_INFINITY, _DOUBLE)
        integers = self.integers_beside(_DOUBLE)
        none = self.constant(0, _I64)

        def weigh_row(
            weights: ir.Value,
            mask: ir.Value,
            sums: ir.Value,
            wrong: ir.Value,
            clearance: ir.Value,
            largest: ir.Value,
            rounded: ir.Value,
        ) -> Sequence[ir.Value]:
            c = self.widened(self.magnitude(self.load(weights, self.weights_row, self.narrow, 0.0)))
            keep = self.kept(mask, c)
            difference = builder.fsub(c, potentials)
            # Knuth's two-sum: what was rounded off.
            back = builder.fsub(c, difference)
            off = builder.fadd(builder.fsub(c, builder.fadd(difference, back)), builder.fsub(back, potentials))
            others = builder.and_(self.bits, builder.not_(keep))
            lowest = self.in_rows(self.least, builder.select(keep, difference, infinity))
            highest = self.in_rows(self.largest, builder.select(others, difference, below))
            middle = builder.fmul(builder.fadd(lowest, highest), self.constant(0.5, _DOUBLE))
            is_full, _ = self.count(keep, _DOUBLE)
            # Rows that may hold fewer than n have a potential that is not negative, and 0 if they do.
            clamped = builder.select(is_full, self.largest(middle, zero), zero)
            middle = builder.select(self.exact_rows, middle, clamped)
            right = builder.select(keep, builder.fsub(difference, middle), builder.fsub(middle, difference))
            right = builder.select(self.bits, right, infinity)
            # Without the lowest bit of its mantissa, a float has lost the largest power of two that divides it.
            bits = builder.bitcast(c, integers)
            rest = builder.bitcast(builder.and_(bits, builder.sub(bits, self.constant(1, _I64))), c.type)
            mantissa = builder.and_(bits, self.constant((1 << 52) - 1, _I64))
            is_power = builder.icmp_signed("==", mantissa, self.constant(0, _I64))
            divisor = builder.select(is_power, c, builder.fsub(c, rest))
            clear = self.largest(builder.fmul(right, self.constant(0.5, _DOUBLE)), divisor)
            is_zero = builder.fcmp_ordered("<=", c, zero)
            # NaN, which compares false, makes the sum NaN.
            missing = builder.select(builder.fcmp_ordered(">=", right, zero), zero, builder.fsub(zero, right))
            return [
                builder.add(sums, builder.zext(keep, integers)),
                builder.fadd(wrong, missing),
                builder.select(is_zero, clearance, self.least(clearance, clear)),
                self.largest(largest, c),
                builder.or_(rounded, builder.sext(builder.fcmp_unordered("!=", off, zero), integers)),
            ]

        start = [none, zero, infinity, zero, none]
        sums, wrong, clearance, largest, rounded = self.for_each_group(start, weigh_row)
        room = builder.sitofp(builder.sub(self.splat(self.n), self.in_columns(sums)), wrong.type)
        once = ir.Constant(self.bits.type, [lane < self.columns for lane in range(self.lanes)])
        short = builder.select(once, builder.fmul(room, potentials), zero)
        wrong = builder.fadd(wrong, builder.select(self.exact_columns, zero, short))
        not_negative = builder.or_(self.exact_columns, self.all(builder.fcmp_ordered(">=", potentials, zero)))
        for values, combine, index in (
            (wrong, self.plus, WRONG),
            (clearance, self.least, CLEARANCE),
            (largest, self.largest, LARGEST),
            (self.magnitude(potentials), self.largest, FARTHEST),
        ):
            self.store(self.reduce(combine, values), index)
        return self.flags(
            (self.all(builder.icmp_unsigned("==", rounded, none)), UNROUNDED), (not_negative, NOT_NEGATIVE)
        )

    def widened(self, values: ir.Value) -> ir.Value:
        return values if self.narrow == _DOUBLE else self.builder.fpext(values, ir.VectorType(_DOUBLE, self.lanes))

    def differ(self) -> ir.Value:
        builder = self.builder

        def compare_row(other: ir.Value, mask: ir.Value, different: ir.Value) -> Sequence[ir.Value]:
            nothing = self.constant(0, _BYTE)
            a, b = (
                builder.icmp_unsigned("!=", self.load(address, step, _BYTE, 0), nothing)
                for address, step in ((other, self.weights_row), (mask, self.mask_row))
            )
            return [builder.or_(different, builder.xor(a, b))]

        (different,) = self.for_each_group([self.constant(0, _BOOL)], compare_row)
        return builder.zext(self.any(different), _I64)


_FUNCTIONS: dict[str, Callable[[_Writer], ir.Value]] = {
    "prove": _Writer.prove,
    "weigh": _Writer.weigh,
    "differ": _Writer.differ,
}


def _largest(kind: ir.Type) -> float:
    return float.fromhex("0x1.fffffffffffffp+1023" if kind == _DOUBLE else "0x1.fffffep+127")
