"""TSENOR's temperature and iterations: time against retained importance, on Gaussian tiles."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import OUTPUT, describe, header, pin_threads

_TAUS = (25.0, 50.0, 100.0, 160.0)
_ITERATIONS = (10, 30, 100, 300, 1000)
_WEIGHTS = 1 << 18


@dataclass(frozen=True)
class Choice:
    """One choice of the two parameters and what came of it."""

    pattern: str
    tau: float
    iterations: int
    microseconds_per_tile: float
    retained_mean: float
    retained_worst: float


def main() -> None:
    """Measure and print every choice on Gaussian weights."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tsenor_tradeoff", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    pin_threads(arguments.threads)

    from benchmarks import report

    choices = [choice for n, m in ((2, 4), (4, 8), (8, 16), (16, 32)) for choice in measure(n, m, arguments.threads)]
    rows = [
        [
            c.pattern,
            f"{c.tau:g}",
            str(c.iterations),
            report.significant(c.microseconds_per_tile),
            f"{c.retained_mean:.5f}",
            f"{c.retained_worst:.5f}",
        ]
        for c in choices
    ]
    print(header(arguments.threads) + "\n")
    print(report.markdown(("pattern", "tau / largest", "iterations", "µs/tile", "retained mean", "worst tile"), rows))
    report.save(arguments.output, "tsenor", describe(arguments.threads), choices)


def measure(n: int, m: int, threads: int) -> list[Choice]:
    """Every choice for one pattern, on the same tiles."""
    import numpy as np
    import torch

    import masksolve as ms
    from benchmarks import families
    from benchmarks.peers import tsenor
    from benchmarks.tiling import kept

    torch.set_num_threads(threads)
    tiles = families.gaussian(np.random.default_rng(families.SEED), (_WEIGHTS // (m * m), m, m))
    best = kept(tiles, ms.solve_blocks(tiles, n, m))
    tsenor.solve(tiles[:64], n)
    choices = []
    for tau in _TAUS:
        for iterations in _ITERATIONS:
            start = time.perf_counter()
            masks = tsenor.solve(tiles, n, tau=tau, iterations=iterations)
            microseconds = (time.perf_counter() - start) / len(tiles) * 1e6
            retained = kept(tiles, masks) / best
            values = float(retained.mean()), float(retained.min())
            choices.append(Choice(f"{n}:{m}", tau, iterations, microseconds, *values))
    return choices


if __name__ == "__main__":
    main()
