"""Filling up a mask with weights of zero, which are worth nothing: then "at most N" solves "exactly N"."""

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from masksolve._methods.exact.layout import WORD_BITS
from masksolve._translated import inner, intrinsic


@intrinsic
def lowest_bit(builder: ir.IRBuilder, word: ir.Value) -> ir.Value:
    """Return the number of the lowest bit that is set in a word."""
    return builder.cttz(word, ir.IntType(1)(1))


@inner
def fill_with_zeros(
    words: NDArray[np.int64],
    bits: int,
    zero_bits: int,
    stride: int,
    row_words: int,
    scratch: int,
    n: int,
    m: int,
    rows: int,
    cols: int,
    exact_rows: bool,
) -> bool:
    """Fill a mask up to n ones per line with weights of zero, along alternating paths; False if it cannot be done.

    Word w of row i's mask is words[bits + (i * row_words + w) * stride], and its zeros are words[zero_bits + ...];
    4 m + 2 row_words words from words[scratch] on are overwritten. Of rows x cols tiles, all rows have to be full, or
    else all columns.
    """
    memory = words[scratch : scratch + 4 * m + 2 * row_words]
    room, reached_by, from_row, queue = 0, m, 2 * m, 3 * m
    has_room, seen = 4 * m, 4 * m + row_words
    row_stride = row_words * stride
    for j in range(m):
        memory[room + j] = n
    for i in range(rows):
        for w in range(row_words):
            row = words[bits + i * row_stride + w * stride]
            while row != 0:
                memory[room + w * WORD_BITS + lowest_bit(row)] -= 1
                row &= row - 1
    for w in range(row_words):
        memory[has_room + w] = 0
    for j in range(cols):
        if memory[room + j] > 0:
            memory[has_room + j // WORD_BITS] |= _bit(j)
    for short in range(rows):
        missing = n
        for w in range(row_words):
            missing -= _count_bits(words[bits + short * row_stride + w * stride])
        for _ in range(missing):
            for i in range(rows):
                memory[reached_by + i] = -1
            for w in range(row_words):
                memory[seen + w] = 0
            memory[queue] = short
            head, tail, end = 0, 1, -1
            while head < tail and end < 0:
                i = memory[queue + head]
                head += 1
                for w in range(row_words):
                    place = i * row_stride + w * stride
                    free = words[zero_bits + place] & ~words[bits + place] & ~memory[seen + w]
                    is_end = free & memory[has_room + w]
                    if is_end != 0:
                        end = w * WORD_BITS + lowest_bit(is_end)
                        memory[from_row + end] = i
                        break
                    memory[seen + w] |= free
                    for k in range(rows):
                        place = k * row_stride + w * stride
                        given = words[zero_bits + place] & words[bits + place] & free
                        if given != 0 and k != short and memory[reached_by + k] < 0:
                            memory[reached_by + k] = w * WORD_BITS + lowest_bit(given)
                            memory[queue + tail] = k
                            tail += 1
                    while free != 0:
                        memory[from_row + w * WORD_BITS + lowest_bit(free)] = i
                        free &= free - 1
            if end < 0:
                if exact_rows:
                    return False
                # Nor does any path begin here later.
                break
            memory[room + end] -= 1
            if memory[room + end] == 0:
                memory[has_room + end // WORD_BITS] &= ~_bit(end)
            j = end
            while True:
                i = memory[from_row + j]
                words[bits + i * row_stride + j // WORD_BITS * stride] |= _bit(j)
                if i == short:
                    break
                j = memory[reached_by + i]
                words[bits + i * row_stride + j // WORD_BITS * stride] &= ~_bit(j)
    short_columns = np.int64(0)
    for w in range(row_words):
        short_columns |= memory[has_room + w]
    return exact_rows or short_columns == 0


@inner
def _count_bits(word: np.int64) -> np.int64:
    """Return how many of the 64 bits of a word are set."""
    word -= (word >> 1) & 0x5555555555555555
    word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (word * 0x0101010101010101 >> 56) & 0x7F


@inner
def _bit(column: int) -> np.int64:
    return np.int64(1) << (column % WORD_BITS)
