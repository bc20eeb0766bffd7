"""Estimates of the kernels' time on an H200, from their machine code: `python -m benchmarks.gpu.operations`.

Nothing is measured on a GPU here. It counts the instructions of one thread in the code compiled for compute capability
9.0, and, with the batched version, the rounds that warps of Gaussian tiles take. From these follow the issue slots, at
the throughputs of NVIDIA's programming guide, and the bytes to move. Waiting, imperfect scheduling and caches are
ignored: no run can be faster, and one twice as slow would be no surprise.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

# The kernel is compiled, not interpreted.
os.environ["TRITON_INTERPRET"] = "0"

import numpy as np
import torch

import masksolve as ms
from benchmarks.gpu.offline import compile_variants
from benchmarks.marks import write_between_marks
from benchmarks.report import markdown, significant
from masksolve._tiles import Margins
from masksolve.torch._solver.batched import solve_stage
from masksolve.torch._solver.fixed_point import stages_for

# An H200 SXM by its data sheet, at its highest clock.
_MULTIPROCESSORS, _SCHEDULERS, _HERTZ, _BYTES_PER_SECOND = 132, 4, 1.98e9, 4.8e12
# Clocks for which one instruction of a warp keeps a scheduler's unit: 32 threads over its lanes.
_CLOCKS = {"SHFL": 4, "F2F": 8}
_HALF_RATE_CLOCKS, _OTHER_CLOCKS = 2, 1
_INTEGER = ("I", "VI", "LOP", "SEL", "SHF", "PRMT", "LEA", "VIADD", "POPC", "P2R", "R2P")
_HALF_RATE = (*_INTEGER, "FSETP", "FMNMX", "DADD", "DSETP")
_TARGETS = {(2, 4): "3 copies", (4, 8): "1 ms", (8, 16): "2 ms", (16, 32): "6 ms"}
_SIDE = 8192


def main() -> None:
    """Compile, count, print; or write the table into a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.operations", description=__doc__)
    parser.add_argument("--write", type=Path, help="write the table between its marks in this file, too")
    arguments = parser.parse_args()
    columns = (
        "pattern",
        "registers",
        "spilled bytes",
        "instructions: setup",
        "a round",
        "finish",
        "rounds of a warp",
        "issue limit, ms",
        "memory limit, ms",
        "copy, ms",
        "target",
    )
    table = markdown(columns, [_row(n, m) for n, m in _TARGETS])
    note = (
        f"**Estimated, not measured**: {_SIDE}×{_SIDE} bfloat16 on an H200, from instructions compiled for compute "
        "capability 9.0 and data sheet limits. The copy is the memory limit of a device-to-device copy of the weights."
    )
    print(f"{table}\n\n{note}")
    if arguments.write:
        write_between_marks(arguments.write, "operations", f"{table}\n\n{note}")


def _row(n: int, m: int) -> list[str]:
    compiled = compile_variants(ms.Pattern(n, m), torch.bfloat16)[0]
    is_direct = not compiled.round
    rounds = 0.0 if is_direct else _rounds_of_a_warp(n, m)
    # A thread has a tile, or a line of one.
    warps = _SIDE**2 / (32 * (m * m if is_direct else m))
    clocks = _clocks(compiled.setup) + rounds * _clocks(compiled.round) + _clocks(compiled.finish)
    issue = warps * clocks / (_MULTIPROCESSORS * _SCHEDULERS * _HERTZ)
    # Weights are read, masks written, and potentials, where there are any, written.
    memory = _SIDE**2 * (2 + 1 + (0 if is_direct else 4 / m)) / _BYTES_PER_SECOND
    copy = _SIDE**2 * 4 / _BYTES_PER_SECOND
    parts = (compiled.setup, compiled.round, compiled.finish)
    return [
        f"{n}:{m}",
        str(compiled.registers),
        str(compiled.spilled_bytes),
        *(str(len(part)) if part else "-" for part in parts),
        "-" if is_direct else f"{rounds:.1f}",
        *(significant(1e3 * seconds) for seconds in (issue, memory, copy)),
        _TARGETS[n, m],
    ]


def _clocks(instructions: tuple[str, ...]) -> int:
    def one(code: str) -> int:
        return _CLOCKS.get(code, _HALF_RATE_CLOCKS if code.startswith(_HALF_RATE) else _OTHER_CLOCKS)

    return sum(map(one, instructions))


def _rounds_of_a_warp(n: int, m: int) -> float:
    """Return the mean rounds of the slowest tile of a warp, for Gaussian bfloat16 weights."""
    in_warp, count = 32 // m, 1 << 11
    weights = np.random.default_rng(0).standard_normal((1, 1, count, m, m), np.float32)
    tiles = torch.from_numpy(weights).bfloat16()
    stage = stages_for(m, m, Margins(n, exact_rows=True, exact_columns=True))[0]
    rounds = float(stage.first + 1)
    for last in range(stage.first, stage.last):
        short = dataclasses.replace(stage, last=last)
        masks = torch.empty(tiles.shape, dtype=torch.bool)
        remaining = solve_stage(tiles, masks, torch.empty(count, m), None, short, False)
        rounds += float(remaining.view(-1, in_warp).any(dim=1).float().mean())
    return rounds


if __name__ == "__main__":
    main()
