"""Exact masks on the GPU beside a copy and every peer: `make bench-gpu`, where a CUDA device is at hand."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import masksolve as ms
from benchmarks.environment import OUTPUT, describe
from benchmarks.gpu import peers
from benchmarks.gpu.timing import milliseconds
from benchmarks.report import aligned, significant
from masksolve.torch._solver import batched as batched_operations
from masksolve.torch._solver import device
from masksolve.torch._solver.device import solve_on_device

_DEVICE = "cuda"
PATTERNS = ((2, 4), (4, 8), (8, 16), (16, 32))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIDES = (1024, 2048, 4096, 8192, 16384)
# Peers are slow, and their work is the same for every tile: they get matrices up to this, in one dtype.
PEER_SIDE, PEER_DTYPE = 4096, torch.float32
# Tiles of which the CPU certifies the masks.
_CERTIFIED_WEIGHTS = 1 << 18


@dataclasses.dataclass(frozen=True)
class Row:
    """One solver on one matrix. `kept_importance` is relative to the optimum; `solved_on_cpu` counts tiles."""

    pattern: str
    dtype: str
    side: int
    solver: str
    milliseconds: float
    copies: float
    kept_importance: float | None
    certified: str | None
    solved_on_cpu: int | None


def main() -> None:
    """Parse the arguments, refuse to start without a device, measure, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4096x4096 bfloat16 alone, without peers")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for gpu.csv and gpu.png")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            f"benchmarks.gpu needs a CUDA device, and torch {torch.__version__} finds none here; "
            "`python -m benchmarks.gpu.operations` estimates its figures from the compiled code without one"
        )
    sides = (4096,) if arguments.quick else SIDES
    dtypes = (torch.bfloat16,) if arguments.quick else DTYPES
    rows: list[Row] = []
    for n, m in PATTERNS:
        for dtype in dtypes:
            for side in sides:
                print(f"measuring: {n}:{m}, {dtype}, {side}", file=sys.stderr, flush=True)
                rows += _measure(ms.Pattern(n, m), dtype, side, with_peers=not arguments.quick)
    _print(rows)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "gpu.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, rows))
    _draw(rows, arguments.output / "gpu.png")
    print(f"\nwrote gpu.csv and gpu.png to {arguments.output}")


def _measure(pattern: ms.Pattern, dtype: torch.dtype, side: int, *, with_peers: bool) -> Iterator[Row]:
    generator = torch.Generator(_DEVICE).manual_seed(0)
    weights = torch.randn(side, side, device=_DEVICE, generator=generator).to(dtype)
    target = torch.empty_like(weights)
    copy = milliseconds(lambda: target.copy_(weights))
    optimum = solve_on_device(weights, pattern)
    best = _kept(weights, optimum.masks)
    name = str(dtype).removeprefix("torch.")

    def row(
        solver: str, time: float, masks: Tensor | None, *, exact: bool = False, solved_on_cpu: int | None = None
    ) -> Row:
        kept_importance = None if masks is None else _kept(weights, masks) / best
        certified = _certified(weights, masks, pattern) if masks is not None and exact else None
        return Row(str(pattern), name, side, solver, time, time / copy, kept_importance, certified, solved_on_cpu)

    yield row("copy", copy, None)
    time = milliseconds(lambda: solve_on_device(weights, pattern))
    yield row("exact", time, optimum.masks, exact=True, solved_on_cpu=optimum.solved_on_cpu)
    if optimum.potentials is not None:
        noise = torch.randn(weights.shape, device=_DEVICE, generator=generator)
        moved = (weights.float() * (1 + 1e-3 * noise)).to(dtype)
        time = milliseconds(lambda: solve_on_device(moved, pattern, potentials=optimum.potentials))
        yield row("exact, warm", time, None)
    if side > PEER_SIDE or not with_peers:
        return
    with mock.patch.object(device, "_solver", return_value=batched_operations):
        batched = solve_on_device(weights, pattern)
        time = milliseconds(lambda: solve_on_device(weights, pattern))
    yield row("exact, batched PyTorch", time, batched.masks, exact=True, solved_on_cpu=batched.solved_on_cpu)
    if dtype != PEER_DTYPE:
        return
    for peer in peers.of(pattern):
        time = milliseconds(lambda solve=peer.solve: solve(weights, pattern), repeats=3)
        yield row(peer.name, time, peer.solve(weights, pattern))


def _kept(weights: Tensor, masks: Tensor) -> float:
    return float((weights.abs() * masks).sum(dtype=torch.float64))


def _certified(weights: Tensor, masks: Tensor, pattern: ms.Pattern) -> str:
    rows = max(pattern.m, _CERTIFIED_WEIGHTS // weights.shape[1] // pattern.m * pattern.m)
    some, mask = weights[:rows].float().cpu().numpy(), masks[:rows].cpu().numpy()
    return "yes" if ms.certify(some, mask, pattern.n, pattern.m).optimal else "NO"


def _print(rows: list[Row]) -> None:
    facts = describe(torch.get_num_threads())
    print(f"device: {torch.cuda.get_device_name()}, driver {_driver()}, CUDA {torch.version.cuda}")
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    columns = ("pattern", "dtype", "solver", "side", "ms", "copies", "kept importance", "certified", "solved on CPU")
    cells = [
        [
            row.pattern,
            row.dtype,
            row.solver,
            str(row.side),
            significant(row.milliseconds),
            significant(row.copies),
            "-" if row.kept_importance is None else f"{row.kept_importance:.6f}",
            row.certified or "-",
            "-" if row.solved_on_cpu is None else str(row.solved_on_cpu),
        ]
        for row in rows
    ]
    print(f"\n{aligned(columns, cells)}")


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _draw(rows: list[Row], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 7), layout="constrained")
    dtype = rows[0].dtype
    for solver, line in (("exact", "-"), ("exact, warm", "--"), ("copy", ":")):
        for n, m in PATTERNS:
            some = [row for row in rows if (row.solver, row.pattern, row.dtype) == (solver, f"{n}:{m}", dtype)]
            if some and (solver != "copy" or m == PATTERNS[0][1]):
                label = solver if solver == "copy" else f"{solver}, {n}:{m}"
                axes.plot([row.side for row in some], [row.milliseconds for row in some], line, marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="rows and columns", ylabel="ms", title=f"{dtype}: weights to mask")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
