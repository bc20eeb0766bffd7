"""Other ways to find masks on a GPU: re-implementations from their descriptions, and PyTorch's own greedy.

The 90-mask product (Hu et al. 2024), the paper's vectorised greedy (Hubara et al. 2021), TSENOR (Meng et al. 2025),
and PyTorch's greedy on 4x4 tiles, whose two packed forms are unpacked to see its mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import masksolve as ms
from benchmarks.peers.mask_product import _MASKS
from benchmarks.peers.paper_greedy import greedy
from benchmarks.peers.tsenor import ITERATIONS, TAU, _fill, _fractional

_CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class Peer:
    """A solver of matrices (R, C) whose sides are multiples of m: returns masks, or None if it shows none."""

    name: str
    solve: Callable[[Tensor, ms.Pattern], Tensor]


def of(pattern: ms.Pattern) -> list[Peer]:
    """List the peers that know a pattern."""
    peers = [Peer("paper's greedy", _by_tiles(_greedy)), Peer("TSENOR", _by_tiles(_tsenor))]
    if (pattern.n, pattern.m) == (2, 4):
        peers += [Peer("90-mask product", _by_tiles(_mask_product)), Peer("PyTorch tile greedy", _tile_greedy)]
    return peers


def _by_tiles(solve: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, ms.Pattern], Tensor]:
    def run(weights: Tensor, pattern: ms.Pattern) -> Tensor:
        m = pattern.m
        rows, columns = weights.shape
        grid = weights.view(rows // m, m, columns // m, m).transpose(1, 2)
        tiles = grid.reshape(-1, m, m).abs()
        masks = torch.cat([solve(chunk, pattern.n) for chunk in tiles.split(_CHUNK_WEIGHTS // (m * m))])
        return masks.view(grid.shape).transpose(1, 2).reshape(rows, columns)

    return run


def _greedy(tiles: Tensor, n: int) -> Tensor:
    with torch.device(tiles.device):
        return greedy(tiles, n)


def _tsenor(tiles: Tensor, n: int) -> Tensor:
    with torch.device(tiles.device):
        masks = greedy(_fractional(tiles, n, TAU, ITERATIONS), n)
        _fill(tiles, masks, n)
        return masks


def _mask_product(tiles: Tensor, n: int) -> Tensor:
    masks = torch.from_numpy(_MASKS).to(tiles.device)
    best = (tiles.reshape(-1, 16) @ masks.T.to(tiles.dtype)).argmax(dim=1)
    return masks[best].view(-1, 4, 4)


def _tile_greedy(weights: Tensor, pattern: ms.Pattern) -> Tensor:
    # The kernel takes 16-bit floats.
    packed = torch.sparse.SparseSemiStructuredTensorCUTLASS.prune_dense_static_sort(
        weights.bfloat16(), algorithm="largest_abs_values_greedy"
    )
    return packed.to_dense() != 0
