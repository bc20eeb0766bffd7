"""Tiles of 4x4 solved without rounds: what the Triton kernel and the batched version share.

Masks. A row of a tile is filled in few ways (6 of them keep 2 of 4), two rows in 36, and these put one of 19 profiles
of ones into the columns. The best two upper rows of every profile are put together with the best two lower rows of the
profile that completes it; the best of these masks is the best of all that are valid. That needs no
duality; docs/proof.md has the proof of all other tiles.

Sums. They are floats that nothing was rounded off: if all entries of a tile are multiples of some 2**k, and no sum of 4
* kept of them is above 2**(k + 24) (float32) or 2**(k + 53) (float64), every sum is a float. With the largest entry in
[2**e, 2**(e + 1)), that k is the unit of floats from 2**(e + spare) on, and (a + 2**(e + spare)) - 2**(e + spare)
rounds a to such a multiple. A tile in which this changes an entry, or where it overflows, is left to `fixed_point`.
Weights of 16 bits are added in float32 and float32 weights in float64, which leaves few tiles; float64 weights have no
wider type, and go to `fixed_point` at once.

Both versions take the first of equal sums, so that they find the same masks, bit for bit.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

from torch import Tensor, bfloat16, float16, float32, float64

from masksolve._tiles import Margins

SIDE = 4
# The dtype in which weights of a dtype are added.
SUMS = {float16: float32, bfloat16: float32, float32: float64}


@dataclass(frozen=True)
class Halves:
    """The ways to fill one row, and two rows, of a 4x4 tile.

    Attributes
    ----------
    rows : tuple of tuple of int
        The ways to fill a row: the columns that it keeps.
    profiles : tuple of tuple of (int, int, int)
        For every profile the ways to fill two rows: how the first is filled, how the second, and both as 8 bits. The
        k-th profile from the front and from the back complete each other.
    spare : int
        2**spare is at least the number of entries that a mask keeps.
    """

    rows: tuple[tuple[int, ...], ...]
    profiles: tuple[tuple[tuple[int, int, int], ...], ...]
    spare: int


def is_direct(tile_shape: tuple[int, int], margins: Margins, weights: Tensor) -> bool:
    """Return whether tiles of these weights are solved without rounds."""
    is_exact = margins.exact_rows and margins.exact_columns and 0 < margins.kept < SIDE
    sums = SUMS.get(weights.dtype)
    # MPS has no float64.
    is_had = sums == float32 or (sums == float64 and weights.device.type != "mps")
    return tile_shape == (SIDE, SIDE) and is_exact and is_had


@cache
def halves(kept: int) -> Halves:
    """Return the ways to fill rows of 4 that keep `kept` entries each."""
    rows = tuple(combinations(range(SIDE), kept))
    ways = defaultdict(list)
    for (i, first), (j, second) in product(enumerate(rows), repeat=2):
        profile = tuple((column in first) + (column in second) for column in range(SIDE))
        bits = sum(1 << column for column in first) + sum(1 << (SIDE + column) for column in second)
        ways[profile].append((i, j, bits))
    completed = sorted(profile for profile in ways if tuple(kept - ones for ones in profile) in ways)
    profiles = tuple(tuple(ways[profile]) for profile in completed)
    return Halves(rows, profiles, (SIDE * kept - 1).bit_length())
