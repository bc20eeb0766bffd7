"""Translated kernels: what Python says of them, what Numba says, and what is refused."""

from __future__ import annotations

import copy
import inspect
import re
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, cast

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from masksolve import _translated
from masksolve._translate import TranslationError
from masksolve._translated import translated

pytestmark = pytest.mark.skipif(not _translated.has_machine_code, reason="there is no machine code")

LARGEST = 1 << 40
INTEGERS = st.integers(-LARGEST, LARGEST)


class Pair(NamedTuple):
    first: Any
    second: Any


def arithmetic(a, b) -> tuple[int, int, int, int, int, int, int, int]:
    c = b % 7 + 1
    return a + b, a - b, a * c, a // c, a % c, -a, ~a, abs(a)


def bits(a, b) -> tuple[int, int, int, int, int]:
    shift = b % 11
    return a << shift, a >> shift, a & b, a | b, a ^ b


def comparisons(a, b) -> tuple[int, int]:
    count = 0
    count += a < b
    count += 10 * (a <= b)
    count += 100 * (a > b)
    count += 1000 * (a >= b) + 10000 * (a == b) + 100000 * (a != b)
    return count, int(0 <= a < b) + 2 * int(not a) + 4 * (a > 0 and b > 0) + 8 * (a > 0 or b > 0 or a == b)


def branches(a, b) -> int:
    larger = a if a > b else b
    if a < -5:
        larger += 1
    elif a < 5:
        larger *= 3
    else:
        larger = larger if b > 0 else -larger
    return min(larger, 1000) + max(a, b, 7)


def loops(a, b) -> tuple[int, int, int]:
    total = 0
    for i in range(a % 20):
        if i == 3:
            continue
        for j in range(i, i + b % 10, 2):
            if j > 15:
                break
            total += i * j
    steps, rest = 0, abs(a) % 1000 + 1
    while rest != 1:
        rest = rest // 2 if rest % 2 == 0 else 3 * rest + 1
        steps += 1
    while True:
        steps += 7
        if steps > 100:
            break
    i = 5
    for i in range(2, b % 6):
        total += i
    return total, steps, i


def early(a, b) -> int:
    for i in range(20):
        if (a + i) % 7 == b % 7:
            return i
    return -1


def calls(a, b) -> tuple[int, int]:
    pair = Pair(a, Pair(b, early(a, b)))
    x, (y, z) = pair
    x, y = y, x
    quotient, rest = divmod(x, abs(y) + 1)
    first, second = _swapped(Pair(quotient, rest))
    return first + z, second + pair.second.second


def _swapped(pair):
    if pair.first > pair.second:
        return pair.second, pair.first
    return pair.first, pair.second


KERNELS = [arithmetic, bits, comparisons, branches, loops, early, calls]
TRANSLATED = {kernel: translated(kernel) for kernel in KERNELS}


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=60, deadline=None)
@given(a=INTEGERS, b=INTEGERS)
def test_integers_are_python_s(kernel: Callable[..., Any], a: int, b: int) -> None:
    assert TRANSLATED[kernel](a, b) == kernel(a, b)


def on_arrays(floats, doubles, numbers, flags, scale) -> tuple[int, bool]:
    rows, cols = floats.shape
    count, seen = 0, False
    for i in range(rows):
        row = doubles[i]
        for j in range(cols):
            c = floats[i, j]
            row[j] += c * scale
            doubles[i, -1] = max(doubles[i, -1], abs(c))
            if c > 0.5:
                flags[i, j] = not flags[i, j]
                count += flags[i, j]
            numbers[j] = min(numbers[j], int(c * 100.0))
            floats[i, j] = np.float32(0.5) * c - np.float32(1.0)
    seen |= flags[0, 0]
    part = numbers[1:3]
    part[:] = 7
    part[1] -= numbers[-1] + len(part) + floats.itemsize
    doubles[0, 0] = np.ldexp(np.rint(doubles[0, 0]), -3) + np.inf * (count > 1000)
    return count, seen


ON_ARRAYS = translated(on_arrays)


def as_bits(numbers, matrix) -> int:
    words = numbers.view(np.int64)
    square = words.reshape((2, 2))
    total = 0
    for i in range(2):
        for j in range(2):
            total ^= square[i, j]
    turned = matrix.T
    turned[1, 0] = 5
    return total


