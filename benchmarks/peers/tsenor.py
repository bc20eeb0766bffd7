"""TSENOR in PyTorch, an approximate solver for GPUs: a re-implementation from its description.

Meng, Makni, Mazumder 2025 (arXiv 2505.23949). Entropic optimal transport: S = exp(tau * |W|) is scaled in turn to
row sums n and column sums n and clipped to at most 1, the last with Dykstra's correction. The fractional values are
rounded greedily, and swaps fill the lines that this leaves short. tau and the number of iterations are not given in
the part of the publication known here: `benchmarks.tsenor_tradeoff` shows what they buy, and the defaults are the
best found there.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.peers.paper_greedy import greedy

# tau is relative: the largest weight of every tile is 1.
TAU = 100.0
ITERATIONS = 300
# Tiles are taken in chunks: of the iterations' arrays as many as stay in the cache; the greedy's many small steps want
# more tiles at once.
_CHUNK_WEIGHTS = 1 << 19
_ITERATION_WEIGHTS = 1 << 17
# Below this, float32 loses precision; such an entry is as good as zero.
_SMALLEST = 1e-36


def solve(tiles: NDArray[np.float32], n: int, *, tau: float = TAU, iterations: int = ITERATIONS) -> NDArray[np.bool_]:
    """Masks with exactly n ones in every line."""
    chunks = torch.from_numpy(tiles).split(max(1, _CHUNK_WEIGHTS // tiles[0].size))
    return torch.cat([_solve_chunk(chunk.abs(), n, tau, iterations) for chunk in chunks]).numpy()


def _solve_chunk(weights: torch.Tensor, n: int, tau: float, iterations: int) -> torch.Tensor:
    parts = weights.split(max(1, _ITERATION_WEIGHTS // weights[0].numel()))
    masks = greedy(torch.cat([_fractional(part, n, tau, iterations) for part in parts]), n)
    _fill(weights, masks, n)
    return masks


def _fractional(weights: torch.Tensor, n: int, tau: float, iterations: int) -> torch.Tensor:
    """Return the fractional mask (B, m, m) that Dykstra's iterations reach."""
    # Tiles last, so that sums along lines run over whole vectors. Exponents from -tau / 2 to tau / 2 fit float32: a
    # factor common to a tile does not matter, since the first scaling removes it.
    scores = weights.permute(1, 2, 0).contiguous()
    largest = scores.amax(dim=(0, 1)).clamp_min(torch.finfo(scores.dtype).tiny)
    values = torch.exp(tau * (scores / largest - 0.5)).clamp_min_(_SMALLEST)
    correction = torch.ones_like(values)
    for _ in range(iterations):
        values *= n / values.sum(dim=1, keepdim=True)
        values *= n / values.sum(dim=0, keepdim=True)
        correction *= values
        torch.clamp(correction, _SMALLEST, 1, out=values)
        correction /= values
    return values.permute(2, 0, 1)


def _fill(weights: torch.Tensor, masks: torch.Tensor, n: int) -> None:
    """Fill lines that hold fewer than n by the best swaps, in place.

    For a row i and a column j that are short, a kept entry (p, q) makes way for (i, q) and (p, j).
    """
    while len(short := (masks.sum(dim=2) < n).any(dim=1).nonzero()[:, 0]):
        w, x = weights[short], masks[short]
        index = torch.arange(len(short))
        row = (x.sum(dim=2) < n).int().argmax(dim=1)
        column = (x.sum(dim=1) < n).int().argmax(dim=1)
        row_of_w, column_of_w = w[index, row][:, None, :], w[index, :, column][:, :, None]
        allowed = x & ~x[index, row][:, None, :] & ~x[index, :, column][:, :, None]
        gain = torch.where(allowed, row_of_w + column_of_w - w, -torch.inf)
        best = gain.flatten(1).argmax(dim=1)
        p, q = best // w.shape[1], best % w.shape[1]
        masks[short, p, q] = False
        masks[short, row, q] = True
        masks[short, p, column] = True
