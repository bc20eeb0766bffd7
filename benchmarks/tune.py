"""Measure tuned constants again: `python -m benchmarks.tune --list`, `python -m benchmarks.tune --constant NAME`.

Masks are proven after the fact, so these constants decide about time alone. Each value is tried in a process of its
own, and the processes solve in turn.
"""

from __future__ import annotations

import argparse
import inspect
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.environment import ROOT, header, pin_threads

# Names of constants, by the module in which they stand. Tables have a row for each size of tiles.
_CONSTANTS = {
    "masksolve._methods.exact.equilibrate": (
        *("_ROUNDS", "_RELAXATIONS", "_PERTURBED_ROUNDS", "_PERTURBED_RELAXATIONS"),
        *("_FIRST_PASS", "_LATER_PASSES", "_TIES", "_COARSE_TIES", "_WARM_ROUNDS"),
    ),
    "masksolve._methods.exact.narrow.passes": ("_WORTH_TRYING", "_WORTH_REFINING", "_TOO_FEW_TO_TELL"),
    "masksolve._methods.exact.lanes": ("FEW", "STRAGGLERS", "FULL_OF_ZEROS"),
    "masksolve._methods.exact.strict": ("_PATIENCE", "_NEARLY_ALL", "_TIED_GROUPS"),
    "masksolve._methods.exact.perturbed": ("_COARSE_GRID", "_ZERO_DELTA", "_REFINE"),
    "masksolve._methods.exact.augment": ("_LEADING_BITS", "_LARGEST_OF_LEADING_BITS"),
    "masksolve._methods.exact": (
        *("_WEIGHTS_IN_PLACE", "_WEIGHTS_IN_LINES", "_WEIGHTS_IN_LARGE_TILES", "_BYTES_CONVERTED"),
        *("_WEIGHTS_ONE_BY_ONE", "_FEW_WEIGHTS"),
    ),
    "masksolve._threads": ("_CHUNK_WEIGHTS",),
    "masksolve.torch._solver.batched": ("_CHUNK_ON_CPU", "_CHUNK_ELSEWHERE"),
}
# What `stages_for` returns, by the size of tiles and the number of the stage; tiles of 4x4 are solved without rounds.
_STAGES = "masksolve.torch._solver.fixed_point"
_STAGE_FIELDS = ("first", "every", "last", "relaxation", "spread", "coarse", "least")
_STAGE_SIZES = (8, 16, 32)
_PATTERNS = {4: (2, 4), 8: (4, 8), 16: (8, 16), 32: (16, 32), 64: (32, 64), 128: (64, 128)}
_SIDE = 1024
_REPEATS = 15


@dataclass(frozen=True)
class Constant:
    """A tuned constant: its module, its name there, and the row and field that it is of a table."""

    module: str
    name: str
    size: int | None = None
    field: str | None = None
    stage: int | None = None

    def __str__(self) -> str:
        number = "" if self.size is None else f"[{self.size}]"
        stage = "" if self.stage is None else f"[{self.stage}]"
        field = "" if self.field is None else f".{self.field}"
        return f"{self.module.rpartition('.')[2]}.{self.name}{number}{stage}{field}"

    @property
    def where(self) -> str:
        """File and line."""
        lines, first = inspect.getsourcelines(import_module(self.module))
        starts = (f"{self.name} =", f"def {self.name}(")
        line = next(number for number, line in enumerate(lines, max(first, 1)) if line.startswith(starts))
        return f"{Path(str(import_module(self.module).__file__)).relative_to(ROOT)}:{line}"

    @property
    def value(self) -> float:
        """Today's value."""
        found: Any = getattr(import_module(self.module), self.name)
        if self.stage is not None:
            found = _stages(found, self.size)[self.stage]
        elif self.size is not None:
            found = found[self.size]
        return found if self.field is None else getattr(found, self.field)

    def set(self, value: float) -> None:
        """Change the value in this process, before anything is solved; kernels see what their own module holds."""
        module = import_module(self.module)
        held: Any = getattr(module, self.name)
        if self.stage is not None:
            _set_stage(module, held, self, value)
        elif self.size is not None:
            held[self.size] = value if self.field is None else held[self.size]._replace(**{self.field: value})
        else:
            for other in [each for name, each in sys.modules.items() if name.startswith("masksolve")]:
                if vars(other).get(self.name) is held and (other is module or not self.name.startswith("_")):
                    setattr(other, self.name, value)

    @property
    def is_compiled(self) -> bool:
        """Whether kernels are compiled with the value."""
        return self.size is None and self.module.rpartition(".")[2] in (
            "augment",
            "lanes",
            "strict",
            "perturbed",
            "passes",
        )

    def candidates(self) -> list[float]:
        """Values around today's: powers of two by factors of two, others in small steps."""
        value = self.value
        if value and (value < 0.01 or value >= 512):
            return [type(value)(value * factor) for factor in (0.25, 0.5, 2, 4)]
        if isinstance(value, int):
            return [value + step for step in (-2, -1, 1, 2) if value + step >= (self.field in (None, "patience"))]
        return [round(value + step, 3) for step in (-0.1, -0.05, 0.05, 0.1)]


def constants() -> Iterator[Constant]:
    """Every tuned constant."""
    for module, names in _CONSTANTS.items():
        for name in names:
            value = getattr(import_module(module), name)
            if not isinstance(value, dict):
                yield Constant(module, name)
                continue
            for size, row in value.items():
                for field in getattr(row, "_fields", [None]):
                    yield Constant(module, name, size, field)
    for size in _STAGE_SIZES:
        for stage in range(2):
            for field in _STAGE_FIELDS:
                yield Constant(_STAGES, "stages_for", size, field, stage)


