"""The exact solver as a Triton kernel: equilibration, proof and mask in one pass, one line of a tile in each thread.

What it computes, and why that is a proof, is told in `_stages`; `_batched` computes the same. A thread holds row i of
its tile and column i, in registers, and runs the selection networks on them as straight-line code; the potentials of
the lines across come from the neighbouring threads by shuffles. A tile of 32x32 fills one warp.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from masksolve.torch._stages import (
    BITS,
    LARGEST_POTENTIAL,
    LARGEST_QUANTUM,
    LIMIT,
    NO_QUANTUM,
    RELAXATION_BITS,
    SATURATED,
    Selection,
    Stage,
    shares,
)

LARGEST_M = 32

_BITS = tl.constexpr(BITS)
_LARGEST_POTENTIAL = tl.constexpr(LARGEST_POTENTIAL)
_LARGEST_QUANTUM = tl.constexpr(LARGEST_QUANTUM)
_LIMIT = tl.constexpr(LIMIT)
_NO_QUANTUM = tl.constexpr(NO_QUANTUM)
_RELAXATION_BITS = tl.constexpr(RELAXATION_BITS)
_SATURATED = tl.constexpr(SATURATED)
_INFINITY = tl.constexpr(0x7F800000)


def solve_stage(
    tiles: Tensor,
    masks: Tensor,
    masked: Tensor | None,
    potentials: Tensor,
    which: Tensor | None,
    stage: Stage,
    warm: bool,
) -> Tensor:
    """Run one stage on tiles (b, p, q, h, w), or on those that `which` (k) counts; which of them are left, bool.

    Parameters
    ----------
    masks, masked
        (b, p, q, h, w), of equal strides: the boolean masks, and the weights under them if wanted, to fill.
    potentials
        float32 (b * p * q, w): column potentials to start from where `warm`, and where those reached are written.
    """
    height, width = tiles.shape[3:]
    count = potentials.shape[0] if which is None else which.shape[0]
    left = torch.empty(count, dtype=torch.uint8, device=tiles.device)
    lines = triton.next_power_of_2(max(height, width, 2))
    # One warp, which need not wait for others; the interpreter is quicker with few programs.
    per_program = (32 if tiles.is_cuda else 4096) // lines
    with torch.cuda.device(tiles.device if tiles.is_cuda else -1):
        _solve[(triton.cdiv(count, per_program),)](
            tiles,
            masks.view(torch.uint8),
            tiles if masked is None else masked,
            potentials,
            left if which is None else which,
            left,
            _shares_on(tiles.device, height * width, stage.seed),
            count,
            tiles.shape[2],
            tiles.shape[1] * tiles.shape[2],
            *tiles.stride(),
            *masks.stride(),
            int(warm),
            0 if warm else stage.first,
            stage.every,
            stage.last,
            stage.relaxation,
            stage.spread,
            stage.coarse,
            stage.least,
            KEPT=stage.kept,
            HEIGHT=height,
            WIDTH=width,
            ROWS=_network(stage.rows),
            COLUMNS=_network(stage.columns),
            CLAMP_ROWS=stage.clamp_rows,
            CLAMP_COLUMNS=stage.clamp_columns,
            AT_MOST=stage.at_most,
            LISTED=which is not None,
            MASKED=masked is not None,
            TILES=per_program,
            LINES=lines,
            num_warps=1,
        )
    return left.view(torch.bool)


def _network(selection: Selection) -> tuple[Any, int, int]:
    return selection.steps, selection.nth, selection.following


_shares: dict[tuple[torch.device, int, int], Tensor] = {}


def _shares_on(device: torch.device, size: int, seed: int) -> Tensor:
    key = device, size, seed
    if key not in _shares:
        _shares[key] = torch.from_numpy(shares(size, seed)).to(device)
    return _shares[key]


@triton.jit
def _solve(
    weights,
    masks,
    masked,
    potentials,
    which,
    left,
    shares,
    count,
    tiles_across,
    tiles_in_matrix,
    weight_batch,
    weight_down,
    weight_across,
    weight_row,
    weight_column,
    mask_batch,
    mask_down,
    mask_across,
    mask_row,
    mask_column,
    warm,
    first,
    every,
    last,
    relaxation,
    spread,
    coarse,
    least,
    KEPT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CLAMP_ROWS: tl.constexpr,
    CLAMP_COLUMNS: tl.constexpr,
    AT_MOST: tl.constexpr,
    LISTED: tl.constexpr,
    MASKED: tl.constexpr,
    TILES: tl.constexpr,
    LINES: tl.constexpr,
):
    slot = tl.program_id(0) * TILES + tl.arange(0, TILES)[:, None]
    line = tl.arange(0, LINES)[None, :]
    waiting = slot < count
    tile = slot.to(tl.int64)
    if LISTED:
        tile = tl.load(which + slot, mask=waiting, other=0)
    batch, in_matrix = tile // tiles_in_matrix, tile % tiles_in_matrix
    down, across = in_matrix // tiles_across, in_matrix % tiles_across
    origin = weights + batch * weight_batch + down * weight_down + across * weight_across
    target = batch * mask_batch + down * mask_down + across * mask_across
    in_row, in_column = waiting & (line < HEIGHT), waiting & (line < WIDTH)
    row, column = origin + line * weight_row, origin + line * weight_column
    row_shares, column_shares = shares + line * WIDTH, shares + line

    # The scale: every weight is below 2**exponent.
    top = tl.zeros([TILES, LINES], tl.int32)
    for k in tl.static_range(WIDTH):
        weight = tl.abs(tl.load(row + k * weight_column, mask=in_row, other=0.0)).to(tl.float32)
        top = tl.maximum(top, weight.to(tl.int32, bitcast=True))
    top = tl.max(top, axis=1, keep_dims=True)
    finite = top < _INFINITY
    scale = tl.where(finite, _BITS + 126 - (top >> 23), 0)
    up_1, up_2 = _power_of_two(scale >> 1), _power_of_two(scale - (scale >> 1))
    down_1, down_2 = _power_of_two(-(scale >> 1)), _power_of_two((scale >> 1) - scale)

    quantum = tl.full([TILES, LINES], _LARGEST_QUANTUM, tl.int32)
    for k in tl.static_range(WIDTH):
        b, q = _entry(row + k * weight_column, in_row & finite, up_1, up_2)
        quantum = tl.minimum(quantum, q)
    finest = tl.maximum(tl.min(quantum, axis=1, keep_dims=True) >> coarse, least)

    by_rows = ()
    for k in tl.static_range(WIDTH):
        b, q = _entry(row + k * weight_column, in_row & finite, up_1, up_2)
        share = tl.load(row_shares + k, mask=in_row, other=0)
        by_rows = by_rows + (b + _perturbation(b, q, share, finest, spread, CLAMP_ROWS and CLAMP_COLUMNS),)
    by_columns = ()
    for k in tl.static_range(HEIGHT):
        b, q = _entry(column + k * weight_row, in_column & finite, up_1, up_2)
        share = tl.load(column_shares + k * WIDTH, mask=in_column, other=0)
        by_columns = by_columns + (b + _perturbation(b, q, share, finest, spread, CLAMP_ROWS and CLAMP_COLUMNS),)

    start = potentials + tile * WIDTH + line
    v = tl.load(start, mask=in_column & (warm != 0), other=0.0) * up_1 * up_2
    v = tl.where(v > -_LIMIT, tl.where(v < _LIMIT, v, _LIMIT), -_LIMIT).to(tl.int32)
    if CLAMP_COLUMNS:
        v = tl.maximum(v, 0)
    u = tl.zeros([TILES, LINES], tl.int32)

    remaining = 1
    round_ = 0
    while (round_ <= last) & (remaining > 0):
        nth, following = _best_two(_reduced(by_rows, v), ROWS)
        middle = _middle(nth, following, CLAMP_ROWS)
        if (round_ >= first) & ((round_ - first) % every == 0):
            # In the rows: is the choice strict, and how much is wrong?
            strict = nth > following
            if CLAMP_ROWS:
                strict = strict | (nth <= 0)
            rights = ()
            quanta = ()
            wrong = tl.zeros([TILES, LINES], tl.int32)
            for k in tl.static_range(WIDTH):
                b, q = _entry(row + k * weight_column, in_row & finite, up_1, up_2)
                across_k = _of_line(v, k)
                right = b - across_k - middle
                right = tl.where(_is_chosen(by_rows[k] - across_k, nth, CLAMP_ROWS), right, -right)
                right = right - (q == 0).to(tl.int32)
                wrong += tl.minimum(tl.maximum(-right, 0), _SATURATED)
                rights = rights + (right,)
                quanta = quanta + (q,)
            wrong = tl.where(in_row, tl.minimum(wrong, _SATURATED), 0)
            # In the columns: how many ones do they hold?
            ones = tl.zeros([TILES, LINES], tl.int32)
            for k in tl.static_range(HEIGHT):
                ones += _is_chosen(by_columns[k] - v, _of_line(nth, k), CLAMP_ROWS).to(tl.int32)
            if CLAMP_COLUMNS:
                fits = ones <= KEPT
                lost = tl.minimum(tl.minimum(v, _SATURATED) * tl.maximum(KEPT - ones, 0), _SATURATED)
                wrong += tl.where(in_column, lost, 0)
            else:
                fits = ones == KEPT
            wrong = tl.sum(wrong, axis=1, keep_dims=True)
            divisor = tl.full([TILES, LINES], _NO_QUANTUM, tl.int32)
            for k in tl.static_range(WIDTH):
                divisor = tl.where(rights[k] < wrong, tl.minimum(divisor, quanta[k]), divisor)
            divisor = tl.min(tl.where(in_row, divisor, _NO_QUANTUM), axis=1, keep_dims=True)
            bad = tl.where(in_row & (strict == 0), 1, 0) + tl.where(in_column & (fits == 0), 1, 0)
            proven = waiting & finite & (tl.max(bad, axis=1, keep_dims=True) == 0)
            proven = proven & (wrong < _SATURATED) & (wrong < divisor)
            lowest = tl.zeros([TILES, 1], tl.int32)
            if AT_MOST:
                lowest = tl.min(tl.where(in_column, v, _LIMIT), axis=1, keep_dims=True)
                least_row = tl.min(tl.where(in_row, middle, _LIMIT), axis=1, keep_dims=True)
                proven = proven & (least_row + lowest >= 0)

            stores = proven & in_column
            for k in tl.static_range(HEIGHT):
                chosen = _is_chosen(by_columns[k] - v, _of_line(nth, k), CLAMP_ROWS)
                place = target + line * mask_column + k * mask_row
                tl.store(masks + place, chosen.to(tl.uint8), mask=stores)
                if MASKED:
                    weight = tl.load(column + k * weight_row, mask=stores, other=0.0)
                    tl.store(masked + place, tl.where(chosen, weight, 0.0).to(weight.dtype), mask=stores)
            tl.store(start, _in_units(v - lowest, down_1, down_2), mask=stores)
            waiting = waiting & (proven == 0)
            remaining = tl.sum(waiting.to(tl.int32))

        beyond = tl.where(round_ > 0, relaxation, 0)
        u = _moved(u, middle, beyond, CLAMP_ROWS)
        nth, following = _best_two(_reduced(by_columns, u), COLUMNS)
        v = _moved(v, _middle(nth, following, CLAMP_COLUMNS), beyond, CLAMP_COLUMNS)
        round_ += 1

    tl.store(start, _in_units(v, down_1, down_2), mask=waiting & in_column)
    tl.store(left + slot, waiting.to(tl.uint8), mask=slot < count)


@triton.jit
def _entry(place, inside, up_1, up_2):
    """A weight in fixed point, and the largest power of two that divides it: 0 if it is inexact."""
    weight = tl.load(place, mask=inside, other=0.0)
    if weight.dtype != tl.float64:
        weight = weight.to(tl.float32)
    value = tl.abs(weight) * up_1 * up_2
    b = value.to(tl.int32)
    exact = (b.to(value.dtype) == value) & ((b != 0) | (weight == 0))
    return b, tl.where(exact, tl.where(b == 0, _NO_QUANTUM, b & -b), 0)


@triton.jit
def _perturbation(b, q, share, finest, spread, SPARE_ZEROS: tl.constexpr):
    limit = tl.minimum(q >> spread, finest)
    if SPARE_ZEROS:
        limit = tl.where(b == 0, 0, limit)
    return share & tl.maximum(limit - 1, 0)


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _in_units(v, down_1, down_2):
    """Potentials in units of the weights."""
    v = tl.minimum(tl.maximum(v, -_LARGEST_POTENTIAL), _LARGEST_POTENTIAL)
    return v.to(tl.float32) * down_1 * down_2


@triton.jit
def _of_line(values, k: tl.constexpr):
    """What the k-th line across holds, for every line of the tile."""
    return tl.gather(values, tl.full(values.shape, k, tl.int32), 1)


@triton.jit
def _reduced(entries, potentials):
    """Entries of lines, less the potentials of the lines across."""
    values = ()
    for k in tl.static_range(len(entries)):
        values = values + (entries[k] - _of_line(potentials, k),)
    return values


@triton.jit
def _best_two(values, NETWORK: tl.constexpr):
    """The n-th and the (n+1)-th largest; 0 where a line has room for all."""
    STEPS: tl.constexpr = NETWORK[0]
    if len(STEPS) == 0:
        nth = tl.zeros_like(values[0])
        following = nth
    else:
        for s in tl.static_range(len(STEPS)):
            a, b = values[STEPS[s][1]], values[STEPS[s][2]]
            if STEPS[s][0]:
                values = values + (tl.maximum(a, b),)
            else:
                values = values + (tl.minimum(a, b),)
        nth, following = values[NETWORK[1]], values[NETWORK[2]]
    return nth, following


@triton.jit
def _is_chosen(value, nth, CLAMP: tl.constexpr):
    chosen = value >= nth
    if CLAMP:
        chosen = chosen & (value > 0)
    return chosen


@triton.jit
def _middle(nth, following, CLAMP: tl.constexpr):
    middle = (nth + following) >> 1
    if CLAMP:
        middle = tl.maximum(middle, 0)
    return middle


@triton.jit
def _moved(potential, middle, beyond, CLAMP: tl.constexpr):
    way = middle - potential
    potential = tl.minimum(potential + way + (way >> _RELAXATION_BITS) * beyond, _LIMIT)
    return tl.maximum(potential, 0 if CLAMP else -_LIMIT)
