"""The functions of `Code` as machine code: explicit vectors of 16-bit integers, with one tile in each lane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from llvmlite import binding, ir
from numpy.typing import NDArray

from masksolve._machine_code import lock, new_engine, pointer_to
from masksolve._methods.exact.narrow.layout import (
    FARTHEST,
    FARTHEST_BELOW,
    HALF,
    KEEP_COLUMNS,
    KEEP_ROWS,
    LANES,
    Code,
    layout,
    new_program,
)
from masksolve._methods.exact.vector_writer import VectorWriter
from masksolve._translated import inner, intrinsic

_BIT = ir.IntType(1)
_BYTE = ir.IntType(8)
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_FLOAT = ir.FloatType()
_DOUBLE = ir.DoubleType()
_VECTOR = ir.VectorType(_I16, LANES)
_VECTOR_BYTES = 2 * LANES
# Weights of tiles that fit in the first-level cache, whatever lies between their rows: they are looked at one by one.
TILE_BY_TILE = 256

_PROTOTYPE = ir.FunctionType(ir.VoidType(), [pointer_to(_BYTE), _I64, _I64, _I64, _I64])
# A function that two of `Code` call.
FIND_POTENTIALS = "find_potentials"


@intrinsic
def _call_address(
    builder: ir.IRBuilder, address: ir.Value, memory: ir.Value, a: ir.Value, b: ir.Value, c: ir.Value, d: ir.Value
) -> None:
    # In llvmlite, only the type of a pointer says what function is called.
    function = builder.inttoptr(address, _PROTOTYPE.as_pointer())
    builder.call(function, [builder.inttoptr(memory, pointer_to(_BYTE)), a, b, c, d])


@inner
def call(address: int, memory: NDArray[np.int8], a: int, b: int, c: int, d: int) -> None:
    """Call one of the functions of `Code`."""
    _call_address(address, memory, a, b, c, d)


@cache
def program(n: int, rows: int, cols: int, clamp_rows: bool, clamp_columns: bool, itemsize: int) -> NDArray[np.int64]:
    """Return, for `unpack`, the functions for r x c tiles of weights of this size, with clamps at 0 or without."""
    with lock:
        engine = _engine_of(n, rows, cols, clamp_rows, clamp_columns, itemsize)
        return new_program([engine.get_function_address(name) for name in Code._fields], rows, cols)


@cache
def _engine_of(*arguments: int) -> binding.ExecutionEngine:
    n, rows, cols, *_ = arguments
    return new_engine(write_module, arguments, "narrow", f"{n} of each line of {rows}x{cols}")


def write_module(n: int, rows: int, cols: int, clamp_rows: bool, clamp_columns: bool, itemsize: int) -> str:
    """Return the LLVM IR of the functions of `Code`."""
    module = ir.Module()
    writers: dict[str, Callable[[_Writer], None]] = {
        FIND_POTENTIALS: lambda write: write.find_potentials(),
        "load": lambda write: write.load(),
        "move_rows": lambda write: write.move(along_rows=True),
        "move_columns": lambda write: write.move(along_rows=False),
        "prove": lambda write: write.prove(),
        "load_perturbed": lambda write: write.load(),
        "prove_perturbed": lambda write: write.prove(),
        "find_lowest": lambda write: write.find_lowest(),
    }
    if clamp_rows and clamp_columns:
        writers |= {"fill": lambda write: write.fill(), "store_filled": lambda write: write.store_filled()}
    for name, write in writers.items():
        function = ir.Function(module, _PROTOTYPE, name)
        builder = ir.IRBuilder(function.append_basic_block())
        writer, perturb = _Writer, name.endswith("perturbed")
        if itemsize == 4 and cols % 4 == 0 and not (clamp_rows or clamp_columns or perturb):
            writer = _FourByFour if rows == cols == 4 else _InFours
        write(writer(builder, function.args, n, rows, cols, clamp_rows, clamp_columns, itemsize, perturb))
        builder.ret_void()
    return str(module)


class _Stored(NamedTuple):
    """The state of rows whose mask is stored.

    Of each entry, filled up: the mask, as bytes; how far it lies on the wrong side; and how far on the right one, or
    infinity if it is a multiple of the quantum. `is_wrong`: whether a row holds what it may not.
    """

    ones: ir.Value
    is_wrong: ir.Value
    lacking: ir.Value
    clear: ir.Value


class _Writer(VectorWriter):
    """Writes the code of one function where the builder stands."""

    def __init__(
        self,
        builder: ir.IRBuilder,
        arguments: Sequence[ir.Value],
        n: int,
        rows: int,
        cols: int,
        clamp_rows: bool,
        clamp_columns: bool,
        itemsize: int,
        perturb: bool = False,
    ) -> None:
        super().__init__(builder)
        self.memory, self.a, self.b, self.c, self.d = arguments
        self.n, self.rows, self.cols = n, rows, cols
        self.clamp_rows, self.clamp_columns = clamp_rows, clamp_columns
        self.at = layout(rows, cols)
        self.itemsize = itemsize
        self.perturb = perturb
        self.source = _FLOAT if itemsize == 4 else _DOUBLE

    # Values and memory

    def place(self, offset: int | ir.Value, kind: ir.Type) -> ir.Value:
        offset = _I64(offset) if isinstance(offset, int) else offset
        return self.builder.bitcast(self.builder.gep(self.memory, [offset], source_etype=_BYTE), pointer_to(kind))

    def get(self, offset: int | ir.Value, kind: ir.Type, align: int = 4) -> ir.Value:
        return self.builder.load(self.place(offset, kind), align=align, typ=kind)

    def put(self, value: ir.Value, offset: int | ir.Value, align: int = 4) -> None:
        self.builder.store(value, self.place(offset, value.type), align=align)

    def offset(self, base: int, index: ir.Value, step: int) -> ir.Value:
        return self.builder.add(self.builder.mul(index, _I64(step)), _I64(base))

    def intrinsic(self, name: str, result: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
        declared = self.builder.module.globals
        if name not in declared:
            ir.Function(self.builder.module, ir.FunctionType(result, [each.type for each in arguments]), name)
        return self.builder.call(declared[name], arguments)

    def saturated(self, what: str, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.intrinsic(f"llvm.{what}.sat.v{LANES}i16", _VECTOR, [a, b])

    # Weights as they lie

    def sources(self) -> list[ir.Value]:
        """Return where the weights of each tile begin."""
        base = self.builder.inttoptr(self.a, pointer_to(self.source))
        return [
            self.builder.gep(base, [self.get(self.at.weights + 8 * lane, _I64)], source_etype=self.source)
            for lane in range(LANES)
        ]

    def start_of_row(self, tile: ir.Value, row: ir.Value) -> ir.Value:
        return self.builder.gep(tile, [self.builder.mul(row, self.b)], source_etype=self.source)

    def magnitudes(self, start: ir.Value, first: int, count: int) -> ir.Value:
        kind = ir.VectorType(self.source, count)
        place = self.builder.gep(start, [_I64(first)], source_etype=self.source)
        value = self.builder.load(self.builder.bitcast(place, pointer_to(kind)), align=self.itemsize, typ=kind)
        bits = ir.IntType(8 * self.itemsize)
        without_sign = self.constant(bits, (1 << (8 * self.itemsize - 1)) - 1, count)
        kept = self.builder.and_(self.builder.bitcast(value, ir.VectorType(bits, count)), without_sign)
        return self.builder.bitcast(kept, kind)

    def pieces(self) -> list[tuple[int, int]]:
        """Return where each eight of the columns begin, and how many they are."""
        return [(first, min(8, self.cols - first)) for first in range(0, self.cols, 8)]

    def leading_bits(self, magnitudes: ir.Value) -> ir.Value:
        """Return the first 32 bits of numbers that are not negative, which grow with them, infinity and NaN last."""
        count = magnitudes.type.count
        if self.itemsize == 4:
            return self.builder.bitcast(magnitudes, ir.VectorType(_I32, count))
        bits = self.builder.bitcast(magnitudes, ir.VectorType(_I64, count))
        return self.builder.trunc(self.builder.lshr(bits, self.constant(_I64, 32, count)), ir.VectorType(_I32, count))

    def as_floats(self, value: ir.Value) -> ir.Value:
        if self.itemsize == 4:
            return value
        return self.builder.fptrunc(value, ir.VectorType(_FLOAT, value.type.count))

    def in_units(self, values: ir.Value, above: ir.Value, potential: ir.Value, scale: ir.Value) -> ir.Value:
        """Return magnitudes less the potentials of their columns and of their rows, in units of the lanes."""
        if self.itemsize == 8:
            above = self.builder.fpext(above, values.type)
            potential = self.builder.fpext(potential, values.type)
        rest = self.builder.fsub(self.builder.fsub(values, above), potential)
        return self.builder.fmul(self.as_floats(rest), scale)

    def is_zero(self, values: ir.Value) -> ir.Value:
        return self.builder.fcmp_ordered("==", values, ir.Constant(values.type, [0.0] * values.type.count))

    def are_multiples(self, values: ir.Value, quanta: ir.Value) -> ir.Value:
        """Return which magnitudes are multiples of powers of two, less than 2**23 times as large."""
        # Digits after the quantum are lost on the way up. Where that overflows, NaN is equal to nothing.
        digits = 23 if self.itemsize == 4 else 52
        if self.itemsize == 8:
            quanta = self.builder.fpext(quanta, values.type)
        far = self.builder.fmul(quanta, ir.Constant(values.type, [2.0**digits] * values.type.count))
        return self.builder.fcmp_ordered("==", self.builder.fsub(self.builder.fadd(values, far), far), values)

    def perturbation(self, values: ir.Value, multiples: ir.Value, shares: ir.Value) -> ir.Value:
        """Return by how much magnitudes are perturbed, in units."""
        if self.clamp_rows or self.clamp_columns:
            # Lines that may be short need no zeros.
            multiples = self.builder.and_(multiples, self.builder.not_(self.is_zero(values)))
        return self.builder.select(multiples, shares, self.constant(_FLOAT, 0.0, shares.type.count))

    # From tiles to lanes and back

    def in_lanes(self, eight_of: Callable[[int], ir.Value]) -> list[ir.Value]:
        """Return eight vectors of 16-bit integers over the lanes, from eight float32 of each lane's tile."""
        builder = self.builder
        vectors = []
        for k in range(8):
            parts = [eight_of(lane) for lane in range(k, LANES, 8)]
            whole = [
                builder.fptosi(self.intrinsic("llvm.rint.v8f32", part.type, [part]), ir.VectorType(_I32, 8))
                for part in parts
            ]
            most, least = self.constant(_I32, 32767, LANES), self.constant(_I32, -32768, LANES)
            vectors.append(builder.trunc(self.larger(self.larger(self.joined(whole), most, False), least), _VECTOR))
        return self.transposed(vectors)

    # Functions

    def load(self) -> None:
        builder, at = self.builder, self.at
        eight = ir.VectorType(_I32, 8)
        zeros_at = at.scratch + 32 * LANES
        tiles = self.sources()
        for lane in range(LANES):
            self.put(ir.Constant(eight, [0] * 8), at.scratch + 32 * lane)
            if self.perturb:
                self.put(ir.Constant(eight, [0] * 8), zeros_at + 32 * lane)

        # Row after row of all tiles, which lie side by side: one tile after the other would be a row here, a row there.
        def measure_row(row: ir.Value) -> None:
            for lane, tile in enumerate(tiles):
                start = self.start_of_row(tile, row)
                largest = self.get(at.scratch + 32 * lane, eight)
                zeros = self.get(zeros_at + 32 * lane, eight) if self.perturb else None
                for first, count in self.pieces():
                    values = self.magnitudes(start, first, count)
                    largest = self.larger(self.filled_up(self.leading_bits(values), 8), largest)
                    if self.perturb:
                        ones = builder.zext(self.is_zero(values), ir.VectorType(_I32, count))
                        zeros = builder.add(zeros, self.filled_up(ones, 8))
                self.put(largest, at.scratch + 32 * lane)
                if self.perturb:
                    self.put(zeros, zeros_at + 32 * lane)

        self.for_each(self.rows, measure_row)

        def reduce(lane: ir.Value) -> None:
            of_eight = self.get(self.offset(at.scratch, lane, 32), eight)
            largest = self.intrinsic("llvm.vector.reduce.smax.v8i32", _I32, [of_eight])
            self.put(largest, self.offset(at.largest, lane, 4))
            if self.perturb:
                of_eight = self.get(self.offset(zeros_at, lane, 32), eight)
                zeros = self.intrinsic("llvm.vector.reduce.add.v8i32", _I32, [of_eight])
                self.put(zeros, self.offset(at.zeros, lane, 4))
                both = builder.fadd(
                    self.greatest(at.rows, lane, at.row_width, self.rows),
                    self.greatest(at.columns, lane, at.column_width, self.cols),
                )
                self.put(both, self.offset(at.quanta, lane, 4))

        self.for_each(LANES, reduce)
        self.choose_units()
        middle = ir.Constant(_FLOAT, float(HALF))

        def begin(lane: ir.Value) -> None:
            unit = self.get(self.offset(at.units, lane, 4), _FLOAT)
            for bit, start, width, value in (
                (KEEP_COLUMNS, at.columns, at.column_width, ir.Constant(_FLOAT, 0.0)),
                (KEEP_ROWS, at.rows, at.row_width, builder.fmul(unit, middle)),
            ):
                place = self.offset(start, lane, 4 * width)
                # Lane by lane, as a choice of all at once would be a jump.
                bits = self.splat(builder.and_(builder.trunc(self.c, _I32), _I32(bit)), width)
                keeps = builder.icmp_unsigned("!=", bits, self.constant(_I32, 0, width))
                kept = self.get(place, ir.VectorType(_FLOAT, width))
                if self.perturb:
                    # To whole units, which leave differences exact.
                    scale = self.splat(self.get(self.offset(at.scales, lane, 4), _FLOAT), width)
                    whole = self.intrinsic(f"llvm.rint.v{width}f32", kept.type, [builder.fmul(kept, scale)])
                    kept = builder.fmul(whole, self.splat(unit, width))
                self.put(builder.select(keeps, kept, self.splat(value, width)), place)

        self.for_each(LANES, begin)
        for lane in range(LANES):
            for column in range(self.cols, at.column_width):
                self.put(ir.Constant(_FLOAT, float("inf")), at.columns + 4 * (lane * at.column_width + column))
        scales = [self.splat(self.get(at.scales + 4 * lane, _FLOAT), 8) for lane in range(LANES)]
        quanta: list[ir.Value] = []
        if self.perturb:
            quanta += [self.splat(self.get(at.quanta + 4 * lane, _FLOAT), 8) for lane in range(LANES)]

        def first_of(value: ir.Value, count: int) -> ir.Value:
            return self.picked(value, value, range(count))

        def load_row(row: ir.Value) -> None:
            starts = [self.start_of_row(tile, row) for tile in tiles]
            for first, count in self.pieces():

                def eight_of(lane: int, first: int = first, count: int = count) -> ir.Value:
                    columns = at.columns + 4 * (lane * at.column_width + first)
                    values = self.magnitudes(starts[lane], first, count)
                    above = self.get(columns, ir.VectorType(_FLOAT, count))
                    potential = self.get(self.offset(at.rows + 4 * lane * at.row_width, row, 4), _FLOAT)
                    rest = self.in_units(values, above, self.splat(potential, count), first_of(scales[lane], count))
                    if self.perturb:
                        multiples = self.are_multiples(values, first_of(quanta[lane], count))
                        shares_at = self.offset(at.shares + 4 * first, row, 4 * at.column_width)
                        shares = self.get(shares_at, ir.VectorType(_FLOAT, count))
                        rest = builder.fadd(rest, self.perturbation(values, multiples, shares))
                    return self.filled_up(rest, 8)

                for k, vector in enumerate(self.in_lanes(eight_of)[:count]):
                    entry = at.entries + _VECTOR_BYTES * (first + k)
                    self.put(vector, self.offset(entry, row, _VECTOR_BYTES * self.cols))

        self.for_each(self.rows, load_row)
        zero = ir.Constant(_VECTOR, [0] * LANES)
        for start, width in ((at.u, at.row_width), (at.v, at.column_width)):
            for k in range(width):
                self.put(zero, start + _VECTOR_BYTES * k)
        for clamp, floats, width, count, floor in (
            (self.clamp_rows, at.rows, at.row_width, self.rows, at.floor_u),
            (self.clamp_columns, at.columns, at.column_width, self.cols, at.floor_v),
        ):
            for first in range(0, count, 8) if clamp else ():

                def floors_of(lane: int, floats: int = floats, width: int = width, first: int = first) -> ir.Value:
                    above = self.get(floats + 4 * (lane * width + first), ir.VectorType(_FLOAT, 8))
                    return builder.fmul(builder.fsub(self.constant(_FLOAT, 0.0, 8), above), scales[lane])

                for k, vector in enumerate(self.in_lanes(floors_of)):
                    self.put(vector, floor + _VECTOR_BYTES * (first + k))

    def greatest(self, start: int, lane: ir.Value, width: int, count: int) -> ir.Value:
        """Return the greatest of a tile's potentials, or any that is negative if all are."""
        bits = self.get(self.offset(start, lane, 4 * width), ir.VectorType(_I32, width))
        existing = ir.Constant(ir.VectorType(_BIT, width), [k < count for k in range(width)])
        bits = self.builder.select(existing, bits, self.constant(_I32, -(1 << 31), width))
        return self.builder.bitcast(self.intrinsic(f"llvm.vector.reduce.smax.v{width}i32", _I32, [bits]), _FLOAT)

    def choose_units(self) -> None:
        """Fill `units` and `scales` from `largest`, which is made that of float32."""
        builder, at = self.builder, self.at
        kind = ir.VectorType(_I32, LANES)

        def number(value: int) -> ir.Value:
            return self.constant(_I32, value, LANES)

        largest = self.get(at.largest, kind)
        if self.itemsize == 8:
            # The bits of a float32 of the same exponent, or of the nearest that there is.
            exponent = builder.lshr(largest, number(20))
            is_finite = builder.icmp_signed("<", exponent, number(2047))
            exponent = self.larger(builder.sub(exponent, number(1023 - 127)), number(0))
            exponent = builder.select(is_finite, self.larger(exponent, number(254), False), number(255))
            largest = builder.shl(exponent, number(23))
            self.put(largest, at.largest)
        # Of both powers of two the exponent has to be that of a normal number.
        exponent = self.larger(builder.lshr(largest, number(23)), number(40))
        exponent = self.larger(exponent, number(254), False)
        if self.perturb:
            # That of what the potentials take away: entries near it decide, and larger ones may be multiples of more.
            typical = self.get(at.quanta, ir.VectorType(_FLOAT, LANES))
            is_positive = builder.fcmp_ordered(">", typical, self.constant(_FLOAT, 0.0, LANES))
            bits = builder.lshr(builder.bitcast(typical, kind), number(23))
            least = self.larger(builder.sub(exponent, number(FARTHEST_BELOW)), number(40))
            bits = self.larger(builder.select(is_positive, bits, number(0)), least)
            exponent = self.larger(bits, exponent, False)
        finer = self.splat(builder.trunc(builder.and_(self.c, _I64(KEEP_COLUMNS - 1)), _I32), LANES)
        exponent = builder.sub(exponent, finer)
        self.put(builder.shl(builder.sub(number(268), exponent), number(23)), at.scales)
        self.put(builder.shl(builder.sub(exponent, number(14)), number(23)), at.units)
        if self.perturb:
            coarser = builder.sub(number(14), self.splat(builder.trunc(self.d, _I32), LANES))
            self.put(builder.shl(builder.sub(exponent, coarser), number(23)), at.quanta)

    def reduced(self, line: ir.Value, along_rows: bool) -> list[ir.Value]:
        """Return a line's entries, less the potentials of the lines across."""
        row = _VECTOR_BYTES * self.cols
        step, next_line, count = (_VECTOR_BYTES, row, self.cols) if along_rows else (row, _VECTOR_BYTES, self.rows)
        across = self.at.v if along_rows else self.at.u
        return [
            self.saturated(
                "ssub",
                self.get(self.offset(self.at.entries + step * k, line, next_line), _VECTOR),
                self.get(across + _VECTOR_BYTES * k, _VECTOR),
            )
            for k in range(count)
        ]

    def move(self, along_rows: bool) -> None:
        builder = self.builder
        wide = ir.VectorType(_I32, LANES)
        share = self.splat(builder.trunc(self.a, _I16), LANES)
        clamp = self.clamp_rows if along_rows else self.clamp_columns
        potentials, floors = (self.at.u, self.at.floor_u) if along_rows else (self.at.v, self.at.floor_v)
        sixteen = self.constant(_I32, 16, LANES)

        def move_line(line: ir.Value) -> None:
            nth, following = self.best_two(self.reduced(line, along_rows), self.n)
            both, one_of_them = builder.and_(nth, following), builder.xor(nth, following)
            middle = builder.add(both, builder.ashr(one_of_them, self.constant(_I16, 1, LANES)))
            place = self.offset(potentials, line, _VECTOR_BYTES)
            way = self.saturated("ssub", middle, self.get(place, _VECTOR))
            # The upper half of a product: an instruction of its own, if all of it stands in one block.
            product = builder.mul(builder.sext(self.saturated("sadd", way, way), wide), builder.sext(share, wide))
            rounded = builder.trunc(builder.lshr(product, sixteen), _VECTOR)
            new = self.saturated("sadd", middle, rounded)
            if clamp:
                new = self.larger(new, self.get(self.offset(floors, line, _VECTOR_BYTES), _VECTOR))
            self.put(new, place)

        self.for_each(self.rows if along_rows else self.cols, move_line)

    def prove(self) -> None:
        function = self.builder.module.globals[FIND_POTENTIALS]
        self.builder.call(function, [self.memory, self.a, self.b, self.c, self.d])
        self.store_masks()

    def find_potentials(self) -> None:
        self.choose_best()
        self.add_potentials()

    def choose_best(self) -> None:
        at = self.at

        def choose(row: ir.Value) -> None:
            nth, following = self.best_two(self.reduced(row, along_rows=True), self.n)
            self.put(nth, self.offset(at.best, row, _VECTOR_BYTES))
            self.put(following, self.offset(at.best + _VECTOR_BYTES * at.row_width, row, _VECTOR_BYTES))

        self.for_each(self.rows, choose)
        place, widths = at.scratch, (at.column_width, at.row_width, at.row_width)
        for start, width in zip((at.v, at.best, at.best + _VECTOR_BYTES * at.row_width), widths, strict=True):
            for first in range(0, width, 8):
                eight = [self.get(start + _VECTOR_BYTES * (first + k), _VECTOR) for k in range(8)]
                for k, vector in enumerate(self.transposed(eight)):
                    for lane in range(k, LANES, 8):
                        part = self.picked(vector, vector, range(lane - k, lane - k + 8))
                        self.put(part, place + 2 * (lane * width + first), 2)
            place += 2 * LANES * width

    def add_potentials(self) -> None:
        at, builder = self.at, self.builder
        nth_at = at.scratch + 2 * LANES * at.column_width
        following_at = nth_at + 2 * LANES * at.row_width

        def of_tile(start: int, lane: ir.Value, width: int) -> ir.Value:
            narrow = self.get(self.offset(start, lane, 2 * width), ir.VectorType(_I16, width), 2)
            return builder.sext(narrow, ir.VectorType(_I32, width))

        def add(lane: ir.Value) -> None:
            unit = self.get(self.offset(at.units, lane, 4), _FLOAT)
            both = builder.add(of_tile(nth_at, lane, at.row_width), of_tile(following_at, lane, at.row_width))
            half = builder.fmul(unit, ir.Constant(_FLOAT, 0.5))
            for start, width, number, times, clamp in (
                (at.columns, at.column_width, of_tile(at.scratch, lane, at.column_width), unit, self.clamp_columns),
                (at.rows, at.row_width, both, half, self.clamp_rows),
            ):
                floats = ir.VectorType(_FLOAT, width)
                place = self.offset(start, lane, 4 * width)
                taken = builder.fmul(builder.sitofp(number, floats), self.splat(times, width))
                new = builder.fadd(self.get(place, floats), taken)
                if clamp:
                    # Less than a unit is as good as nothing, and lets a line be short.
                    small = builder.fcmp_ordered("<", new, self.splat(unit, width))
                    new = builder.select(small, self.constant(_FLOAT, 0.0, width), new)
                self.put(new, place)

        self.for_each(LANES, add)

    def store_masks(self) -> None:
        at, builder, width = self.at, self.builder, self.at.column_width
        bytes_, bits = ir.VectorType(_BYTE, width), ir.IntType(width)
        floats = ir.VectorType(_FLOAT, width)
        counts_at, lacking_at, clear_at = at.scratch, at.scratch + width * LANES, at.scratch + 5 * width * LANES
        wrong_at = at.scratch + 9 * width * LANES
        none, nothing = ir.Constant(bytes_, [0] * width), self.constant(_FLOAT, 0.0, width)
        all_clear = self.constant(_FLOAT, float("inf"), width)

        def judge(lane: ir.Value, counts: ir.Value, wrong_rows: ir.Value, lacking: ir.Value, clear: ir.Value) -> None:
            if self.clamp_rows and self.clamp_columns:
                existing = bits((1 << self.cols) - 1)
                for more in range(self.n):
                    most = ir.Constant(bytes_, [self.n - 1 - more] * width)
                    has_room = builder.bitcast(builder.icmp_unsigned("<=", counts, most), bits)
                    word = self.as_word(builder.and_(has_room, existing))
                    self.put(word, self.offset(at.room + 8 * LANES * more, lane, 8))
            potentials = self.get(self.offset(at.columns, lane, 4 * width), floats)
            full = ir.Constant(bytes_, [self.n if column < self.cols else 0 for column in range(width)])
            wrong = builder.bitcast(self.is_wrong(counts, full, potentials, self.clamp_columns), bits)
            if self.clamp_columns and self.cols < width:
                # Columns that there are not have infinite potentials.
                wrong = builder.and_(wrong, bits((1 << self.cols) - 1))
            proven = builder.and_(builder.icmp_unsigned("==", wrong, bits(0)), builder.not_(wrong_rows))
            if self.perturb:
                proven = builder.and_(proven, self.is_proven_unperturbed(lane, lacking, clear))
            self.put(builder.zext(proven, _I32), self.offset(at.proven, lane, 4))

        if self.rows * self.cols <= TILE_BY_TILE:
            at_once = max(1, 2 * LANES // width)

            def store_tile(lane: ir.Value) -> None:
                base = builder.inttoptr(self.a, pointer_to(self.source))
                tile = builder.gep(base, [self.get(self.offset(at.weights, lane, 8), _I64)], source_etype=self.source)
                mask = builder.add(self.d, self.get(self.offset(at.masks, lane, 8), _I64))
                counts, wrong, lacking, clear = none, _BIT(0), nothing, all_clear
                for first in range(0, self.rows, at_once):
                    rows = range(first, min(first + at_once, self.rows))
                    stored = self.store_rows(tile, mask, lane, [_I64(row) for row in rows])
                    wrong = builder.or_(wrong, stored.is_wrong)
                    counts = builder.add(counts, self.folded(stored.ones, width, builder.add))
                    if self.perturb:
                        lacking = builder.fadd(lacking, self.folded(stored.lacking, width, builder.fadd))
                        clear = self.least(clear, self.folded(stored.clear, width, self.least))
                judge(lane, counts, wrong, lacking, clear)

            self.for_each(LANES, store_tile)
            return

        tiles = self.sources()
        masks = [builder.add(self.d, self.get(at.masks + 8 * lane, _I64)) for lane in range(LANES)]
        for lane in range(LANES):
            self.put(none, counts_at + width * lane)
            self.put(_I64(0), wrong_at + 8 * lane)
            if self.perturb:
                self.put(nothing, lacking_at + 4 * width * lane)
                self.put(all_clear, clear_at + 4 * width * lane)

        def store_row(row: ir.Value) -> None:
            for lane, tile in enumerate(tiles):
                stored = self.store_rows(tile, masks[lane], _I64(lane), [row])
                wrong = builder.or_(self.get(wrong_at + 8 * lane, _I64), builder.zext(stored.is_wrong, _I64))
                self.put(wrong, wrong_at + 8 * lane)
                counts = builder.add(self.get(counts_at + width * lane, bytes_), stored.ones)
                self.put(counts, counts_at + width * lane)
                if self.perturb:
                    lacking, clear = lacking_at + 4 * width * lane, clear_at + 4 * width * lane
                    self.put(builder.fadd(self.get(lacking, floats), stored.lacking), lacking)
                    self.put(self.least(self.get(clear, floats), stored.clear), clear)

        self.for_each(self.rows, store_row)

        def judge_lane(lane: ir.Value) -> None:
            counts = self.get(self.offset(counts_at, lane, width), bytes_)
            wrong = self.get(self.offset(wrong_at, lane, 8), _I64)
            lacking, clear = nothing, all_clear
            if self.perturb:
                lacking = self.get(self.offset(lacking_at, lane, 4 * width), floats)
                clear = self.get(self.offset(clear_at, lane, 4 * width), floats)
            judge(lane, counts, builder.icmp_unsigned("!=", wrong, _I64(0)), lacking, clear)

        self.for_each(LANES, judge_lane)

    def least(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.larger(a, b, False)

    def folded(self, value: ir.Value, count: int, both: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
        """Join the halves of a vector until no more than these elements are left."""
        while value.type.count > count:
            half = value.type.count // 2
            value = both(self.picked(value, value, range(half)), self.picked(value, value, range(half, 2 * half)))
        return value

    def is_proven_unperturbed(self, lane: ir.Value, lacking: ir.Value, clear: ir.Value) -> ir.Value:
        """Return whether a tile's mask is optimal without the perturbation too, if lines hold what they have to."""
        builder, at = self.builder, self.at
        one = self.folded(lacking, 1, builder.fadd)
        wrong = builder.extract_element(one, _I32(0))
        least = builder.extract_element(self.folded(clear, 1, self.least), _I32(0))
        quantum = self.get(self.offset(at.quanta, lane, 4), _FLOAT)
        unit = self.get(self.offset(at.units, lane, 4), _FLOAT)
        quantum = builder.fmul(quantum, self.get(self.offset(at.scales, lane, 4), _FLOAT))
        proven = builder.fcmp_ordered("<", wrong, quantum)
        margin = builder.fadd(wrong, ir.Constant(_FLOAT, 1.0))
        proven = builder.and_(proven, builder.fcmp_ordered(">", least, margin))
        farthest = builder.fmul(unit, ir.Constant(_FLOAT, float(FARTHEST)))
        for start, width, count in ((at.columns, at.column_width, self.cols), (at.rows, at.row_width, self.rows)):
            potentials = self.get(self.offset(start, lane, 4 * width), ir.VectorType(_FLOAT, width))
            size = self.intrinsic(f"llvm.fabs.v{width}f32", potentials.type, [potentials])
            is_near = builder.fcmp_ordered("<=", size, self.splat(farthest, width))
            bits = ir.IntType(width)
            existing = bits((1 << count) - 1)
            all_near = builder.icmp_unsigned("==", builder.and_(builder.bitcast(is_near, bits), existing), existing)
            proven = builder.and_(proven, all_near)
        return proven

    def store_rows(self, tile: ir.Value, mask: ir.Value, lane: ir.Value, rows: list[ir.Value]) -> _Stored:
        """Store the mask of some rows."""
        at, builder, cols, width = self.at, self.builder, self.cols, self.at.column_width
        count = 1 << (len(rows) - 1).bit_length()
        values, thresholds, shares = [], [], []
        for row in rows:
            values.append(self.filled_up(self.magnitudes(self.start_of_row(tile, row), 0, cols), width))
            place = self.offset(at.rows, builder.add(builder.mul(lane, _I64(at.row_width)), row), 4)
            thresholds.append(self.get(place, _FLOAT))
            if self.perturb:
                shares.append(self.get(self.offset(at.shares, row, 4 * width), ir.VectorType(_FLOAT, width)))
        # Rows that there are not hold nothing: their thresholds are infinite.
        values += values[-1:] * (count - len(rows))
        thresholds += [ir.Constant(_FLOAT, float("inf"))] * (count - len(rows))
        shares += shares[-1:] * (count - len(rows))
        potentials = self.get(self.offset(at.columns, lane, 4 * width), ir.VectorType(_FLOAT, width))
        value, level, column = (
            self.joined(each)
            for each in (values, [self.splat(threshold, width) for threshold in thresholds], [potentials] * count)
        )
        lacking = clear = None
        if self.perturb:
            nothing = self.constant(_FLOAT, 0.0, count * width)
            unit_scale = self.splat(self.get(self.offset(at.scales, lane, 4), _FLOAT), count * width)
            quanta = self.splat(self.get(self.offset(at.quanta, lane, 4), _FLOAT), count * width)
            multiples = self.are_multiples(value, quanta)
            rest = self.in_units(value, column, level, unit_scale)
            perturbed = builder.fadd(rest, self.perturbation(value, multiples, self.joined(shares)))
            chosen = builder.fcmp_ordered(">", perturbed, nothing)
            opposite = builder.fsub(nothing, rest)
            right, wrong = builder.select(chosen, rest, opposite), builder.select(chosen, opposite, rest)
            lacking = builder.select(builder.fcmp_ordered(">", wrong, nothing), wrong, nothing)
            clear = builder.select(multiples, self.constant(_FLOAT, float("inf"), count * width), right)
        else:
            if self.itemsize == 8:
                wide = ir.VectorType(_DOUBLE, count * width)
                level, column = builder.fpext(level, wide), builder.fpext(column, wide)
            chosen = builder.fcmp_ordered(">", builder.fsub(value, column), level)
        ones = builder.zext(chosen, ir.VectorType(_BYTE, count * width))
        if self.clamp_rows and self.clamp_columns:
            # Columns that there are not hold no zeros to fill up with.
            existing = ir.Constant(ir.VectorType(_BIT, count * width), [k < cols for k in range(width)] * count)
            zeros = builder.and_(self.is_zero(value), existing)
            for number, row in enumerate(rows):
                place = builder.mul(builder.add(builder.mul(row, _I64(LANES)), lane), _I64(8))
                for start, each in ((at.bits, chosen), (at.zero_bits, zeros)):
                    own = self.picked(each, each, range(number * width, (number + 1) * width))
                    word = self.as_word(builder.bitcast(own, ir.IntType(width)))
                    self.put(word, builder.add(place, _I64(start)))
        for number, row in enumerate(rows):
            start = builder.add(mask, builder.mul(row, self.c))
            part = self.picked(ones, ones, range(number * width, number * width + cols))
            builder.store(part, builder.inttoptr(start, pointer_to(part.type)), align=1)
        number_type = ir.IntType(width)
        if count == 1:
            kept = self.intrinsic(f"llvm.ctpop.i{width}", number_type, [builder.bitcast(chosen, number_type)])
            is_wrong = self.is_wrong(kept, number_type(self.n), thresholds[0], self.clamp_rows)
            return _Stored(ones, is_wrong, lacking, clear)
        numbers = ir.VectorType(number_type, count)
        kept = self.intrinsic(f"llvm.ctpop.v{count}i{width}", numbers, [builder.bitcast(chosen, numbers)])
        full = ir.Constant(numbers, [self.n] * len(rows) + [0] * (count - len(rows)))
        each = ir.Constant(ir.VectorType(_FLOAT, count), ir.Undefined)
        if self.clamp_rows:
            for number, threshold in enumerate(thresholds):
                each = builder.insert_element(each, threshold, _I32(number))
        wrong = builder.bitcast(self.is_wrong(kept, full, each, self.clamp_rows), ir.IntType(count))
        return _Stored(ones, builder.icmp_unsigned("!=", wrong, ir.IntType(count)(0)), lacking, clear)

    def find_lowest(self) -> None:
        at, builder = self.at, self.builder
        everywhere = (
            (at.columns, at.column_width, self.cols, at.lowest_column),
            (at.rows, at.row_width, self.rows, at.lowest_row),
        )

        def find(lane: ir.Value) -> None:
            for start, width, count, place in everywhere:
                potentials = self.get(self.offset(start, lane, 4 * width), ir.VectorType(_FLOAT, width))
                largest = self.constant(_FLOAT, float("inf"), width)
                potentials = self.picked(potentials, largest, [k if k < count else width for k in range(width)])
                lowest = self.folded(potentials, 1, self.least)
                self.put(builder.extract_element(lowest, _I32(0)), self.offset(place, lane, 4))

        self.for_each(LANES, find)

    def as_word(self, bits: ir.Value) -> ir.Value:
        return self.builder.zext(bits, _I64) if bits.type.width < 64 else bits

    def fill(self) -> None:
        at, builder = self.at, self.builder
        words = ir.VectorType(_I64, LANES)
        zero = self.constant(_I64, 0, LANES)

        def fill_row(row: ir.Value) -> None:
            kept = self.get(self.offset(at.bits, row, 8 * LANES), words)
            zeros = self.get(self.offset(at.zero_bits, row, 8 * LANES), words)
            missing = builder.sub(
                self.constant(_I64, self.n, LANES), self.intrinsic(f"llvm.ctpop.v{LANES}i64", words, [kept])
            )
            self.put(missing, at.scratch)

            def fill_from(less: ir.Value) -> None:
                columns = self.offset(at.room, builder.sub(_I64(self.n - 1), less), 8 * LANES)
                before = builder.block
                loop, after = builder.append_basic_block(), builder.append_basic_block()
                given = (
                    self.get(self.offset(at.bits, row, 8 * LANES), words),
                    self.get(columns, words),
                    self.get(at.scratch, words),
                )
                builder.cbranch(self.any_of(self.fitting(zeros, *given)), loop, after)
                builder.position_at_end(loop)
                values = [builder.phi(words) for _ in given]
                for value, first in zip(values, given, strict=True):
                    value.add_incoming(first, before)
                kept, room, missing = values
                best = self.fitting(zeros, kept, room, missing)
                bit = builder.and_(best, builder.sub(zero, best))
                taken = builder.zext(builder.icmp_unsigned("!=", bit, zero), words)
                following = builder.or_(kept, bit), builder.xor(room, bit), builder.sub(missing, taken)
                for place, value in zip(
                    (self.offset(at.bits, row, 8 * LANES), columns, at.scratch), following, strict=True
                ):
                    self.put(value, place)
                for value, again in zip(values, following, strict=True):
                    value.add_incoming(again, loop)
                builder.cbranch(self.any_of(self.fitting(zeros, *following)), loop, after)
                builder.position_at_end(after)

            self.for_each(self.n, fill_from)

        self.for_each(self.rows, fill_row)
        self.exchange()

    def exchange(self) -> None:
        """Let rows that are short take zeros that other rows keep, which keep others instead, of columns with room."""
        at, builder = self.at, self.builder
        words = ir.VectorType(_I64, LANES)
        zero = self.constant(_I64, 0, LANES)
        self.put(zero, at.short)

        def exchange_of_row(row: ir.Value) -> None:
            own_at = self.offset(at.bits, row, 8 * LANES)
            kept = self.get(own_at, words)
            missing = builder.sub(
                self.constant(_I64, self.n, LANES), self.intrinsic(f"llvm.ctpop.v{LANES}i64", words, [kept])
            )
            some, none = builder.append_basic_block(), builder.append_basic_block()
            builder.cbranch(self.any_of(missing), some, none)
            builder.position_at_end(some)
            self.put(missing, at.scratch)
            zeros = self.get(self.offset(at.zero_bits, row, 8 * LANES), words)

            def exchange_with(other: ir.Value) -> None:
                other_at = self.offset(at.bits, other, 8 * LANES)
                kept, kept_there = self.get(own_at, words), self.get(other_at, words)
                zeros_there = self.get(self.offset(at.zero_bits, other, 8 * LANES), words)
                room, missing = self.get(at.room, words), self.get(at.scratch, words)
                given = builder.and_(builder.and_(kept_there, zeros_there), builder.and_(zeros, builder.not_(kept)))
                taken = builder.and_(builder.and_(zeros_there, builder.not_(kept_there)), room)
                can = builder.and_(builder.icmp_signed(">", missing, zero), builder.icmp_unsigned("!=", given, zero))
                can = builder.and_(can, builder.icmp_unsigned("!=", taken, zero))
                where = builder.sext(can, words)
                given, taken = (
                    builder.and_(where, builder.and_(each, builder.sub(zero, each))) for each in (given, taken)
                )
                # Its own row gives nothing: there no zero is both kept and not kept.
                self.put(builder.xor(kept_there, builder.or_(given, taken)), other_at)
                self.put(builder.or_(self.get(own_at, words), given), own_at)
                self.put(builder.xor(room, taken), at.room)
                self.put(builder.add(missing, where), at.scratch)

            self.for_each(self.rows, exchange_with)
            self.put(builder.or_(self.get(at.short, words), self.get(at.scratch, words)), at.short)
            builder.branch(none)
            builder.position_at_end(none)

        self.for_each(self.rows, exchange_of_row)

    def fitting(self, zeros: ir.Value, kept: ir.Value, room: ir.Value, missing: ir.Value) -> ir.Value:
        """Return which zeros of a row can be added, of columns with room, in words of each lane."""
        builder = self.builder
        is_short = builder.sext(builder.icmp_signed(">", missing, ir.Constant(missing.type, [0] * LANES)), missing.type)
        return builder.and_(builder.and_(zeros, builder.not_(kept)), builder.and_(room, is_short))

    def any_of(self, words: ir.Value) -> ir.Value:
        any_bit = self.intrinsic(f"llvm.vector.reduce.or.v{LANES}i64", _I64, [words])
        return self.builder.icmp_unsigned("!=", any_bit, _I64(0))

    def store_filled(self) -> None:
        at, builder, cols, width = self.at, self.builder, self.cols, self.at.column_width
        mask = builder.add(self.d, self.get(self.offset(at.masks, self.a, 8), _I64))

        def store_row(row: ir.Value) -> None:
            place = builder.add(builder.mul(row, _I64(LANES)), self.a)
            word = self.get(self.offset(at.bits, place, 8), _I64)
            word = builder.trunc(word, ir.IntType(width)) if width < 64 else word
            bits = builder.bitcast(word, ir.VectorType(_BIT, width))
            ones = builder.zext(self.picked(bits, bits, range(cols)), ir.VectorType(_BYTE, cols))
            start = builder.add(mask, builder.mul(row, self.c))
            builder.store(ones, builder.inttoptr(start, pointer_to(ones.type)), align=1)

        self.for_each(self.rows, store_row)

    def is_wrong(self, count: ir.Value, full: ir.Value, potential: ir.Value, clamp: bool) -> ir.Value:
        """Return whether a line holds more than it may, or fewer: which it may where its potential is 0."""
        builder = self.builder
        wrong = builder.icmp_unsigned("!=", count, full)
        if clamp:
            is_vector = isinstance(potential.type, ir.VectorType)
            zero = ir.Constant(potential.type, [0.0] * potential.type.count if is_vector else 0.0)
            wrong = builder.and_(wrong, builder.fcmp_unordered("!=", potential, zero))
            wrong = builder.or_(wrong, builder.icmp_unsigned(">", count, full))
        return wrong


_EIGHT = ir.VectorType(_I32, 8)
_EIGHT_FLOATS = ir.VectorType(_FLOAT, 8)
# Added to a smaller float32, it leaves the nearest integer in the bits of the sum.
_TO_INTEGER = 1.5 * 2.0**23


class _InFours(_Writer):
    """Writes a faster `load` for tiles of float32 in a multiple of four columns; it does the same, bit for bit.

    A vector holds four columns of a row of one tile, and of the tile that is eight further.
    """

    def load(self) -> None:
        is_first = self.builder.icmp_signed("==", self.c, _I64(0))
        with self.builder.if_else(is_first) as (if_first, if_not):
            with if_first:
                self.load_first()
            with if_not:
                super().load()

    def load_first(self) -> None:
        """Write what `load` does where there are no potentials."""
        at = self.at
        tiles = self.sources()
        for base in range(0, LANES, 16):
            self.measure(tiles, base)
        self.choose_units()
        for lane in range(LANES):
            middle = self.builder.fmul(self.get(at.units + 4 * lane, _FLOAT), ir.Constant(_FLOAT, float(HALF)))
            for first in range(0, at.column_width, 8):
                potentials = [0.0 if column < self.cols else float("inf") for column in range(first, first + 8)]
                self.put(ir.Constant(_EIGHT_FLOATS, potentials), at.columns + 4 * (lane * at.column_width + first))
            for first in range(0, at.row_width, 8):
                self.put(self.splat(middle, 8), at.rows + 4 * (lane * at.row_width + first))
        for start, width in ((at.u, at.row_width), (at.v, at.column_width)):
            for k in range(width):
                self.put(ir.Constant(_VECTOR, [0] * LANES), start + _VECTOR_BYTES * k)
        for base in range(0, LANES, 16):
            self.load_sixteen(tiles, base)

    def measure(self, tiles: list[ir.Value], base: int) -> None:
        """Fill `largest` of sixteen tiles."""
        maxima = [self.at.scratch + 32 * k for k in range(8)]
        for place in maxima:
            self.put(self.constant(_I32, 0, 8), place)

        def measure_row(row: ir.Value) -> None:
            for k, place in enumerate(maxima):
                largest = self.get(place, _EIGHT)
                for values in self.fours(tiles, (base + k, base + k + 8), row):
                    largest = self.larger(self.builder.bitcast(values, _EIGHT), largest)
                self.put(largest, place)

        self.for_each(self.rows, measure_row)
        halves = []
        for first in (0, 4):
            a, b, c, d = self.transposed([self.get(place, _EIGHT) for place in maxima[first : first + 4]])
            halves.append(self.larger(self.larger(a, b), self.larger(c, d)))
        order = [*range(4), *range(8, 12), *range(4, 8), *range(12, 16)]
        self.put(self.picked(halves[0], halves[1], order), self.at.largest + 4 * base)

    def load_sixteen(self, tiles: list[ir.Value], base: int) -> None:
        """Fill the entries of sixteen tiles."""
        builder, at = self.builder, self.at
        scales = []
        for lane in range(base, base + 8):
            both = [self.get(at.scales + 4 * each, _FLOAT) for each in (lane, lane + 8)]
            scales.append(self.joined([self.splat(scale, 4) for scale in both]))

        def load_row(row: ir.Value) -> None:
            of_lanes = [self.fours(tiles, (base + k, base + k + 8), row) for k in range(8)]
            for number, values in enumerate(zip(*of_lanes, strict=True)):
                whole = []
                for value, scale in zip(values, scales, strict=True):
                    rest = builder.fsub(builder.fmul(value, scale), self.constant(_FLOAT, float(HALF), 8))
                    whole.append(builder.bitcast(builder.fadd(rest, self.constant(_FLOAT, _TO_INTEGER, 8)), _EIGHT))
                # Numbers of 16 bits, of a tile and of the next one.
                pairs = [
                    builder.or_(
                        builder.and_(even, self.constant(_I32, 0xFFFF, 8)),
                        builder.shl(odd, self.constant(_I32, 16, 8)),
                    )
                    for even, odd in zip(whole[::2], whole[1::2], strict=True)
                ]
                for k, vector in enumerate(self.transposed(pairs)):
                    entry = at.entries + _VECTOR_BYTES * (4 * number + k) + 2 * base
                    self.put(vector, self.offset(entry, row, _VECTOR_BYTES * self.cols))

        self.for_each(self.rows, load_row)

    def fours(self, tiles: list[ir.Value], lanes: tuple[int, int], row: ir.Value) -> list[ir.Value]:
        """Return a row's magnitudes, four of one tile and four of another in a vector."""
        starts = [self.start_of_row(tiles[lane], row) for lane in lanes]
        return [self.joined([self.magnitudes(start, first, 4) for start in starts]) for first in range(0, self.cols, 4)]


class _FourByFour(_InFours):
    """Writes a faster `prove` for 4x4 tiles, too; it does the same, bit for bit.

    A vector holds a row of each of two tiles, where `_Writer` would fill half of one.
    """

    def prove(self) -> None:
        builder, at, get = self.builder, self.at, self.get
        tiles = self.sources()
        lanes = ir.VectorType(_I16, LANES)
        best = [self.best_two(self.reduced(_I64(row), along_rows=True), self.n) for row in range(4)]
        moved = [get(at.v + 2 * LANES * column, lanes) for column in range(4)]
        for base in range(0, LANES, 8):

            def some(vector: ir.Value, base: int = base) -> ir.Value:
                return builder.sext(self.picked(vector, vector, range(base, base + 8)), _EIGHT)

            units = get(at.units + 4 * base, _EIGHT_FLOATS)
            half = builder.fmul(units, self.constant(_FLOAT, 0.5, 8))
            columns = [builder.fmul(builder.sitofp(some(v), _EIGHT_FLOATS), units) for v in moved]
            rows = [builder.fmul(builder.sitofp(builder.add(some(a), some(b)), _EIGHT_FLOATS), half) for a, b in best]
            self.prove_eight(tiles, base, self.transposed(columns), self.transposed(rows))

    def prove_eight(
        self, tiles: list[ir.Value], base: int, columns: Sequence[ir.Value], rows: Sequence[ir.Value]
    ) -> None:
        """Store the masks of eight tiles; vectors hold what potentials of one take, and of the one four further."""
        builder, at = self.builder, self.at
        masks, wrong = [], []
        for k in range(4):
            column = self.add_to(at.columns + 4 * (base + k) * at.column_width, 4 * at.column_width, columns[k])
            level = self.add_to(at.rows + 4 * (base + k) * at.row_width, 4 * at.row_width, rows[k])
            # A byte for each row in the 32 bits of each column.
            by_columns = self.constant(_I32, 0, 8)
            for row in range(4):
                levels = self.picked(level, level, [row] * 4 + [4 + row] * 4)
                value = builder.fsub(self.fours(tiles, (base + k, base + k + 4), _I64(row))[0], column)
                chosen = builder.sext(builder.fcmp_ordered(">", value, levels), _EIGHT)
                by_columns = builder.or_(by_columns, builder.and_(chosen, self.constant(_I32, 1 << (8 * row), 8)))
            order = [16 * tile + 4 * column + row for tile in range(2) for row in range(4) for column in range(4)]
            by_rows = builder.bitcast(self.picked_bytes(by_columns, order), _EIGHT)
            masks.append(by_rows)
            sums = [self.sum_of_four(counted) for counted in (by_columns, by_rows)]
            full = ir.Constant(sums[0].type, [self.n] * 32)
            wrong.append(builder.bitcast(builder.or_(*(builder.xor(each, full) for each in sums)), _EIGHT))
        # All four numbers of a tile are the same.
        of_each = self.picked(
            self.picked(wrong[0], wrong[1], [0, 9, 0, 9, 4, 13, 4, 13]),
            self.picked(wrong[2], wrong[3], [2, 11, 2, 11, 6, 15, 6, 15]),
            [0, 1, 8, 9, 4, 5, 12, 13],
        )
        proven = builder.icmp_signed("==", of_each, self.constant(_I32, 0, 8))
        self.put(builder.zext(proven, _EIGHT), at.proven + 4 * base)
        self.store(base, masks)

    def add_to(self, start: int, step: int, taken: ir.Value) -> ir.Value:
        """Add to the potentials of one tile, and of the one that is four further; return both."""
        places, halves = [start, start + 4 * step], [range(4), range(4, 8)]
        before = self.joined([self.get(place, ir.VectorType(_FLOAT, 4)) for place in places])
        both = self.builder.fadd(before, taken)
        for place, half in zip(places, halves, strict=True):
            self.put(self.picked(both, both, half), place)
        return both

    def picked_bytes(self, value: ir.Value, order: Sequence[int]) -> ir.Value:
        bytes_ = self.builder.bitcast(value, ir.VectorType(_BYTE, 32))
        return self.picked(bytes_, bytes_, order)

    def sum_of_four(self, value: ir.Value) -> ir.Value:
        """Return, byte by byte, the sums of the four numbers of 32 bits in each half, four times."""
        builder, bytes_ = self.builder, ir.VectorType(_BYTE, 32)
        for order in ([1, 0, 3, 2], [2, 3, 0, 1]):
            other = self.picked(value, value, [*order, *(4 + k for k in order)])
            value = builder.bitcast(builder.add(builder.bitcast(value, bytes_), builder.bitcast(other, bytes_)), _EIGHT)
        return builder.bitcast(value, bytes_)

    def store(self, base: int, masks: list[ir.Value]) -> None:
        """Store masks, of which a vector holds one, row after row, and the one that is four further."""
        builder = self.builder
        places = self.get(self.at.masks + 8 * base, ir.VectorType(_I64, 8), 8)
        first = builder.extract_element(places, _I32(0))
        neighbours = builder.add(self.splat(first, 8), ir.Constant(places.type, [4 * k for k in range(8)]))
        apart = builder.bitcast(builder.icmp_signed("!=", places, neighbours), ir.IntType(8))
        with builder.if_else(builder.icmp_unsigned("==", apart, apart.type(0))) as (if_neighbours, if_apart):
            with if_neighbours:
                for row, bytes_ in enumerate(self.transposed(masks)):
                    self.put_mask(bytes_, first, row)
            with if_apart:
                for k, both in enumerate(masks):
                    for tile in range(2):
                        place = builder.extract_element(places, _I32(k + 4 * tile))
                        for row in range(4):
                            self.put_mask(builder.extract_element(both, _I32(4 * tile + row)), place, row)

    def put_mask(self, value: ir.Value, place: ir.Value, row: int) -> None:
        builder = self.builder
        address = builder.add(builder.add(self.d, place), builder.mul(_I64(row), self.c))
        builder.store(value, builder.inttoptr(address, pointer_to(value.type)), align=1)