def _stages(stages_for: Callable[..., Any], size: int | None) -> Any:
    from masksolve._tiles import Margins

    assert size is not None
    return stages_for(size, size, Margins(size // 2, True, True))


def _set_stage(module: ModuleType, stages_for: Callable[..., Any], constant: Constant, value: float) -> None:
    from masksolve.torch._solver import device

    def changed(height: int, width: int, margins: Any) -> tuple[Any, ...]:
        stages = list(stages_for(height, width, margins))
        if max(height, width) == constant.size:
            stages[constant.stage or 0] = replace(stages[constant.stage or 0], **{str(constant.field): value})
        return tuple(stages)

    for holder in (module, device):
        setattr(holder, constant.name, changed)


def _calls(constant: Constant) -> dict[str, Callable[[], Any]]:
    """List what is timed: of the constant's size of tiles, or of all sizes, weights with one optimum and with many."""
    from benchmarks.families import random_matrix

    patterns = [pair for m, pair in _PATTERNS.items() if constant.size in (None, m) and (constant.size or m <= 32)]
    families = {
        "gaussian": True,
        "gaussian, at most n": False,
        "int8-valued": True,
        "int4-valued": True,
        "half-zero": True,
    }
    matrices = {family: random_matrix(family.partition(",")[0], _SIDE) for family in families}
    calls: dict[str, Callable[[], Any]] = {}
    for n, m in patterns:
        for family, saturated in families.items():
            calls[f"{n}:{m}, {family}"] = _solving(constant, matrices[family], n, m, saturated)
    return calls


def _solving(constant: Constant, matrix: Any, n: int, m: int, saturated: bool) -> Callable[[], Any]:
    if not constant.module.startswith("masksolve.torch"):
        import masksolve as ms

        return lambda: ms.solve_matrix(matrix, n, m, saturated=saturated, threads=1)
    import torch

    from masksolve import Pattern
    from masksolve.torch._solver.device import solve_on_device

    # On the CPU the same rounds run as PyTorch operations.
    tensor = torch.from_numpy(matrix).to("cuda" if torch.cuda.is_available() else "cpu")

    def solve() -> None:
        solve_on_device(tensor, Pattern(n, m), saturated=saturated)
        if tensor.is_cuda:
            torch.cuda.synchronize()

    return solve


def _work(constant: Constant, value: float | None, cache: str | None, connection: Connection) -> None:
    """Time calls by number, as they are asked for."""
    if cache is not None:
        os.environ["NUMBA_CACHE_DIR"] = cache  # before Numba is imported
    import_module("masksolve._methods.exact")  # every module that holds the constant has to be there
    if value is not None:
        constant.set(value)
    calls = list(_calls(constant).values())
    while (number := connection.recv()) is not None:
        start = time.perf_counter()
        calls[number]()
        connection.send(time.perf_counter() - start)


def sweep(constant: Constant, values: list[float], repeats: int = _REPEATS) -> list[tuple[float, dict[str, float]]]:
    """Return values, today's first, each with the least time of every call, as a share of today's."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for number, value in enumerate([None, *values]):
            # What is on the disk was compiled with another value.
            cache = str(Path(folder) / str(number)) if constant.is_compiled else None
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(constant, value, cache, theirs), daemon=True)
            process.start()
            theirs.close()
            workers.append((ours, process))
        names = list(_calls(constant))
        least = [dict.fromkeys(names, float("inf")) for _ in workers]
        # Once more than is counted: the first compiles.
        for repeat in range(repeats + 1):
            for number, name in enumerate(names):
                for (connection, _), times in zip(workers, least, strict=True):
                    connection.send(number)
                    seconds = connection.recv()
                    if repeat > 0:
                        times[name] = min(times[name], seconds)
        for connection, process in workers:
            connection.send(None)
            process.join()
    ratios = [{name: times[name] / least[0][name] for name in names} for times in least]
    return list(zip([constant.value, *values], ratios, strict=True))


def main() -> None:
    """List the constants, or time one of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="every constant, its value and where it stands")
    what.add_argument("--constant", metavar="NAME", help="time values of this one against today's")
    parser.add_argument("--values", metavar="V,V,...", help="the values to try (a few around today's)")
    parser.add_argument("--repeats", type=int, default=_REPEATS, help=f"times that each is timed ({_REPEATS})")
    arguments = parser.parse_args()
    pin_threads(1)
    from benchmarks.report import aligned, markdown

    by_name = {str(constant): constant for constant in constants()}
    if arguments.list:
        print(aligned(("constant", "today", "where"), [(n, f"{c.value:.6g}", c.where) for n, c in by_name.items()]))
        return
    if arguments.constant not in by_name:
        parser.error(f"there is no constant {arguments.constant!r}; --list names them")
    constant = by_name[arguments.constant]
    kind = type(constant.value)
    values = [kind(text) for text in arguments.values.split(",")] if arguments.values else constant.candidates()
    found = sweep(constant, values, arguments.repeats)
    columns = (str(constant), *found[0][1])
    rows = [[f"{value:.6g}", *(f"{ratio:.3f}" for ratio in ratios.values())] for value, ratios in found]
    print(f"Time against today's value, the first row; {constant.where}\n")
    print(f"{markdown(columns, rows)}\n\n{header(1)}")


if __name__ == "__main__":
    main()
