"""Fixed-point numbers, their proof, and the stages, as the Triton kernel and the batched version share them.

The algorithm is that of `masksolve._methods.exact.equilibrate`, in integers of 32 bits, which every accelerator has and
in which nothing is rounded. Both versions therefore find the same masks, bit for bit.

Numbers. A tile is scaled by a power of two, so that its largest weight lies in [2**26, 2**27), and cut off to
integers b. An entry is exact if nothing was cut off; otherwise less than 1 was. Potentials are clamped to
+-2**28, so that no sum of the algorithm leaves 32 bits.

Ties. Entries are perturbed, c = b + p with 0 <= p < q >> spread, where q is the largest power of two that divides an
exact entry: coarse weights, which tie, are perturbed a lot, and float32 weights, which do not, hardly or not at all.

Proof (docs/proof.md, "Ties"). Let x take the n largest c - v of every row, put n into every column, and let t be any
row potentials. An entry is `right` by b - v - t if it is in x, by -(b - v - t) if it is not, and by 1 less than that if
it is inexact: the unscaled weight is right by no less. Let `wrong` be the sum of all that is missing to 0 (and, where
lines may hold fewer than n, of each potential times the places free in its line, potentials being >= 0). By weak
duality a mask y keeps at most `wrong` more than x, and to keep more at all it may differ from x only in entries that
are right by less than `wrong`. If all these are multiples of some q > wrong, so is the difference; hence it is 0, and x
is optimal. Zeros are multiples of everything; an inexact entry counts as a multiple of nothing.

Tiles that a stage does not prove go on in the next one, from the potentials reached. A proof is found after the fact,
so every number below is a matter of speed only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from masksolve._networks import selection_network
from masksolve._tiles import Margins

# Bits of the largest weight of a tile.
BITS = 27
LARGEST_QUANTUM = 1 << (BITS - 1)
LIMIT = 1 << 28
# `wrong` is counted up to here: 2 * 32 such sums of a line fit 32 bits.
SATURATED = 1 << 24
# "Divides everything": zeros, and the quantum of no entries at all.
NO_QUANTUM = 1 << 30
# Potentials are handed out up to here: a float32 holds it, times the largest unit there is.
LARGEST_POTENTIAL = (1 << 27) - 16
# Potentials move by 1 + relaxation / 32 of the way to the middle.
RELAXATION_BITS = 5


@dataclass(frozen=True)
class Selection:
    """A network that finds the n-th and (n+1)-th largest of `length` values; no steps where n >= length."""

    length: int
    steps: tuple[tuple[bool, int, int], ...]
    nth: int
    following: int


@dataclass(frozen=True)
class Stage:
    """The parameters of one stage of equilibration, for tiles of one shape.

    Attributes
    ----------
    kept : int
        Ones that a line holds, or may hold at most.
    rows, columns : Selection
        Of the entries of a row, and of a column.
    clamp_rows, clamp_columns : bool
        Whether potentials are kept from being negative, so that lines may hold fewer than `kept`.
    at_most : bool
        Whether the proof has to hold among masks whose lines may hold fewer, though nothing is clamped.
    first, every, last : int
        A proof is tried after round `first`, and after every `every` rounds from there to round `last`.
    relaxation : int
        How far beyond the middle potentials move, in 32nds of the way.
    spread, coarse, least : int
        An entry is perturbed by less than its quantum >> spread, and by less than the larger of `least` and the
        tile's quantum >> coarse.
    seed : int
        Of the perturbations.
    """

    kept: int
    rows: Selection
    columns: Selection
    clamp_rows: bool
    clamp_columns: bool
    at_most: bool
    first: int
    every: int
    last: int
    relaxation: int
    spread: int
    coarse: int
    least: int
    seed: int


@cache
def stages_for(height: int, width: int, margins: Margins) -> tuple[Stage, ...]:
    """Return the stages for tiles of height x width, in order."""
    bits = (max(height, width) - 1).bit_length()
    # Measured on Gaussian tiles, as in `masksolve._methods.exact`.
    if bits <= 2:
        first, every, last, more, relaxation = 2, 1, 8, 40, 5
    elif bits == 3:
        first, every, last, more, relaxation = 3, 2, 17, 60, 8
    elif bits == 4:
        first, every, last, more, relaxation = 5, 2, 27, 80, 13
    else:
        first, every, last, more, relaxation = 8, 3, 41, 120, 17
    clamp_rows, clamp_columns = not margins.exact_rows, not margins.exact_columns
    start = Stage(
        kept=margins.kept,
        rows=_selection(margins.kept, width),
        columns=_selection(margins.kept, height),
        clamp_rows=clamp_rows,
        clamp_columns=clamp_columns,
        at_most=False,
        first=first,
        every=every,
        last=last,
        relaxation=relaxation,
        spread=bits + 1,
        coarse=2 * bits - 1,
        least=1 << 12,
        seed=7,
    )
    finish = replace(
        start,
        every=4,
        last=more,
        relaxation=relaxation + 4,
        spread=bits + 3,
        coarse=2 * bits + 1,
        least=1 << 10,
        seed=8,
    )
    if clamp_rows and clamp_columns and height == width:
        # Most tiles are as well off with every line full, which takes fewer rounds.
        full = replace(start, clamp_rows=False, clamp_columns=False, at_most=True)
        return full, finish
    return start, finish


@cache
def random_bits(size: int, seed: int) -> NDArray[np.int32]:
    """Return the bits that perturbations are taken from, one int32 per entry; any without a pattern will do."""
    return np.random.default_rng(seed).integers(0, 1 << 30, size, np.int32)


@cache
def _selection(kept: int, length: int) -> Selection:
    if kept >= length:
        return Selection(length, (), 0, 0)
    network = selection_network(kept, length)
    return Selection(length, network.steps, network.nth, network.following)
