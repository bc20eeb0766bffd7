"""The table of everything that is measured: masksolve's methods, the peers, and numpy.abs as the memory floor."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

import masksolve as ms
from benchmarks.tiling import PATTERNS, Sample

# What one call is given at least, by solvers that take many tiles at once and waste their start on few.
_BATCH_WEIGHTS = 1 << 17

Run = Callable[[Sample, int, int, int], NDArray[np.bool_] | None]


@dataclass(frozen=True)
class Solver:
    """One row of the table.

    `run(sample, n, m, threads)` returns a mask of the sample's matrix, or masks of its tiles, or None for what finds
    no masks. `note` says what a reader must know to judge the figure.
    """

    name: str
    run: Run
    is_exact: bool = False
    is_ours: bool = False
    patterns: tuple[tuple[int, int], ...] = PATTERNS
    least_weights: int = 1
    note: str = ""


@dataclass(frozen=True)
class _Peer:
    module: str
    name: str
    is_exact: bool = False
    patterns: tuple[tuple[int, int], ...] = PATTERNS
    least_weights: int = 1
    note: str = ""


_PEERS = (
    _Peer("lemon", "LEMON network simplex", is_exact=True, note="C++, our file, costs as 40-bit integers"),
    _Peer(
        "mask_product",
        "90-mask product",
        is_exact=True,
        patterns=((2, 4),),
        least_weights=_BATCH_WEIGHTS,
        note="re-implemented after Hu et al. 2024; exact but for its product's float32 rounding",
    ),
    _Peer(
        "paper_greedy",
        "paper's greedy",
        least_weights=_BATCH_WEIGHTS,
        note="re-implemented after Hubara et al. 2021, PyTorch, vectorised over tiles",
    ),
    _Peer("tsenor", "TSENOR", least_weights=_BATCH_WEIGHTS, note="re-implemented after Meng et al. 2025, PyTorch"),
    _Peer(
        "tile_greedy_4x4",
        "PyTorch tile greedy",
        patterns=((2, 4),),
        least_weights=_BATCH_WEIGHTS,
        note="re-implemented in NumPy, since PyTorch's kernel needs CUDA: its masks, not its time",
    ),
    _Peer("assignment_rounds", "N assignments", note="N rounds of scipy.optimize.linear_sum_assignment"),
    _Peer("sparse_lp", "lp, many tiles", is_exact=True, note="one sparse LP for chunks of tiles, scipy linprog"),
    _Peer("networkx_flow", "networkx flow", is_exact=True, note="network simplex on integer costs"),
    _Peer(
        "pulp_cbc", "PuLP with CBC", is_exact=True, note="integer program, one tile at a time, as in the paper's code"
    ),
)


def every_solver(threads: int) -> tuple[list[Solver], list[str]]:
    """All solvers that can run here, and a line for each one that cannot."""
    peers, skipped = [], []
    for peer in _PEERS:
        try:
            module = importlib.import_module(f"benchmarks.peers.{peer.module}")
        except ImportError as error:
            skipped.append(f"{peer.name}: skipped, {error}")
            continue
        peers.append(
            Solver(
                peer.name,
                _on_tiles(module),
                is_exact=peer.is_exact,
                patterns=peer.patterns,
                least_weights=peer.least_weights,
                note=peer.note,
            )
        )
    _pin_torch(threads)
    return [*_our_solvers(skipped), *peers, memory_floor()], skipped


def memory_floor() -> Solver:
    """numpy.abs of the matrix into an array that exists: reads and writes it once, and finds no masks."""
    buffers: dict[tuple[int, ...], NDArray[np.float32]] = {}

    def run(sample: Sample, n: int, m: int, threads: int) -> None:
        matrix = sample.matrix
        out = buffers.get(matrix.shape)
        if out is None:
            out = buffers[matrix.shape] = np.empty_like(matrix)
        if threads == 1:
            np.abs(matrix, out=out)
            return
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(np.abs, np.array_split(matrix, threads), np.array_split(out, threads)))

    return Solver("numpy.abs", run, note="no solver: the memory floor, reads and writes the matrix once")


def _our_solvers(skipped: list[str]) -> list[Solver]:
    ours = [
        Solver("exact", _on_matrix("exact"), is_exact=True, is_ours=True, note="masksolve, the default"),
        Solver("flow", _by_blocks("flow"), is_exact=True, is_ours=True, note="masksolve, through OR-tools"),
        Solver("lp", _by_blocks("lp"), is_exact=True, is_ours=True, note="masksolve, through HiGHS, tile by tile"),
        Solver(
            "enumerate",
            _by_blocks("enumerate"),
            is_exact=True,
            is_ours=True,
            patterns=((2, 4), (1, 4)),
            least_weights=_BATCH_WEIGHTS,
            note="masksolve, every mask scored",
        ),
        Solver("greedy", _on_matrix("greedy"), is_ours=True, note="masksolve, compiled"),
        Solver("two-approx", _on_matrix("two-approx"), is_ours=True, note="masksolve, the paper's 2-approximation"),
    ]
    available = ms.available_methods()
    skipped.extend(f"{each.name}: skipped, its library is missing" for each in ours if each.name not in available)
    return [each for each in ours if each.name in available]


def _on_matrix(method: str) -> Run:
    return lambda sample, n, m, threads: ms.solve_matrix(sample.matrix, n, m, method=method, threads=threads)


def _by_blocks(method: str) -> Run:
    return lambda sample, n, m, threads: ms.solve_blocks(sample.tiles, n, m, method=method, threads=threads)


def _on_tiles(module: ModuleType) -> Run:
    return lambda sample, n, m, threads: module.solve(sample.tiles, n)


def _pin_torch(threads: int) -> None:
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(threads)
