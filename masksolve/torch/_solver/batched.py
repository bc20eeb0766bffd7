"""The exact solver in batched PyTorch operations, for devices without Triton; `direct_4x4` and `fixed_point` say why.

Tiles are the last axis, so that every operation runs over whole lines of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from masksolve.torch._solver.direct_4x4 import SIDE, SUMS, Halves
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

# Weights solved at a time, which bounds the memory.
_CHUNK_ON_CPU = 1 << 17
_CHUNK_ELSEWHERE = 1 << 24


def solve_directly(tiles: Tensor, masks: Tensor, halves: Halves) -> Tensor:
    """Solve 4x4 tiles (b, p, q, 4, 4) without rounds; return which of the b * p * q remain, bool.

    Parameters
    ----------
    masks
        (b, p, q, 4, 4), bool, to fill.
    """
    remaining = torch.empty(tiles.shape[:3].numel(), dtype=torch.bool, device=tiles.device)
    places = torch.arange(SIDE * SIDE, device=tiles.device)
    for some in _chunks(torch.arange(len(remaining), device=tiles.device), tiles):
        where = _unravel(some, tiles)
        weights = tiles[where]
        entries = weights.abs().permute(1, 2, 0)
        terms = entries.to(SUMS[weights.dtype])
        exponent = (entries.float().amax(dim=(0, 1)).view(torch.int32) >> 23) + halves.spare
        coarse = (exponent.clamp(max=255) << 23).view(torch.float32).to(terms.dtype)
        remaining[some] = ~(terms + coarse - coarse == terms).flatten(0, 1).all(dim=0)
        filled = torch.stack([terms[:, columns].sum(dim=1) for columns in halves.rows], dim=1)
        upper, upper_bits = _best_pairs(filled[0], filled[1], halves)
        lower, lower_bits = _best_pairs(filled[2], filled[3], halves)
        best = (upper + lower.flip(0)).argmax(dim=0, keepdim=True)
        bits = (upper_bits + (lower_bits.flip(0) << 8)).gather(0, best)[0]
        masks[where] = (bits[:, None] >> places & 1).bool().view(-1, SIDE, SIDE)
    return remaining


def _best_pairs(first: Tensor, second: Tensor, halves: Halves) -> tuple[Tensor, Tensor]:
    """Return, for every profile, the most that two rows keep and how they are filled, both (profiles, k)."""
    sums, fillings = [], []
    for profile in halves.profiles:
        best = torch.stack([first[i] + second[j] for i, j, _ in profile]).max(dim=0)
        sums.append(best.values)
        fillings.append(torch.tensor([bits for _, _, bits in profile], device=first.device)[best.indices])
    return torch.stack(sums), torch.stack(fillings)


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
    masks
        (b, p, q, h, w), bool, to fill.
    potentials
        float32 (b * p * q, w): column potentials to start from where `warm`, and where those reached are written.
    """
    if which is None:
        which = torch.arange(potentials.shape[0], device=tiles.device)
    remaining = []
    for some in _chunks(which, tiles):
        where = _unravel(some, tiles)
        weights = tiles[where]
        entries = _in_fixed_point(weights.permute(1, 2, 0), stage)
        chosen, found, proven = _equilibrate(entries, stage, potentials[some].T if warm else None)
        remaining.append(~proven)
        potentials[some] = found.T
        solved = tuple(index[proven] for index in where)
        masks[solved] = chosen.permute(2, 0, 1)[proven]
    return torch.cat(remaining)


def _chunks(which: Tensor, tiles: Tensor) -> Iterator[Tensor]:
    at_once = (_CHUNK_ON_CPU if tiles.device.type == "cpu" else _CHUNK_ELSEWHERE) // (tiles.shape[3] * tiles.shape[4])
    yield from which.split(max(1, at_once))


class _Entries(NamedTuple):
    """Tiles (h, w, k) in fixed point; exact ones have a quantum. `finite`, `up` and `down` (k) belong to tiles."""

    b: Tensor
    quantum: Tensor
    perturbed: Tensor
    finite: Tensor
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]


