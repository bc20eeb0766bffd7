"""The exact solver as Triton kernels, each one pass from weights to masks; `batched` computes the same.

4x4 tiles are solved without rounds, as `direct_4x4` says, with one tile in each thread, which does little more than
read and write. All others are equilibrated and proven, as `fixed_point` says, with one line in each thread: it holds
row i of its tile and column i, in registers, and runs the selection networks on them as straight-line code; the
potentials of the lines across come from the neighbouring threads by shuffles. A tile of 32x32 fills one warp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from masksolve.torch._solver.direct_4x4 import SIDE, Halves
from masksolve.torch._solver.fixed_point import (
    BITS,
    LARGEST_POTENTIAL,
    LARGEST_QUANTUM,
    LIMIT,
    NO_QUANTUM,
    RELAXATION_BITS,
    SATURATED,
    Selection,
    Stage,
    random_bits,
)

LARGEST_M = 32
# Within a tile, places are counted in 32 bits.
LARGEST_STRIDE = 1 << 25
KEPT_LINES = tl.constexpr(8)

_BITS = tl.constexpr(BITS)
_LARGEST_POTENTIAL = tl.constexpr(LARGEST_POTENTIAL)
_LARGEST_QUANTUM = tl.constexpr(LARGEST_QUANTUM)
_LIMIT = tl.constexpr(LIMIT)
_NO_QUANTUM = tl.constexpr(NO_QUANTUM)
_RELAXATION_BITS = tl.constexpr(RELAXATION_BITS)
_SATURATED = tl.constexpr(SATURATED)
_INFINITY = tl.constexpr(0x7F800000)
_SIDE = tl.constexpr(SIDE)
# Tiles of a thread block that solves them directly: blocks of one warp each would be more, and slow to start.
_DIRECT_TILES, _DIRECT_WARPS = 128, 4


def solve_directly(tiles: Tensor, masks: Tensor, halves: Halves) -> Tensor:
    """Solve 4x4 tiles (b, p, q, 4, 4) without rounds; return which of the b * p * q remain, bool.

    Parameters
    ----------
    tiles
        Of a matrix, or of several: tiles lie side by side, as `device` cuts them.
    masks
        (b, p, q, 4, 4), bool, to fill.
    """
    _, tiles_down, tiles_across = tiles.shape[:3]
    tile_rows = tiles.shape[0] * tiles_down
    remaining = torch.empty(tile_rows * tiles_across, dtype=torch.uint8, device=tiles.device)
    with torch.cuda.device(tiles.device if tiles.is_cuda else -1):
        _solve_directly[(tile_rows * triton.cdiv(tiles_across, _DIRECT_TILES),)](
            tiles,
            masks.view(torch.uint8),
            remaining,
            tiles_down,
            tiles_across,
            tiles.stride(0),
            *tiles.stride()[3:],
            masks.stride(0),
            *masks.stride()[3:],
            ROWS=halves.rows,
            # Tuples of tuples of numbers are what a kernel can take apart.
            PROFILES=tuple(sum(profile, ()) for profile in halves.profiles),
            SPARE=halves.spare,
            TILES=_DIRECT_TILES,
            num_warps=_DIRECT_WARPS,
            enable_fp_fusion=False,
        )
    return remaining.view(torch.bool)


def solve_stage(
    tiles: Tensor,
    masks: Tensor,
    potentials: Tensor,
    which: Tensor | None,
    stage: Stage,
    warm: bool,
) -> Tensor:
    """Run one stage on tiles (b, p, q, h, w), or on those that `which` (k) counts; return which of them remain, bool.

    Parameters
    ----------
    tiles
        Of a matrix, or of several: tiles lie side by side, as `device` cuts them.
    masks
        (b, p, q, h, w), bool, to fill.
    potentials
        float32 (b * p * q, w): column potentials to start from where `warm`, and where those reached are written.
    """
    _, tiles_down, tiles_across, height, width = tiles.shape
    count = potentials.shape[0] if which is None else which.shape[0]
    remaining = torch.empty(count, dtype=torch.uint8, device=tiles.device)
    lines = triton.next_power_of_2(max(height, width, 2))
    if which is None and _FEW_PROGRAMS:
        which = torch.arange(count, device=tiles.device)
    # One warp per program, which waits for no other.
    per_program = (4096 if _FEW_PROGRAMS else 32) // lines
    if which is None:
        programs = count // tiles_across * triton.cdiv(tiles_across, per_program)
    else:
        programs = triton.cdiv(count, per_program)
    with torch.cuda.device(tiles.device if tiles.is_cuda else -1):
        _solve[(programs,)](
            tiles,
            masks.view(torch.uint8),
            potentials,
            remaining if which is None else which,
            remaining,
            _random_bits_on(tiles.device, height * width, stage.seed),
            count,
            tiles_down,
            tiles_across,
            tiles.stride(0),
            *tiles.stride()[3:],
            masks.stride(0),
            *masks.stride()[3:],
            width if warm else 0,
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
            TILES=per_program,
            LINES=lines,
            HALVINGS=lines.bit_length() - 1,
            num_warps=1,
            # A fused multiply-add rounds once where both versions have to round twice.
            enable_fp_fusion=False,
        )
    return remaining.view(torch.bool)


def _network(selection: Selection) -> tuple[tuple[int, ...], ...]:
    """Return the two outputs and the steps as a tuple of tuples, which a kernel can take apart."""
    return (selection.nth, selection.following), *selection.steps


_random_bits: dict[tuple[torch.device, int, int], Tensor] = {}


def _random_bits_on(device: torch.device, size: int, seed: int) -> Tensor:
    key = device, size, seed
    if key not in _random_bits:
        _random_bits[key] = torch.from_numpy(random_bits(size, seed)).to(device)
    return _random_bits[key]


@triton.jit
def _solve_directly(
    weights,
    masks,
    remaining,
    tiles_down,
    tiles_across,
    weight_batch,
    weight_row,
    weight_column,
    mask_batch,
    mask_row,
    mask_column,
    ROWS: tl.constexpr,
    PROFILES: tl.constexpr,
    SPARE: tl.constexpr,
    TILES: tl.constexpr,
):
    program = tl.program_id(0)
    pieces = tl.cdiv(tiles_across, TILES)
    tile_row = (program // pieces).to(tl.int64)
    batch, down = tile_row // tiles_down, tile_row % tiles_down
    across = program % pieces * TILES + tl.arange(0, TILES)
    waiting = across < tiles_across
    inside = waiting[:, None]
    column = tl.arange(0, _SIDE)[None, :]
    # Said in columns, so that the compiler sees which entries lie side by side.
    place = across.to(tl.int64)[:, None] * _SIDE + column
    source = weights + batch * weight_batch + down * _SIDE * weight_row + place * weight_column
    target = batch * mask_batch + down * _SIDE * mask_row + place * mask_column

    lines = ()
    for row in tl.static_range(_SIDE):
        lines = lines + (tl.load(source + row * weight_row, mask=inside, other=0.0),)
    entries = _entries_of(lines)
    top = entries[0]
    for k in tl.static_range(1, _SIDE * _SIDE):
        top = tl.maximum(top, entries[k])
    exponent = tl.minimum((top.to(tl.int32, bitcast=True) >> 23) + SPARE, 255)
    coarse = (exponent << 23).to(tl.float32, bitcast=True)
    if weights.dtype.element_ty == tl.float32:
        coarse = coarse.to(tl.float64)
    exact = waiting
    terms = ()
    for k in tl.static_range(_SIDE * _SIDE):
        term = entries[k].to(coarse.dtype)
        exact = exact & ((term + coarse) - coarse == term)
        terms = terms + (term,)

    upper, upper_bits = _best_pairs(_filled(terms, 0, ROWS), _filled(terms, 1, ROWS), PROFILES)
    lower, lower_bits = _best_pairs(_filled(terms, 2, ROWS), _filled(terms, 3, ROWS), PROFILES)
    best = upper[0] + lower[len(PROFILES) - 1]
    bits = upper_bits[0] + (lower_bits[len(PROFILES) - 1] << 8)
    for k in tl.static_range(1, len(PROFILES)):
        total = upper[k] + lower[len(PROFILES) - 1 - k]
        is_more = total > best
        best = tl.where(is_more, total, best)
        bits = tl.where(is_more, upper_bits[k] + (lower_bits[len(PROFILES) - 1 - k] << 8), bits)

    for row in tl.static_range(_SIDE):
        chosen = (bits[:, None] >> (column + _SIDE * row)) & 1
        tl.store(masks + target + row * mask_row, chosen.to(tl.uint8), mask=inside)
    tl.store(remaining + tile_row * tiles_across + across, (exact == 0).to(tl.uint8), mask=waiting)


@triton.jit
def _entries_of(lines):
    """Return the magnitudes of four rows (tiles, 4), one after the other."""
    entries = ()
    for row in tl.static_range(_SIDE):
        pairs = tl.reshape(tl.abs(lines[row].to(tl.float32)), [lines[row].shape[0], 2, 2])
        even, odd = tl.split(pairs)
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        entries = entries + (first, second, third, fourth)
    return entries


@triton.jit
def _filled(terms, row: tl.constexpr, ROWS: tl.constexpr):
    """Return what a row keeps for every way to fill it."""
    sums = ()
    for way in tl.static_range(len(ROWS)):
        total = terms[_SIDE * row + ROWS[way][0]]
        for k in tl.static_range(1, len(ROWS[way])):
            total += terms[_SIDE * row + ROWS[way][k]]
        sums = sums + (total,)
    return sums


@triton.jit
def _best_pairs(first, second, PROFILES: tl.constexpr):
    """Return, for every profile, the most that two rows keep and how they are filled."""
    sums = ()
    fillings = ()
    for k in tl.static_range(len(PROFILES)):
        best = first[PROFILES[k][0]] + second[PROFILES[k][1]]
        bits = tl.full(best.shape, PROFILES[k][2], tl.int32)
        for way in tl.static_range(3, len(PROFILES[k]), 3):
            total = first[PROFILES[k][way]] + second[PROFILES[k][way + 1]]
            is_more = total > best
            best = tl.where(is_more, total, best)
            bits = tl.where(is_more, PROFILES[k][way + 2], bits)
        sums = sums + (best,)
        fillings = fillings + (bits,)
    return sums, fillings


@triton.jit
def _solve(
    weights,
    masks,
    potentials,
    which,
    remaining,
    random_bits,
    count,
    tiles_down,
    tiles_across,
    weight_batch,
    weight_row,
    weight_column,
    mask_batch,
    mask_row,
    mask_column,
    columns_known,
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
    TILES: tl.constexpr,
    LINES: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    line = tl.arange(0, LINES)
    i, j = line[None, :, None], line[None, None, :]
    program = tl.program_id(0)
    if LISTED:
        slot = program * TILES + tl.arange(0, TILES)
        waiting = slot < count
        tile = tl.load(which + slot, mask=waiting, other=0)
        tile_row, across = tile // tiles_across, tile % tiles_across
    else:
        # A piece of one tile row, so that all threads divide the same numbers.
        pieces = tl.cdiv(tiles_across, TILES)
        tile_row = (program // pieces).to(tl.int64)
        across = program % pieces * TILES + tl.arange(0, TILES)
        waiting = across < tiles_across
        slot = tile_row * tiles_across + across
        tile = slot
    batch, down = tile_row // tiles_down, tile_row % tiles_down
    across = across.to(tl.int64)
    # Said in columns, so that the compiler sees which entries lie side by side.
    place = across[:, None, None] * WIDTH + j
    if LISTED:
        batch, down = batch[:, None, None], down[:, None, None]
    source = weights + batch * weight_batch + down * HEIGHT * weight_row + i * weight_row + place * weight_column
    target = batch * mask_batch + down * HEIGHT * mask_row + i * mask_row + place * mask_column
    inside = waiting[:, None, None] & (i < HEIGHT) & (j < WIDTH)
    in_row, in_column = (line < HEIGHT)[None, :], (line < WIDTH)[None, :]

    # The scale: every weight is below 2**exponent.
    weight = tl.load(source, mask=inside, other=0.0)
    top = tl.max(tl.max(tl.abs(weight.to(tl.float32)).to(tl.int32, bitcast=True), axis=2), axis=1)
    finite = top < _INFINITY
    inside = inside & finite[:, None, None]
    scale = tl.where(finite, _BITS + 126 - (top >> 23), 0)
    b, quantum = _in_fixed_point(tl.where(inside, weight, 0.0), scale)
    finest = tl.min(tl.min(tl.minimum(quantum, _LARGEST_QUANTUM), axis=2), axis=1)
    finest = tl.maximum(finest >> coarse, least)
    entry = tl.broadcast_to(i * WIDTH + j, [TILES, LINES, LINES])
    bits = tl.load(random_bits + entry, mask=inside, other=0)
    c = b + _perturbation(b, quantum, bits, finest, spread, CLAMP_ROWS and CLAMP_COLUMNS)
    by_rows = _lines_of(c, HALVINGS)
    by_columns = _lines_of(tl.permute(c, (0, 2, 1)), HALVINGS)

    start = potentials + (tile.to(tl.int64) * WIDTH)[:, None] + line[None, :]
    v = tl.load(start, mask=waiting[:, None] & (line < columns_known)[None, :], other=0.0)
    v = v * _power_of_two(scale >> 1)[:, None] * _power_of_two(scale - (scale >> 1))[:, None]
    v = tl.where(v > -_LIMIT, tl.where(v < _LIMIT, v, _LIMIT), -_LIMIT).to(tl.int32)
    if CLAMP_COLUMNS:
        v = tl.maximum(v, 0)
    u = tl.zeros([TILES, LINES], tl.int32)

    nth = tl.zeros([TILES, LINES], tl.int32)
    middle = nth
    is_open = waiting & finite
    unsettled = 1
    round_ = 0
    while (round_ <= last) & (unsettled > 0):
        nth, following = _best_two(_reduced(by_rows, v, WIDTH), ROWS)
        middle = _middle(nth, following, CLAMP_ROWS)
        if (round_ >= first) & ((round_ - first) % every == 0):
            failing = (nth <= following) & in_row
            if CLAMP_ROWS:
                failing = failing & (nth > 0)
            ones = tl.zeros([TILES, LINES], tl.int32)
            for k in tl.static_range(HEIGHT):
                value = by_columns[k] - v
                chosen = value >= _of_line(nth, k)
                if CLAMP_ROWS:
                    chosen = chosen & (value > 0)
                ones += chosen.to(tl.int32)
            misfits = ones > KEPT if CLAMP_COLUMNS else ones != KEPT
            failing = failing | (misfits & in_column)
            is_open = is_open & (tl.max(failing.to(tl.int32), axis=1) != 0)
            unsettled = tl.max(is_open.to(tl.int32), axis=0)
        beyond = tl.where(round_ > 0, relaxation, 0)
        moves = is_open[:, None]
        u = tl.where(moves, _moved(u, middle, beyond, CLAMP_ROWS), u)
        nth_down, following_down = _best_two(_reduced(by_columns, u, HEIGHT), COLUMNS)
        middle_down = _middle(nth_down, following_down, CLAMP_COLUMNS)
        v = tl.where(moves, _moved(v, middle_down, beyond, CLAMP_COLUMNS), v)
        round_ += 1

    if LINES > KEPT_LINES:
        weight = tl.load(source, mask=inside, other=0.0)
        b, quantum = _in_fixed_point(weight, scale)
        bits = tl.load(random_bits + entry, mask=inside, other=0)
        c = b + _perturbation(b, quantum, bits, finest, spread, CLAMP_ROWS and CLAMP_COLUMNS)
    value = c - v[:, None, :]
    chosen = inside & (value >= nth[:, :, None])
    if CLAMP_ROWS:
        chosen = chosen & (value > 0)
    right = b - v[:, None, :] - middle[:, :, None]
    right = tl.where(chosen, right, -right) - (quantum == 0).to(tl.int32)
    lacks = tl.where(inside, tl.minimum(tl.maximum(-right, 0), _SATURATED), 0)
    wrong = tl.sum(tl.minimum(tl.sum(lacks, axis=2), _SATURATED), axis=1)
    if CLAMP_COLUMNS:
        places = tl.maximum(KEPT - tl.sum(chosen.to(tl.int32), axis=1), 0)
        lost = tl.minimum(tl.minimum(v, _SATURATED) * places, _SATURATED)
        wrong += tl.sum(tl.where(in_column, lost, 0), axis=1)
    matters = inside & (right < wrong[:, None, None])
    divisor = tl.min(tl.min(tl.where(matters, quantum, _NO_QUANTUM), axis=2), axis=1)
    proven = waiting & finite & (is_open == 0) & (wrong < _SATURATED) & (wrong < divisor)
    if AT_MOST:
        lowest = tl.min(tl.where(in_column, v, _LIMIT), axis=1)
        proven = proven & (lowest + tl.min(tl.where(in_row, middle, _LIMIT), axis=1) >= 0)
        v = v - tl.where(proven, lowest, 0)[:, None]

    stores = inside & proven[:, None, None]
    tl.store(masks + target, chosen.to(tl.uint8), mask=stores)
    tl.store(start, _in_units(v, scale), mask=waiting[:, None] & in_column)
    tl.store(remaining + slot, (proven == 0).to(tl.uint8), mask=waiting)


@triton.jit
def _in_fixed_point(weight, scale):
    """Return weights (tiles, h, w) as integers, and the largest powers of two that divide them: 0 for inexact ones."""
    if weight.dtype != tl.float64:
        weight = weight.to(tl.float32)
    value = tl.abs(weight) * _power_of_two(scale >> 1)[:, None, None]
    value = value * _power_of_two(scale - (scale >> 1))[:, None, None]
    b = value.to(tl.int32)
    exact = (b.to(value.dtype) == value) & ((b != 0) | (weight == 0))
    return b, tl.where(exact, tl.where(b == 0, _NO_QUANTUM, b & -b), 0)


@triton.jit
def _perturbation(b, quantum, bits, finest, spread, SPARE_ZEROS: tl.constexpr):
    limit = tl.minimum(quantum >> spread, finest[:, None, None])
    if SPARE_ZEROS:
        limit = tl.where(b == 0, 0, limit)
    return bits & tl.maximum(limit - 1, 0)


@triton.jit
def _lines_of(block, HALVINGS: tl.constexpr):
    """Return a block (tiles, lines, 2**HALVINGS) as a tuple of slices (tiles, lines)."""
    parts = (block,)
    for halving in tl.static_range(HALVINGS):
        halves = ()
        for part in tl.static_range(1 << halving):
            pairs = tl.reshape(parts[part], [block.shape[0], block.shape[1], 2, 1 << (HALVINGS - 1 - halving)])
            low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
            halves = halves + (low, high)
        parts = halves
    slices = ()
    for part in tl.static_range(1 << HALVINGS):
        slices = slices + (tl.reshape(parts[part], [block.shape[0], block.shape[1]]),)
    return slices


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _in_units(v, scale):
    """Return potentials (tiles, lines) in units of the weights."""
    v = tl.minimum(tl.maximum(v, -_LARGEST_POTENTIAL), _LARGEST_POTENTIAL).to(tl.float32)
    return v * _power_of_two(-(scale >> 1))[:, None] * _power_of_two((scale >> 1) - scale)[:, None]


@triton.jit
def _reduced(entries, potentials, LENGTH: tl.constexpr):
    """Return the LENGTH entries of every line, less the potentials of the lines across."""
    values = ()
    for k in tl.static_range(LENGTH):
        values = values + (entries[k] - _of_line(potentials, k),)
    return values


@triton.jit
def _of_line(values, k: tl.constexpr):
    """Return what the k-th line across holds, for every line of the tile."""
    return tl.gather(values, tl.full(values.shape, k, tl.int32), 1)


@triton.jit
def _best_two(values, NETWORK: tl.constexpr):
    """Return the n-th and the (n+1)-th largest; 0 where a line has room for all."""
    if len(NETWORK) == 1:
        nth = tl.zeros_like(values[0])
        following = nth
    else:
        for s in tl.static_range(1, len(NETWORK)):
            a, b = values[NETWORK[s][1]], values[NETWORK[s][2]]
            if NETWORK[s][0]:
                values = values + (tl.maximum(a, b),)
            else:
                values = values + (tl.minimum(a, b),)
        nth, following = values[NETWORK[0][0]], values[NETWORK[0][1]]
    return nth, following


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


# The interpreter takes the same time for a program of any number of tiles.
_FEW_PROGRAMS = not isinstance(_solve, triton.JITFunction)
