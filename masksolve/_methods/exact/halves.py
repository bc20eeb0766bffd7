"""Floats of 16 bits as float32, which holds them exactly, as machine code: NumPy converts them one by one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numpy.typing import NDArray

from masksolve import _translated
from masksolve._machine_code import address_of, lock, new_engine, pointer_to
from masksolve._methods.exact.vector_writer import VectorWriter

_I16, _I32, _I64 = (ir.IntType(bits) for bits in (16, 32, 64))
_FLOAT = ir.FloatType()
# Numbers that are converted at once: a few vectors.
_AT_ONCE = 32
_PROTOTYPE = ir.FunctionType(ir.VoidType(), [_I64] * 12)
_CALL = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 12)


def can_widen(array: NDArray[Any]) -> bool:
    """Return whether `widen` converts an array."""
    return _is_half(array.dtype) and array.strides[-1] == 2


# NumPy takes a while to name a dtype.
@cache
def _is_half(dtype: np.dtype[Any]) -> bool:
    return _translated.has_machine_code and dtype.isnative and dtype.name in ("float16", "bfloat16")


def widen(source: NDArray[Any], target: NDArray[Any]) -> None:
    """Fill an array (a, b, c, k) of float32 with 16-bit floats, of both of which those along k lie without gaps."""
    *outer, count = source.shape
    if all(array.strides[2] == count * array.itemsize for array in (source, target)):
        outer, count = [*outer[:2], 1], outer[2] * count
    _function(source.dtype.name == "float16")(
        address_of(source),
        address_of(target),
        *outer,
        count,
        *source.strides[:3],
        *target.strides[:3],
    )


@cache
def _function(is_float16: bool) -> Callable[..., None]:
    with lock:
        return _CALL(_engine_of(is_float16).get_function_address("widen"))


@cache
def _engine_of(is_float16: bool) -> binding.ExecutionEngine:
    return new_engine(write_module, (is_float16,), "halves", "float16" if is_float16 else "bfloat16")


def write_module(is_float16: bool) -> str:
    """Return the LLVM IR of the function that widens."""
    module = ir.Module()
    function = ir.Function(module, _PROTOTYPE, "widen")
    _Writer(ir.IRBuilder(function.append_basic_block()), is_float16).write(*function.args)
    return str(module)


class _Writer(VectorWriter):
    """Writes the function where the builder stands."""

    def __init__(self, builder: ir.IRBuilder, is_float16: bool) -> None:
        super().__init__(builder)
        self.is_float16 = is_float16

    def write(self, source: ir.Value, target: ir.Value, *numbers: ir.Value) -> None:
        builder = self.builder
        (*outer, count), source_strides, target_strides = numbers[:4], numbers[4:7], numbers[7:]
        whole = builder.and_(count, _I64(-_AT_ONCE))

        def walk(axis: int, source: ir.Value, target: ir.Value) -> None:
            if axis == len(outer):
                self.widen_line(source, target, whole, count)
                return
            self.for_each(
                outer[axis],
                lambda k: walk(
                    axis + 1,
                    builder.add(source, builder.mul(k, source_strides[axis])),
                    builder.add(target, builder.mul(k, target_strides[axis])),
                ),
            )

        walk(0, source, target)
        builder.ret_void()

    def widen_line(self, source: ir.Value, target: ir.Value, whole: ir.Value, count: ir.Value) -> None:
        builder = self.builder
        for first, stop, at_once in ((_I64(0), whole, _AT_ONCE), (whole, count, 1)):
            times = builder.udiv(builder.sub(stop, first), _I64(at_once))

            def widen_some(k: ir.Value, first: ir.Value = first, at_once: int = at_once) -> None:
                number = builder.add(first, builder.mul(k, _I64(at_once)))
                kind, wide = (ir.VectorType(element, at_once) for element in (_I16, _I32))
                place = builder.inttoptr(builder.add(source, builder.mul(number, _I64(2))), pointer_to(kind))
                bits = builder.zext(builder.load(place, align=1, typ=kind), wide)
                place = builder.inttoptr(builder.add(target, builder.mul(number, _I64(4))), pointer_to(wide))
                builder.store(self.widened(bits), place, align=4)

            with builder.if_then(builder.icmp_unsigned("!=", times, _I64(0))):
                self.for_each(times, widen_some)

    def widened(self, bits: ir.Value) -> ir.Value:
        """Return the bits of float32."""
        builder, count = self.builder, bits.type.count

        def number(value: int) -> ir.Value:
            return self.constant(_I32, value, count)

        # A bfloat16 is the upper half of a float32.
        if not self.is_float16:
            return builder.shl(bits, number(16))
        # With its bits where a float32 has them, a float16 is 2**112 times too small: its exponent counts from 15, not
        # from 127. Infinity and NaN get the largest exponent.
        magnitude = builder.shl(builder.and_(bits, number(0x7FFF)), number(13))
        floats = ir.VectorType(_FLOAT, count)
        scaled = builder.fmul(builder.bitcast(magnitude, floats), self.constant(_FLOAT, 2.0**112, count))
        is_finite = builder.icmp_signed("<", magnitude, number(0x7C00 << 13))
        ends = builder.select(is_finite, number(0), number(0x7F800000))
        sign = builder.shl(builder.and_(bits, number(0x8000)), number(16))
        return builder.or_(builder.or_(builder.bitcast(scaled, bits.type), ends), sign)
