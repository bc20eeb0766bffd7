"""The unbiased N:M estimate as a Triton kernel: one group in each thread; `unbiased.thin_groups` computes the same."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from masksolve.torch._training.unbiased import BITS

LARGEST_M = 32
_BITS, _ONE = tl.constexpr(BITS), tl.constexpr(1 << BITS)
_COLUMNS, _WARPS = 128, 4


def thin(rows: Tensor, uniform: Tensor, found: Tensor, n: int, m: int) -> None:
    """Fill `found` (groups * m, columns) with n of every m rows' values each, in every column."""
    groups, columns = uniform.shape
    if uniform.numel() == 0:
        return
    with torch.cuda.device(rows.device if rows.is_cuda else -1):
        _thin[(groups * triton.cdiv(columns, _COLUMNS),)](
            rows,
            uniform,
            found,
            columns,
            *rows.stride(),
            N=n,
            M=m,
            COLUMNS=_COLUMNS,
            num_warps=_WARPS,
            # A fused multiply-add rounds once where both versions have to round twice.
            enable_fp_fusion=False,
        )


@triton.jit
def _thin(
    values,
    uniform,
    found,
    columns,
    value_row,
    value_column,
    N: tl.constexpr,
    M: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    pieces = tl.cdiv(columns, COLUMNS)
    group = (program // pieces).to(tl.int64)
    column = program % pieces * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    source = values + group * M * value_row + column.to(tl.int64) * value_column
    target = found + group * M * columns + column

    entries = _loaded(source, value_row, inside, M)
    total = tl.abs(entries[0])
    some = (total > 0).to(tl.int32)
    for k in tl.static_range(1, M):
        size = tl.abs(entries[k])
        total += size
        some += (size > 0).to(tl.int32)
    threshold = tl.where(some <= N, 0.0, tl.div_rn(total, tl.full(total.shape, N, tl.float32)))
    changes = 1
    rounds = 1
    while (rounds < N) & (changes > 0):
        free, below = _below(entries, threshold, N)
        lower = tl.where(free > 0, tl.div_rn(below, tl.maximum(free, 1.0)), threshold)
        changes = tl.max((lower != threshold).to(tl.int32), axis=0)
        threshold = lower
        rounds += 1

    free, below = _below(entries, threshold, N)
    value = tl.where(free > 0, tl.div_rn(below, tl.maximum(free, 1.0)), 0.0)
    value_bits = value.to(tl.int32, bitcast=True)
    teeth = free * _ONE
    whole = tl.where(below > 0, below, 1.0)
    first = _ONE - 1 - tl.load(uniform + group * columns + column, mask=inside, other=0)
    finite = total < float("inf")
    end = tl.zeros_like(total)
    counted = tl.zeros_like(first)
    for k in tl.static_range(M):
        is_below = tl.abs(entries[k]) < threshold
        end = tl.where(is_below, end + tl.abs(entries[k]), end)
        count = ((tl.div_rn(end, whole) * teeth).to(tl.int32) + first) >> _BITS
        # The sign of the entry, -0.0 too, as copysign has it.
        sign = entries[k].to(tl.int32, bitcast=True) & -2147483648
        drawn = tl.where(count > counted, (value_bits | sign).to(tl.float32, bitcast=True), 0.0)
        kept = tl.where(is_below, drawn, entries[k])
        counted = count
        kept = tl.where(finite, kept, float("nan") if k == 0 else 0.0)
        tl.store(target + k * columns, kept.to(found.dtype.element_ty), mask=inside)


@triton.jit
def _loaded(source, stride, inside, M: tl.constexpr):
    entries = ()
    for k in tl.static_range(M):
        entries = entries + (tl.load(source + k * stride, mask=inside, other=0.0).to(tl.float32),)
    return entries


@triton.jit
def _below(entries, threshold, N: tl.constexpr):
    free = tl.full(threshold.shape, N, tl.float32)
    below = tl.zeros_like(threshold)
    for k in tl.static_range(len(entries)):
        size = tl.abs(entries[k])
        is_below = size < threshold
        below = tl.where(is_below, below + size, below)
        free = tl.where(is_below, free, free - 1)
    return tl.maximum(free, 0.0), below
