"""Times solvers in turn on the same weights, each on as many tiles as its time allows, and judges their masks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

import masksolve as ms
from benchmarks.solvers import Solver
from benchmarks.tiling import Sample, faults, kept, sample, to_tiles


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds for one run of a solver, runs of each, and weights to certify."""

    seconds: float
    repeats: int
    certified_weights: int


@dataclass(frozen=True)
class Row:
    """The results of one solver for one pattern and one family of weights; None where a figure does not apply.

    `retained` is a tile's kept importance over the optimum's. `certified` is "yes" or "NO" for the solvers that
    claim to be exact, judged by `masksolve.certify` on `certified_tiles` of the tiles.
    """

    pattern: str
    weights: str
    solver: str
    tiles: int
    microseconds_per_tile: float
    weights_per_second: float
    retained_mean: float | None
    retained_worst: float | None
    invalid: float | None
    unfilled: float | None
    certified: str | None
    certified_tiles: int


@dataclass
class Run:
    """A solver, the sample it is timed on, the times, and its last result."""

    solver: Solver
    sample: Sample
    seconds: list[float] = field(default_factory=list)
    result: NDArray[np.bool_] | None = None

    def once(self, n: int, m: int, threads: int) -> float:
        """Solve the sample once; the seconds it took."""
        start = time.perf_counter()
        self.result = self.solver.run(self.sample, n, m, threads)
        return time.perf_counter() - start

    def per_tile(self) -> float:
        """Median seconds for a tile."""
        return statistics.median(self.seconds) / len(self.sample.tiles)


def measure(
    solvers: Sequence[Solver], matrix: NDArray[np.float32], n: int, m: int, effort: Effort, threads: int
) -> list[Run]:
    """Time every solver that takes the pattern, all of them in turn, as often as the effort says."""
    runs = [_prepare(each, matrix, n, m, effort, threads) for each in solvers if (n, m) in each.patterns]
    for _ in range(effort.repeats):
        for run in runs:
            run.seconds.append(run.once(n, m, threads))
    return runs


def judge(run: Run, n: int, m: int, weights: str, effort: Effort) -> Row:
    """One row of the table."""
    tiles = run.sample.tiles
    retained = shares = certified = None
    certified_tiles = 0
    if run.result is not None:
        masks = run.result if run.result.ndim == 3 else to_tiles(run.result, m)
        retained = _retained(tiles, masks, n, m)
        shares = faults(masks, n)
        if run.solver.is_exact:
            certified_tiles = min(len(tiles), max(1, effort.certified_weights // (m * m)))
            certified = "yes" if _is_optimal(tiles[:certified_tiles], masks[:certified_tiles], n, m) else "NO"
    return Row(
        pattern=f"{n}:{m}",
        weights=weights,
        solver=run.solver.name,
        tiles=len(tiles),
        microseconds_per_tile=run.per_tile() * 1e6,
        weights_per_second=m * m / run.per_tile(),
        retained_mean=None if retained is None else float(retained.mean()),
        retained_worst=None if retained is None else float(retained.min()),
        invalid=None if shares is None else shares[0],
        unfilled=None if shares is None else shares[1],
        certified=certified,
        certified_tiles=certified_tiles,
    )


def _prepare(solver: Solver, matrix: NDArray[np.float32], n: int, m: int, effort: Effort, threads: int) -> Run:
    """Give the solver as many tiles of the matrix as it solves in the time of one run."""
    most = (matrix.shape[0] // m) * (matrix.shape[1] // m)
    least = min(most, max(1, solver.least_weights // (m * m)))
    run = Run(solver, sample(matrix, m, least))
    run.once(n, m, threads)
    while True:
        # The better of two, so that nothing compiled or loaded on the way counts.
        taken = min(run.once(n, m, threads), run.once(n, m, threads))
        count = len(run.sample.tiles)
        if taken > effort.seconds / 2 or count == most:
            break
        run.sample = sample(matrix, m, min(most, round(count * min(8, effort.seconds / taken))))
    run.sample = sample(matrix, m, min(most, max(least, round(count * effort.seconds / taken))))
    return run


def _retained(tiles: NDArray[np.float32], masks: NDArray[np.bool_], n: int, m: int) -> NDArray[np.float64]:
    best = kept(tiles, ms.solve_blocks(tiles, n, m))
    return np.divide(kept(tiles, masks), best, out=np.ones(len(tiles)), where=best > 0)


def _is_optimal(tiles: NDArray[np.float32], masks: NDArray[np.bool_], n: int, m: int) -> bool:
    return ms.is_valid_mask(masks, n, m, saturated=True) and ms.certify(tiles, masks, n, m).optimal
