"""The inner loops of equilibration as machine code: explicit vectors, with one tile in each lane.

What LLVM makes of scalar code that ought to be vectorised changes with its version and takes it minutes for long
selection networks; and Numba has no vector type. So the vector code of a pattern is emitted here as LLVM IR and
compiled by llvmlite, which Numba brings along. It is straight-line code over packed min and max, in loops over the
lines of a tile, and takes a fraction of a second to compile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, reduce

import numpy as np
from llvmlite import binding, ir
from numpy.typing import NDArray

from masksolve import _networks
from masksolve._machine_code import VECTOR_BYTES, lock, new_engine, pointer_to
from masksolve._methods.exact.layout import (
    CLEARANCE,
    ENTRIES,
    LARGEST,
    LEAST,
    LOWEST,
    NONZERO,
    OFFSETS,
    QUANTUM,
    SHORT,
    SMALLEST,
    STRICT,
    STRICT_ROWS,
    THRESHOLD,
    WORD_BITS,
    WORST,
    WRONG,
    ZERO,
    ZEROS,
    Code,
    Vectors,
    layout,
    new_program,
)
from masksolve._translated import inner, intrinsic

_BOOL = ir.IntType(1)
_BYTE = ir.IntType(8)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)

_ADDRESS = pointer_to(_BYTE)
_PROTOTYPE = ir.FunctionType(ir.VoidType(), [_ADDRESS, _I64, _I64, _I64, ir.DoubleType()])


@intrinsic
def _call_address(
    builder: ir.IRBuilder, address: ir.Value, memory: ir.Value, a: ir.Value, b: ir.Value, c: ir.Value, x: ir.Value
) -> None:
    # In llvmlite, only the type of a pointer says what function is called.
    function = builder.inttoptr(address, _PROTOTYPE.as_pointer())
    builder.call(function, [builder.inttoptr(memory, _ADDRESS), a, b, c, x])


@inner
def call(address: int, vectors: Vectors, a: int, b: int, c: int, x: float) -> None:
    """Call one of the functions of `Code`."""
    _call_address(address, vectors.numbers, a, b, c, float(x))


@cache
def program(n: int, m: int, itemsize: int, source_itemsize: int) -> NDArray[np.int64]:
    """Return all that a kernel needs to know, for `unpack`: of a pattern, and of numbers and weights of these sizes."""
    with lock:
        engine = _engine_of(n, m, itemsize, source_itemsize)
        addresses = [
            engine.get_function_address(_clamped(name) if clamp and name in _CLAMPED else name)
            for clamp in (False, True)
            for name in Code._fields
        ]
    return new_program(addresses, n, m, itemsize)


@cache
def _engine_of(*arguments: int) -> binding.ExecutionEngine:
    n, m, _, _ = arguments
    return new_engine(write_module, arguments, "vectors", f"{n}:{m}")


def write_module(n: int, m: int, itemsize: int, source_itemsize: int) -> str:
    """Return the LLVM IR of the functions of `Code`, and of those that differ under clamp."""
    module = ir.Module()
    writers: dict[str, Callable[[_Writer], None]] = {
        "load": lambda write: write.load(source_itemsize),
        "move_rows": lambda write: write.move(rows=True),
        "move_columns": lambda write: write.move(rows=False),
        "choose": _Writer.choose,
        "judge": _Writer.judge,
        "fill": _Writer.fill,
        "find_zeros": _Writer.find_zeros,
        "measure": _Writer.measure,
        "perturb": _Writer.perturb,
        "weigh": _Writer.weigh,
        "store": _Writer.store,
    }
    if m > _LONGEST_INLINE:
        select = ir.Function(module, ir.FunctionType(ir.VoidType(), [_ADDRESS]), _SELECT)
        select.linkage = "internal"
        builder = ir.IRBuilder(select.append_basic_block())
        no_arguments = [ir.Constant(kind, ir.Undefined) for kind in _PROTOTYPE.args[1:]]
        _Writer(builder, [*select.args, *no_arguments], n, m, itemsize, False).select()
        builder.ret_void()
    for name, write in writers.items():
        for clamp in (False, True) if name in _CLAMPED else (False,):
            function = ir.Function(module, _PROTOTYPE, _clamped(name) if clamp else name)
            builder = ir.IRBuilder(function.append_basic_block())
            write(_Writer(builder, function.args, n, m, itemsize, clamp))
            builder.ret_void()
    return str(module)


# The network of a longer line takes LLVM so long that all functions share one.
_LONGEST_INLINE = 64
_SELECT = "select"
# What is different where potentials are clamped at 0.
_CLAMPED = ("move_rows", "move_columns", "choose", "judge", "weigh")


def _clamped(name: str) -> str:
    return f"clamped_{name}"


class _Writer:
    """Writes the code of one function where the builder stands."""

    def __init__(
        self, builder: ir.IRBuilder, arguments: Sequence[ir.Value], n: int, m: int, itemsize: int, clamp: bool
    ) -> None:
        self.builder = builder
        memory, self.a, self.b, self.c, self.x = arguments
        self.n, self.m, self.clamp = n, m, clamp
        self.at = layout(m, itemsize)
        self.word = 8 // itemsize
        self.bits = itemsize * 8
        self.lanes = VECTOR_BYTES // itemsize
        self.number = _number(itemsize)
        self.vector = ir.VectorType(self.number, self.lanes)
        self.integers = ir.VectorType(ir.IntType(self.bits), self.lanes)
        self.words = ir.VectorType(_I64, self.lanes)
        self.zero = self.constant(0.0)
        self.work = builder.bitcast(memory, pointer_to(self.vector))

    # Values and memory

    def constant(self, value: float) -> ir.Value:
        return ir.Constant(self.vector, [value] * self.lanes)

    def integer(self, value: int) -> ir.Value:
        return ir.Constant(self.integers, [value] * self.lanes)

    def word_bit(self, k: int) -> ir.Value:
        """Return the bit of a row's entry k in its word."""
        bit = k % WORD_BITS
        return ir.Constant(self.words, [(1 << bit) - (1 << 64 if bit == 63 else 0)] * self.lanes)

    def bit_of(self, column: ir.Value, number: int) -> ir.Value:
        """Return the bit of a column in a word of its row, or 0."""
        within = self.builder.sub(column, _I64(number * WORD_BITS))
        bit = self.builder.shl(_I64(1), within)
        if self.at.row_words == 1:
            return bit
        return self.builder.select(self.builder.icmp_unsigned("<", within, _I64(WORD_BITS)), bit, _I64(0))

    def row_word(self, row: ir.Value, number: int, start: int) -> ir.Value:
        """Return the vector number of a row's word, of those that begin at `start`."""
        return self.times(row, self.at.row_words * self.word, start + number * self.word)

    def splat(self, scalar: ir.Value, kind: ir.Type | None = None) -> ir.Value:
        undefined = ir.Constant(kind or self.vector, ir.Undefined)
        one = self.builder.insert_element(undefined, scalar, _I32(0))
        zeros = ir.Constant(ir.VectorType(_I32, self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(one, undefined, zeros)

    def index(self, value: ir.Value | int) -> ir.Value:
        return _I64(value) if isinstance(value, int) else value

    def place(self, vector: ir.Value | int, kind: ir.Type) -> ir.Value:
        place = self.builder.gep(self.work, [self.index(vector)], source_etype=self.vector)
        return self.builder.bitcast(place, pointer_to(kind))

    def load_vector(self, vector: ir.Value | int, kind: ir.Type | None = None) -> ir.Value:
        kind = kind or self.vector
        return self.builder.load(self.place(vector, kind), align=8, typ=kind)

    def store_vector(self, value: ir.Value, vector: ir.Value | int) -> None:
        self.builder.store(value, self.place(vector, value.type), align=8)

    def times(self, i: ir.Value, factor: int, offset: int = 0) -> ir.Value:
        return self.builder.add(self.builder.mul(i, _I64(factor)), _I64(offset))

    def for_each_line(self, body: Callable[[ir.Value], None], count: ir.Value | None = None) -> None:
        """Write a loop over line numbers 0 ... count - 1, or m - 1."""
        builder = self.builder
        before = builder.block
        loop, after = builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        line = builder.phi(_I64)
        line.add_incoming(_I64(0), before)
        body(line)
        following = builder.add(line, _I64(1))
        line.add_incoming(following, builder.block)
        more = builder.icmp_unsigned("<", following, _I64(self.m) if count is None else count)
        builder.cbranch(more, loop, after)
        builder.position_at_end(after)

    # Arithmetic

    def pick(self, is_max: bool, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return max or min, in the form that is a single packed instruction on x86: a < b ? a : b."""
        return self.builder.select(self.builder.fcmp_ordered(">" if is_max else "<", a, b), a, b)

    def magnitude(self, value: ir.Value) -> ir.Value:
        bits = self.builder.bitcast(value, self.integers)
        return self.builder.bitcast(self.builder.and_(bits, self.integer((1 << (self.bits - 1)) - 1)), self.vector)

    def best_two(self, values: list[ir.Value]) -> tuple[ir.Value, ir.Value]:
        """Return the n-th and the (n+1)-th largest."""
        if self.m <= _LONGEST_INLINE:
            return self.through_network(values)
        for k, value in enumerate(values):
            self.store_vector(value, self.at.scratch + k)
        memory = self.builder.function.args[0]
        self.builder.call(self.builder.module.get_global(_SELECT), [memory])
        return self.load_vector(self.at.scratch + self.m), self.load_vector(self.at.scratch + self.m + 1)

    def select(self) -> None:
        """Write the body of the function that `best_two` calls for long lines."""
        values = [self.load_vector(self.at.scratch + k) for k in range(self.m)]
        for k, value in enumerate(self.through_network(values)):
            self.store_vector(value, self.at.scratch + self.m + k)

    def through_network(self, values: list[ir.Value]) -> tuple[ir.Value, ir.Value]:
        """Return the n-th and the (n+1)-th largest."""
        network = _networks.selection_network(self.n, self.m)
        wires = list(values)
        for is_max, a, b in network.steps:
            wires.append(self.pick(is_max, wires[a], wires[b]))
        return wires[network.nth], wires[network.following]

    def middle(self, nth: ir.Value, following: ir.Value) -> ir.Value:
        if self.clamp:
            nth, following = self.pick(True, nth, self.zero), self.pick(True, following, self.zero)
        return self.builder.fmul(self.builder.fadd(nth, following), self.constant(0.5))

    def is_chosen(self, value: ir.Value, nth: ir.Value) -> ir.Value:
        chosen = self.builder.fcmp_ordered(">=", value, nth)
        return self.builder.and_(chosen, self.builder.fcmp_ordered(">", value, self.zero)) if self.clamp else chosen

    def entries(self, line: ir.Value, rows: bool) -> list[ir.Value]:
        """Return the vector numbers of a line's entries."""
        first = self.times(line, self.at.pitch if rows else 1, ENTRIES)
        return [self.builder.add(first, _I64(k if rows else k * self.at.pitch)) for k in range(self.m)]

    def reduced(self, line: ir.Value, rows: bool) -> list[ir.Value]:
        """Return a line's entries, less the potentials of the lines across."""
        across = self.at.v if rows else self.at.u
        return [
            self.builder.fsub(self.load_vector(entry), self.load_vector(across + k))
            for k, entry in enumerate(self.entries(line, rows))
        ]

    # Functions

    def load(self, source_itemsize: int) -> None:
        builder = self.builder
        source = _number(source_itemsize)
        base = builder.inttoptr(self.a, pointer_to(source))
        offsets = self.load_vector(OFFSETS, self.words)
        tiles = [
            builder.gep(base, [builder.extract_element(offsets, _I32(lane))], source_etype=source)
            for lane in range(self.lanes)
        ]
        self.store_vector(self.integer(0), LARGEST)
        self.store_vector(self.integer((1 << (self.bits - 1)) - 1), LEAST)

        def load_row(row: ir.Value) -> None:
            starts = [builder.gep(tile, [builder.mul(row, self.b)], source_etype=source) for tile in tiles]
            top = self.load_vector(LARGEST, self.integers)
            bottom = self.load_vector(LEAST, self.integers)
            entries = iter(self.entries(row, rows=True))
            k = 0
            for width in _powers_of_two(self.m, self.lanes):
                piece = ir.VectorType(source, width)
                pieces = []
                for start in starts:
                    place = builder.bitcast(builder.gep(start, [_I64(k)], source_etype=source), pointer_to(piece))
                    part = builder.load(place, align=source_itemsize, typ=piece)
                    widens = source_itemsize * 8 < self.bits
                    pieces.append(builder.fpext(part, ir.VectorType(self.number, width)) if widens else part)
                k += width
                for column in _transpose(builder, pieces):
                    entry = self.magnitude(column)
                    bits = builder.bitcast(entry, self.integers)
                    top = builder.select(builder.icmp_signed(">", bits, top), bits, top)
                    bottom = builder.select(builder.icmp_signed("<", bits, bottom), bits, bottom)
                    self.store_vector(entry, next(entries))
            self.store_vector(top, LARGEST)
            self.store_vector(bottom, LEAST)

        self.for_each_line(load_row)

    def move(self, rows: bool) -> None:
        builder = self.builder
        share = self.splat(builder.fptrunc(self.x, self.number) if self.bits == 32 else self.x)

        def move_line(line: ir.Value) -> None:
            potential = builder.add(line, _I64(self.at.u if rows else self.at.v))
            middle = self.middle(*self.best_two(self.reduced(line, rows)))
            old = self.load_vector(potential)
            new = builder.fadd(old, builder.fmul(share, builder.fsub(middle, old)))
            self.store_vector(self.pick(True, new, self.zero) if self.clamp else new, potential)

        self.for_each_line(move_line, self.c)

    def choose(self) -> None:
        builder = self.builder
        no_bits = ir.Constant(self.words, [0] * self.lanes)
        self.store_vector(self.integer(-1), STRICT)
        self.store_vector(self.constant(float("inf")), WORST)
        for k in range(self.m):
            self.store_vector(self.integer(0), self.at.counts + k)

        def choose_row(row: ir.Value) -> None:
            values = self.reduced(row, rows=True)
            nth, following = self.best_two(values)
            self.store_vector(nth, self.times(row, 2, self.at.best))
            self.store_vector(self.middle(nth, following), self.times(row, 2, self.at.best + 1))
            strict = builder.fcmp_ordered(">", nth, following)
            if self.clamp:
                # A row that takes fewer than n takes all that is above 0: there is nothing to tie with.
                strict = builder.or_(strict, builder.fcmp_ordered("<=", nth, self.zero))
            bits = [no_bits] * self.at.row_words
            for k, value in enumerate(values):
                chosen = self.is_chosen(value, nth)
                count = self.load_vector(self.at.counts + k, self.integers)
                self.store_vector(builder.sub(count, builder.sext(chosen, self.integers)), self.at.counts + k)
                number = k // WORD_BITS
                bits[number] = builder.or_(bits[number], builder.select(chosen, self.word_bit(k), no_bits))
            for number, part in enumerate(bits):
                self.store_vector(part, self.row_word(row, number, self.at.bits))
            still = self.load_vector(STRICT, self.integers)
            self.store_vector(builder.and_(still, builder.sext(strict, self.integers)), STRICT)
            self.store_vector(self.pick(False, self.load_vector(WORST), nth), WORST)

        self.for_each_line(choose_row, self.c)

        strict = self.load_vector(STRICT, self.integers)
        self.store_vector(strict, STRICT_ROWS)
        self.judge_columns(strict)

    def judge(self) -> None:
        self.judge_columns(self.load_vector(STRICT_ROWS, self.integers))

    def judge_columns(self, ok: ir.Value) -> None:
        builder = self.builder
        lowest, wrong = self.constant(float("inf")), self.zero
        full = self.integer(self.n)
        for k in range(self.m):
            potential = self.load_vector(self.at.v + k)
            count = self.load_vector(self.at.counts + k, self.integers)
            holds = builder.icmp_signed("<=" if self.clamp else "==", count, full)
            if self.clamp:
                holds = builder.and_(holds, builder.fcmp_ordered(">=", potential, self.zero))
                room = builder.sitofp(builder.sub(full, count), self.vector)
                wrong = builder.fadd(wrong, builder.fmul(room, potential))
            ok = builder.and_(ok, builder.sext(holds, self.integers))
            lowest = self.pick(False, lowest, potential)
        self.store_vector(ok, STRICT)
        self.store_vector(lowest, LOWEST)
        self.store_vector(wrong, WRONG)

    def fill(self) -> None:
        builder = self.builder
        no_bits = ir.Constant(self.words, [0] * self.lanes)
        full = self.integer(self.n)
        count_ones = ir.Function(
            builder.module, ir.FunctionType(self.words, [self.words]), f"llvm.ctpop.v{self.lanes}i64"
        )
        self.store_vector(self.integer(0), SHORT)

        def fill_row(row: ir.Value) -> None:
            numbers = range(self.at.row_words)
            places = [self.row_word(row, number, self.at.bits) for number in numbers]
            bits = [self.load_vector(place, self.words) for place in places]
            zeros = [self.load_vector(self.row_word(row, number, self.at.zero_bits), self.words) for number in numbers]
            free = [builder.and_(zero, builder.not_(kept)) for zero, kept in zip(zeros, bits, strict=True)]
            room = full
            for kept in bits:
                ones = builder.call(count_ones, [kept])
                room = builder.sub(room, ones if self.word == 1 else builder.trunc(ones, self.integers))
            # Each row starts at another column, or the first columns would be full before the last rows come.
            for k in range(self.m):
                column = builder.urem(builder.add(row, _I64(k)), _I64(self.m))
                bit = [self.splat(self.bit_of(column, number), self.words) for number in numbers]
                counts = builder.add(column, _I64(self.at.counts))
                count = self.load_vector(counts, self.integers)
                open_bits = [builder.and_(word, mask) for word, mask in zip(free, bit, strict=True)]
                takes = builder.icmp_signed("!=", reduce(builder.or_, open_bits), no_bits)
                takes = builder.and_(takes, builder.icmp_signed(">", room, self.integer(0)))
                takes = builder.and_(takes, builder.icmp_signed("<", count, full))
                bits = [
                    builder.or_(word, builder.select(takes, mask, no_bits))
                    for word, mask in zip(bits, bit, strict=True)
                ]
                taken = builder.sext(takes, self.integers)
                room = builder.add(room, taken)
                self.store_vector(builder.sub(count, taken), counts)
            for kept, place in zip(bits, places, strict=True):
                self.store_vector(kept, place)
            self.store_vector(builder.or_(self.load_vector(SHORT, self.integers), room), SHORT)

        self.for_each_line(fill_row, self.c)

    def find_zeros(self) -> None:
        builder = self.builder
        no_bits = ir.Constant(self.words, [0] * self.lanes)
        self.store_vector(self.zero, ZEROS)

        def find_in_row(row: ir.Value) -> None:
            bits, count = [no_bits] * self.at.row_words, self.load_vector(ZEROS)
            for k, entry in enumerate(self.entries(row, rows=True)):
                is_zero = builder.fcmp_ordered("==", self.load_vector(entry), self.zero)
                count = builder.fadd(count, builder.select(is_zero, self.constant(1.0), self.zero))
                number = k // WORD_BITS
                bits[number] = builder.or_(bits[number], builder.select(is_zero, self.word_bit(k), no_bits))
            for number, part in enumerate(bits):
                self.store_vector(part, self.row_word(row, number, self.at.zero_bits))
            self.store_vector(count, ZEROS)

        self.for_each_line(find_in_row)

    def measure(self) -> None:
        builder = self.builder
        mantissa_bits = 23 if self.bits == 32 else 52
        for vector in (QUANTUM, SMALLEST):
            self.store_vector(self.constant(float("inf")), vector)

        def measure_row(row: ir.Value) -> None:
            quantum, smallest = self.load_vector(QUANTUM), self.load_vector(SMALLEST)
            for place in self.entries(row, rows=True):
                entry = self.load_vector(place)
                bits = builder.bitcast(entry, self.integers)
                # Without the lowest bit of its mantissa, a float has lost just the largest power of two that
                # divides it.
                mantissa = builder.and_(bits, self.integer((1 << mantissa_bits) - 1))
                rest = builder.bitcast(builder.and_(bits, builder.sub(bits, self.integer(1))), self.vector)
                is_power = builder.icmp_signed("==", mantissa, self.integer(0))
                divisor = builder.select(is_power, entry, builder.fsub(entry, rest))
                is_zero = builder.fcmp_ordered("<=", entry, self.zero)
                quantum = builder.select(is_zero, quantum, self.pick(False, quantum, divisor))
                smallest = builder.select(is_zero, smallest, self.pick(False, smallest, entry))
            self.store_vector(quantum, QUANTUM)
            self.store_vector(smallest, SMALLEST)

        self.for_each_line(measure_row)

    def shares_of(self, row: ir.Value) -> list[ir.Value]:
        """Return the shares of a row's entries, numbers of this type at address a, each in all lanes."""
        number = self.number
        base = self.builder.inttoptr(self.a, pointer_to(number))
        places = [self.builder.gep(base, [self.times(row, self.m, k)], source_etype=number) for k in range(self.m)]
        return [self.splat(self.builder.load(place, typ=number)) for place in places]

    def perturb(self) -> None:
        builder = self.builder
        zero, nonzero = self.load_vector(self.b), self.load_vector(self.c)
        limit = self.load_vector(ZERO)

        def perturb_row(row: ir.Value) -> None:
            for share, place in zip(self.shares_of(row), self.entries(row, rows=True), strict=True):
                entry = self.load_vector(place)
                delta = builder.select(builder.fcmp_ordered("<=", entry, limit), zero, nonzero)
                self.store_vector(builder.fadd(entry, builder.fmul(share, delta)), place)

        self.for_each_line(perturb_row)

    def weigh(self) -> None:
        builder = self.builder
        for vector in (CLEARANCE, THRESHOLD):
            self.store_vector(self.constant(float("inf")), vector)
        nonzero, zero = self.load_vector(NONZERO), self.load_vector(ZERO)

        def weigh_row(row: ir.Value) -> None:
            nth = self.load_vector(self.times(row, 2, self.at.best))
            threshold = self.load_vector(self.times(row, 2, self.at.best + 1))
            wrong, clearance = self.load_vector(WRONG), self.load_vector(CLEARANCE)
            for share, value, place in zip(
                self.shares_of(row), self.reduced(row, rows=True), self.entries(row, rows=True), strict=True
            ):
                is_zero = builder.fcmp_ordered("<=", self.load_vector(place), zero)
                perturbation = builder.fmul(share, builder.select(is_zero, zero, nonzero))
                right = builder.fsub(builder.fsub(value, threshold), perturbation)
                right = builder.select(self.is_chosen(value, nth), right, builder.fsub(self.zero, right))
                wrong = builder.fsub(wrong, self.pick(False, right, self.zero))
                clearance = builder.select(is_zero, clearance, self.pick(False, clearance, right))
            self.store_vector(wrong, WRONG)
            self.store_vector(clearance, CLEARANCE)
            lowest = self.pick(False, self.load_vector(THRESHOLD), threshold)
            self.store_vector(lowest, THRESHOLD)

        self.for_each_line(weigh_row, self.c)

    def store(self) -> None:
        builder = self.builder

        def store_row(row: ir.Value) -> None:
            start = builder.add(self.a, builder.mul(row, self.b))
            for number, first in enumerate(range(0, self.m, WORD_BITS)):
                length = min(WORD_BITS, self.m - first)
                # Newer LLVM for AVX2 ends the process over bits that are not a multiple of eight; so a power of two is
                # spread.
                width = 1 << (length - 1).bit_length()
                words = self.place(self.row_word(row, number, self.at.bits), _I64)
                word = builder.load(builder.gep(words, [self.c], source_etype=_I64), typ=_I64)
                chosen = word if width == WORD_BITS else builder.trunc(word, ir.IntType(width))
                bits = builder.bitcast(chosen, ir.VectorType(_BOOL, width))
                ones = builder.zext(bits, ir.VectorType(_BYTE, width))
                spread = ir.VectorType(_BYTE, length)
                kept = ir.Constant(ir.VectorType(_I32, length), list(range(length)))
                place = builder.inttoptr(builder.add(start, _I64(first)), pointer_to(spread))
                builder.store(builder.shuffle_vector(ones, ones, kept), place, align=1)

        self.for_each_line(store_row)


def _number(itemsize: int) -> ir.Type:
    return ir.FloatType() if itemsize == 4 else ir.DoubleType()


def _powers_of_two(length: int, largest: int) -> list[int]:
    """Return powers of two, none above `largest`, that add up to `length`."""
    parts = []
    while length:
        parts.append(min(largest, 1 << (length.bit_length() - 1)))
        length -= parts[-1]
    return parts


def _transpose(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """Return one vector per entry, over tiles, from one vector per tile, over entries.

    Each round joins vectors that hold the same entries of two groups of tiles, entries outermost.
    """
    lanes = len(rows)
    groups = [[row] for row in rows]
    tiles = 1
    while tiles < lanes:
        joined = []
        for left, right in zip(groups[::2], groups[1::2], strict=True):
            parts = []
            for a, b in zip(left, right, strict=True):
                entries = a.type.count // tiles
                order = [
                    half * entries * tiles + entry * tiles + tile
                    for entry in range(entries)
                    for half in range(2)
                    for tile in range(tiles)
                ]
                size = min(lanes, len(order))
                for start in range(0, len(order), size):
                    picked = ir.Constant(ir.VectorType(_I32, size), order[start : start + size])
                    parts.append(builder.shuffle_vector(a, b, picked))
            joined.append(parts)
        groups = joined
        tiles *= 2
    return groups[0]