def arrays(seed: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    floats = rng.standard_normal((4, 5)).astype(np.float32)
    return floats, rng.standard_normal((4, 5)), rng.integers(-90, 90, 5).astype(np.int32), rng.random((4, 5)) < 0.5, 0.3


@cache
def compiled_by_numba() -> Callable[..., Any]:
    return cast("Callable[..., Any]", numba.njit(on_arrays))


def with_gaps(array: Any) -> Any:
    if not isinstance(array, np.ndarray):
        return array
    wide = np.zeros(tuple(3 * length for length in array.shape), array.dtype)
    part = wide[tuple(slice(1, None, 3) for _ in array.shape)]
    part[...] = array
    return part


@pytest.mark.parametrize("change", [lambda array: array, with_gaps], ids=["contiguous", "gaps"])
@pytest.mark.parametrize("seed", range(5))
def test_arrays_are_numba_s(seed: int, change: Callable[[Any], Any]) -> None:
    given = [change(array) for array in arrays(seed)]
    if change is with_gaps:
        given[2] = np.ascontiguousarray(given[2])  # a part of it is filled
    expected = copy.deepcopy(given)
    result = compiled_by_numba()(*expected)
    assert ON_ARRAYS(*given) == result
    for array, same in zip(given[:-1], expected[:-1], strict=True):
        assert array.tobytes() == same.tobytes()


def test_arrays_are_seen_as_other_arrays() -> None:
    numbers, matrix = np.random.default_rng(0).standard_normal(4), np.zeros((3, 2), np.int8)
    expected = int(np.bitwise_xor.reduce(numbers.view(np.int64)))
    assert translated(as_bits)(numbers, matrix) == expected
    assert matrix.tolist() == [[0, 5], [0, 0], [0, 0]]


def test_each_kind_of_arguments_is_compiled_once() -> None:
    kernel = translated(early)
    for a, b in ((1, 2), (np.int32(3), True), (5, np.int64(9))):
        assert kernel(a, b) == early(int(a), int(b))
    kinds = [tuple(_translated._kinds[number] for number in signature) for signature in kernel._compiled]
    assert kinds == [(int, int), (int, bool)]
    with pytest.raises(TypeError, match="'text' is of a type that kernels do not take"):
        kernel("text", 1)
    with pytest.raises(TypeError, match="another machine's dtype, >f8"):
        kernel(np.zeros(3, ">f8"), 1)


REFUSED = {
    "a loop over anything but a range": "for each in (a, b):\n    pass",
    "a statement of type Try": "try:\n    a = 1\nfinally:\n    a = 2",
    "an expression of type ListComp": "c = [i for i in range(3)]",
    "arguments by name": "a = max(a, key=b)",
    "double for what is i64": "c = 1\nc = a * 0.5",
    "c is read before it is assigned": "a = c\nc = a",
    "c is not defined": "a = c",
    "refused calls itself": "a = refused(a, b)",
    "_swapped takes 1 arguments, and gets 2": "a, b = _swapped(a, b)",
    "2 names for": "c, d = a, b, a",
    "an index that is not a constant": "c = (1, 2)[a]",
    "c stands for several things": "c = (a, b)\nif a > 0:\n    c = (b, a)",
    "FloorDiv of floats": "a = 0.5 * a // 2",
    "a slice with a step": "a = words[1:b:2][0]",
    "a view of smaller numbers": "a = words.view(np.int8)[0]",
    "an array's sum": "a = words.sum()",
    "an assignment to a.b": "a.b = 1",
    "else after a loop": "while a > 0:\n    a -= 1\nelse:\n    a = 7",
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_not_translated_is_refused_with_its_line(why: str, tmp_path: Any) -> None:
    source = f"def refused(a, b, words) -> int:\n    a += 1\n{textwrap.indent(REFUSED[why], '    ')}\n    return a\n"
    file = tmp_path / "kernels.py"
    file.write_text(source)
    scope: dict[str, Any] = {"__name__": "kernels", "np": np, "_swapped": _swapped}
    exec(compile(source, str(file), "exec"), scope)
    kernel = scope["refused"]
    lines, _ = inspect.getsourcelines(kernel)
    with pytest.raises(TranslationError, match=re.escape(why)) as error:
        translated(kernel)(1, 2, np.zeros(3, np.int64))
    assert re.search(rf"{re.escape(str(file))}:\d: refused: ", str(error.value))
    assert len(lines) == source.count("\n")