def _unravel(which: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    across = tiles.shape[2]
    in_matrix = tiles.shape[1] * across
    return which // in_matrix, which % in_matrix // across, which % across


def _in_fixed_point(weights: Tensor, stage: Stage) -> _Entries:
    height, width, _ = weights.shape
    values = weights.abs().contiguous()
    if values.dtype != torch.float64:
        values = values.float()
    top = values.float().view(torch.int32).amax(dim=(0, 1))
    finite = top < 0x7F800000
    scale = torch.where(finite, BITS + 126 - (top >> 23), 0)
    half = scale >> 1
    up = _power_of_two(half), _power_of_two(scale - half)
    down = _power_of_two(-half), _power_of_two(half - scale)
    values = torch.where(finite, values, 0)
    scaled = values * up[0] * up[1]
    b = scaled.int()
    exact = (b.to(scaled.dtype) == scaled) & ((b != 0) | (values == 0))
    quantum = torch.where(exact, torch.where(b == 0, NO_QUANTUM, b & -b), 0)
    finest = (quantum.clamp(max=LARGEST_QUANTUM).amin(dim=(0, 1)) >> stage.coarse).clamp(min=stage.least)
    limit = torch.minimum(quantum >> stage.spread, finest)
    if stage.clamp_rows and stage.clamp_columns:
        limit = torch.where(b == 0, 0, limit)
    bits = torch.from_numpy(random_bits(height * width, stage.seed)).to(weights.device).view(height, width, 1)
    return _Entries(b, quantum, b + (bits & (limit - 1).clamp(min=0)), finite, up, down)


def _equilibrate(entries: _Entries, stage: Stage, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return masks (h, w, k), proven or not, their potentials (w, k), and which are proven (k)."""
    perturbed = entries.perturbed
    height, width, count = perturbed.shape
    u = perturbed.new_zeros(height, count)
    v = perturbed.new_zeros(width, count)
    if start is not None:
        v = (start * entries.up[0] * entries.up[1]).nan_to_num(nan=-LIMIT).clamp(-LIMIT, LIMIT).int()
        if stage.clamp_columns:
            v = v.clamp(min=0)
    nth = middle = u
    is_open = entries.finite.clone()
    first = stage.first if start is None else 0
    for round_ in range(stage.last + 1):
        nth, following = _best_two((perturbed - v).unbind(1), stage.rows)
        middle = _middle(nth, following, stage.clamp_rows)
        if round_ >= first and (round_ - first) % stage.every == 0:
            failing = nth <= following
            if stage.clamp_rows:
                failing &= nth > 0
            ones = _choose(perturbed - v, nth, stage).sum(dim=0)
            misfits = ones > stage.kept if stage.clamp_columns else ones != stage.kept
            is_open &= failing.any(dim=0) | misfits.any(dim=0)
            if not is_open.any():
                break
        beyond = stage.relaxation if round_ > 0 else 0
        u = torch.where(is_open, _moved(u, middle, beyond, stage.clamp_rows), u)
        nth_down, following_down = _best_two((perturbed - u[:, None]).unbind(0), stage.columns)
        middle_down = _middle(nth_down, following_down, stage.clamp_columns)
        v = torch.where(is_open, _moved(v, middle_down, beyond, stage.clamp_columns), v)

    chosen = _choose(perturbed - v, nth, stage)
    right = entries.b - v - middle[:, None]
    right = torch.where(chosen, right, -right) - (entries.quantum == 0).int()
    wrong = (-right).clamp(0, SATURATED).sum(dim=1).clamp(max=SATURATED).sum(dim=0)
    if stage.clamp_columns:
        places = (stage.kept - chosen.sum(dim=0)).clamp(min=0)
        wrong += (v.clamp(max=SATURATED) * places).clamp(max=SATURATED).sum(dim=0)
    divisor = torch.where(right < wrong, entries.quantum, NO_QUANTUM).amin(dim=(0, 1))
    proven = entries.finite & ~is_open & (wrong < SATURATED) & (wrong < divisor)
    if stage.at_most:
        lowest = v.amin(dim=0)
        proven &= lowest + middle.amin(dim=0) >= 0
        v = v - torch.where(proven, lowest, 0)
    v = v.clamp(-LARGEST_POTENTIAL, LARGEST_POTENTIAL)
    return chosen, v.float() * entries.down[0] * entries.down[1], proven


def _choose(values: Tensor, nth: Tensor, stage: Stage) -> Tensor:
    chosen = values >= nth[:, None]
    return chosen & (values > 0) if stage.clamp_rows else chosen


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


def _best_two(values: tuple[Tensor, ...], selection: Selection) -> tuple[Tensor, Tensor]:
    """Return the n-th and the (n+1)-th largest; 0 where a line has room for all."""
    if not selection.steps:
        zeros = torch.zeros_like(values[0])
        return zeros, zeros
    wires = list(values)
    for is_max, a, b in selection.steps:
        wires.append((torch.maximum if is_max else torch.minimum)(wires[a], wires[b]))
    return wires[selection.nth], wires[selection.following]


def _middle(nth: Tensor, following: Tensor, clamp: bool) -> Tensor:
    middle = (nth + following) >> 1
    return middle.clamp(min=0) if clamp else middle


def _moved(potential: Tensor, middle: Tensor, beyond: int, clamp: bool) -> Tensor:
    way = middle - potential
    return (potential + way + (way >> RELAXATION_BITS) * beyond).clamp(0 if clamp else -LIMIT, LIMIT)
