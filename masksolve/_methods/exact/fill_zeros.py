"""Filling up a mask with weights of zero, which are worth nothing: then "at most N" solves "exactly N"."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from masksolve._jit import kernel


def _lowest_bit(typingctx: Any, word: Any) -> tuple[Any, Any]:
    """Return the number of the lowest bit that is set in a word."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.int64(types.int64), codegen


# Here, not with the other machine code: what keeps kernels on the disk does not see the files of intrinsics.
lowest_bit: Any = intrinsic(_lowest_bit)


# Too long to be compiled into each caller, as an inner kernel would be.
@kernel
def fill_with_zeros(
    words: NDArray[np.int64],
    bits: int,
    zero_bits: int,
    stride: int,
    scratch: int,
    n: int,
    m: int,
    rows: int,
    cols: int,
    exact_rows: bool,
) -> bool:
    """Fill a mask up to n ones per line with weights of zero, along alternating paths; False if it cannot be done.

    Row i's mask is words[bits + i * stride], and its zeros are words[zero_bits + i * stride]; 4 m words from
    words[scratch] on are overwritten. Of rows x cols tiles, all rows have to be full, or else all columns.
    """
    memory = words[scratch : scratch + 4 * m]
    room, reached_by, from_row, queue = 0, m, 2 * m, 3 * m
    for j in range(m):
        memory[room + j] = n
    for i in range(rows):
        row = words[bits + i * stride]
        while row != 0:
            memory[room + lowest_bit(row)] -= 1
            row &= row - 1
    has_room = np.int64(0)
    for j in range(cols):
        if memory[room + j] > 0:
            has_room |= np.int64(1) << j
    for short in range(rows):
        missing = n
        row = words[bits + short * stride]
        while row != 0:
            missing -= 1
            row &= row - 1
        for _ in range(missing):
            for i in range(rows):
                memory[reached_by + i] = -1
            memory[queue] = short
            head, tail, end = 0, 1, -1
            seen = np.int64(0)
            while head < tail:
                i = memory[queue + head]
                head += 1
                free = words[zero_bits + i * stride] & ~words[bits + i * stride] & ~seen
                if free & has_room != 0:
                    end = lowest_bit(free & has_room)
                    memory[from_row + end] = i
                    break
                seen |= free
                for k in range(rows):
                    given = words[zero_bits + k * stride] & words[bits + k * stride] & free
                    if given != 0 and k != short and memory[reached_by + k] < 0:
                        memory[reached_by + k] = lowest_bit(given)
                        memory[queue + tail] = k
                        tail += 1
                while free != 0:
                    memory[from_row + lowest_bit(free)] = i
                    free &= free - 1
            if end < 0:
                if exact_rows:
                    return False
                # Nor does any path begin here later.
                break
            memory[room + end] -= 1
            if memory[room + end] == 0:
                has_room &= ~(np.int64(1) << end)
            j = end
            while True:
                i = memory[from_row + j]
                words[bits + i * stride] |= np.int64(1) << j
                if i == short:
                    break
                j = memory[reached_by + i]
                words[bits + i * stride] &= ~(np.int64(1) << j)
    return exact_rows or has_room == 0
