"""Random tiles of every pattern solved by `exact` and `flow`, their optima compared: `python -m benchmarks.agree`."""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import masksolve as ms
from benchmarks.families import RANDOM, SEED
from benchmarks.tiling import PATTERNS

_CHUNK_WEIGHTS = 1 << 20


@dataclass
class Count:
    """Tiles by outcome."""

    same_mask: int = 0
    same_importance: int = 0
    differ: int = 0

    def add(self, other: Count) -> None:
        """Add another count to this one."""
        self.same_mask += other.same_mask
        self.same_importance += other.same_importance
        self.differ += other.differ

    def __str__(self) -> str:
        total = self.same_mask + self.same_importance + self.differ
        return (
            f"{total:,} tiles, {self.same_mask:,} with the same mask, {self.same_importance:,} with another mask of "
            f"exactly the same importance, {self.differ:,} differ"
        )


def main() -> None:
    """Compare all patterns, or one; exits with 1 if any tile differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agree", description=__doc__)
    parser.add_argument("--pattern", type=ms.Pattern.parse, action="append", help="such as 4:8; all of them by default")
    parser.add_argument("--tiles", type=int, default=1_000_000, help="tiles of each pattern (1,000,000)")
    parser.add_argument("--family", choices=[*RANDOM, "mixed"], default="mixed", help="weights; mixed takes turns")
    parser.add_argument("--threads", type=int, default=None, help="threads (every usable core)")
    parser.add_argument("--at-most", action="store_true", help="at most n in a line (saturated=False), not exactly n")
    arguments = parser.parse_args()

    families = list(RANDOM) if arguments.family == "mixed" else [arguments.family]
    total = Count()
    patterns = [(pattern.n, pattern.m) for pattern in arguments.pattern] if arguments.pattern else PATTERNS
    for n, m in patterns:
        total.add(compare(n, m, arguments.tiles, families, not arguments.at_most, arguments.threads))
    wanted = "at most n" if arguments.at_most else "exactly n"
    print(f"exact against flow, {wanted} in a line, {', '.join(families)}: {total}")
    sys.exit(total.differ > 0)


def compare(n: int, m: int, tiles: int, families: list[str], saturated: bool, threads: int | None) -> Count:
    """Compare one pattern, chunk by chunk, each of the next family of weights; prints its progress."""
    rng = np.random.default_rng([SEED, n, m])
    at_once = max(1, min(_CHUNK_WEIGHTS // (m * m), -(-tiles // len(families))))
    count, start = Count(), time.perf_counter()
    for chunk, done in enumerate(range(0, tiles, at_once)):
        size = min(at_once, tiles - done)
        weights = RANDOM[families[chunk % len(families)]](rng, (size, m, m))
        exact, flow = (
            ms.solve_blocks(weights, n, m, method=method, saturated=saturated, threads=threads)
            for method in ("exact", "flow")
        )
        count.add(outcomes(weights, exact, flow))
        if chunk % 8 == 7:
            print(f"{n}:{m}: {count}, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{n}:{m}: {count}; done in {time.perf_counter() - start:.0f} s", flush=True)
    return count


def outcomes(weights: NDArray[np.float32], one: NDArray[np.bool_], other: NDArray[np.bool_]) -> Count:
    """Count the tiles on which two batches of masks keep the same importance, to the last bit of the exact sums."""
    unlike = np.flatnonzero((one != other).any(axis=(1, 2)))
    signs = one[unlike].astype(np.int8) - other[unlike].astype(np.int8)
    # float32 weights are exact in float64, and fsum is zero only where the exact sum is.
    changes = (np.abs(weights[unlike], dtype=np.float64) * signs).reshape(len(unlike), weights[0].size)
    equal = sum(math.fsum(change) == 0 for change in changes)
    return Count(len(weights) - len(unlike), equal, len(unlike) - equal)


if __name__ == "__main__":
    main()
