"""Count the least that a tile costs the exact solver, instead of timing it: `python -m benchmarks.bounds`.

The solver runs in the Python interpreter, which notes every call of the machine code that is compiled for the pattern.
How many instructions a call executes stands in the assembly: functions consist of loops over the lines of a tile or
over the tiles of a group. Set against them are the two vector instructions, two loads and one store, of 64 bytes each,
that Intel's server cores start in one clock at best. Left out are the scalar instructions, of a tile's bookkeeping and
of compiled Python, all waiting, and caches: at that clock less time is impossible, and twice as much would be no
surprise.
"""

from __future__ import annotations

import argparse
import ctypes
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import header, pin_threads
from benchmarks.marks import write_between_marks

_PATTERNS = ((2, 4), (4, 8), (8, 16), (16, 32))
_CASES = (("gaussian", True), ("gaussian", False), ("int8-valued", True))
_SIDE = 512
_KINDS = ("min/max", "vector", "loads", "stores", "spills")
_A_CLOCK = {"vector": 2, "loads": 2, "stores": 1}
# What the machine of the figures in docs/performance.md states; cores may run above it for a while.
_HERTZ = 2.6e9
# A function's name and instructions, and the loops in them.
_BODY = re.compile(r"^(\w+):\n\s*\.cfi_startproc\n(.*?)^\.Lfunc_end", re.MULTILINE | re.DOTALL)
_KERNELS = "masksolve._methods.exact."
_LOOP = re.compile(r"^\.LBB\w+:\n(.*?)\n\tj\w+\s+\.LBB\w+$", re.MULTILINE | re.DOTALL)
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_double)
_NARROW_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_int64] * 4)


@dataclass(frozen=True)
class Count:
    """A case, by tile: rounds, executed instructions by kind, and bytes of weights and mask."""

    case: str
    rounds: float
    instructions: Counter[str]
    bytes: int

    @property
    def clocks(self) -> float:
        """The least that the instructions take."""
        return max(self.instructions[kind] / each for kind, each in _A_CLOCK.items())


def main() -> None:
    """Count, print; or write the table into a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bounds", description=__doc__)
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="also put the table between the marks 'bounds' of FILE"
    )
    arguments = parser.parse_args()
    pin_threads(1)

    from benchmarks.report import markdown, significant

    rows = []
    for n, m in _PATTERNS:
        for family, saturated in _CASES:
            found = count(n, m, family, saturated)
            instructions = [significant(found.instructions[kind]) for kind in _KINDS]
            least = significant(found.clocks / _HERTZ * 1e9)
            rows.append([found.case, f"{found.rounds:.2f}", *instructions, str(found.bytes), least])
    columns = ("case", "rounds", *_KINDS, "bytes", f"ns at {_HERTZ / 1e9:g} GHz, at least")
    text = f"{markdown(columns, rows)}\n\n{header(1)}"
    print(text)
    if arguments.write:
        write_between_marks(arguments.write, "bounds", text)


def count(n: int, m: int, family: str, saturated: bool) -> Count:
    """Solve a matrix and count what a tile takes on average."""
    import masksolve as ms
    from benchmarks.families import random_matrix
    from masksolve._machine_code import VECTOR_BYTES
    from masksolve._methods.exact import equilibrate

    calls: Counter[tuple[int, str]] = Counter()
    narrow = ("solve_exactly", "solve_as_at_most", "solve_exactly_again")
    kernels = {name: getattr(equilibrate, name) for name in (*narrow, "equilibrate_strict", "equilibrate_perturbed")}
    for name, kernel in kernels.items():
        prefix = "clamped_" if name == "solve_as_at_most" else ""
        replaced = _replaced_narrow(calls, prefix) if name in narrow else _replaced(calls)
        setattr(equilibrate, name, _interpreted(kernel, replaced))
    try:
        ms.solve_matrix(random_matrix(family, _SIDE), n, m, saturated=saturated, threads=1)
    finally:
        for name, kernel in kernels.items():
            setattr(equilibrate, name, kernel)

    tiles = (_SIDE // m) ** 2
    instructions: Counter[str] = Counter()
    rounds = 0.0
    for itemsize in (2, 4, 8):
        called = {name for size, name in calls if size == itemsize}
        for name, each in functions_of(n, m, itemsize, called).items():
            times = calls[itemsize, name]
            instructions.update({kind: number * times / tiles for kind, number in each.items()})
            if name.endswith("move_rows"):
                # Of a tile, not of the group whose lanes it shares.
                rounds += times * (VECTOR_BYTES // itemsize) / tiles
    case = f"{n}:{m}, {family}" + ("" if saturated else ", at most n")
    return Count(case, rounds, instructions, m * m * (4 + 1))


def functions_of(n: int, m: int, itemsize: int, names: Collection[str]) -> dict[str, Counter[str]]:
    """Count the instructions, by kind, that one call of each of some functions for float32 weights executes.

    Numbers in lanes have 2, 4 or 8 bytes.
    """
    from masksolve._methods.exact.codegen import write_module
    from masksolve._methods.exact.narrow import codegen as narrow

    if itemsize > 2:
        bodies = _bodies(write_module(n, m, itemsize, 4))
        return {name: _instructions(body, [m]) for name, body in bodies if name in names}
    lanes = narrow.LANES
    store = [lanes] if m * m <= narrow.TILE_BY_TILE else [m, lanes]
    # How often loops of `fill` run is up to the tiles: it is not counted.
    times: dict[str, list[int] | None] = {
        "load": [m, lanes, lanes, m],
        "move_rows": [m],
        "move_columns": [m],
        "prove": store,
    }
    times |= {"load_perturbed": times["load"], "prove_perturbed": times["prove"], "store_filled": [m]}
    if m % 4 == 0:
        # Without potentials, sixteen tiles are measured and loaded at a time; the loops of other passes stand behind.
        times["load"] = [m] * (2 * lanes // 16) + [0] * 4
    if m == 4:
        # No loop: LLVM puts some of the ways to store masks behind jumps back. All are counted.
        times["prove"] = None
    # With clamps there is one way to load and to prove tiles of every size.
    clamped_times = {**times, "load": times["load_perturbed"], "prove": times["prove_perturbed"]}
    found = {}
    for prefix, clamp in (("", False), ("clamped_", True)):
        bodies = dict(_bodies(narrow.write_module(n, m, m, clamp, clamp, 4)))
        for name in [name for name in bodies if name in times and prefix + name in names]:
            found[prefix + name] = _instructions(bodies[name], (clamped_times if clamp else times)[name])
            if narrow.FIND_POTENTIALS in bodies[name]:
                found[prefix + name] += _instructions(bodies[narrow.FIND_POTENTIALS], [m, lanes])
    return found


def _bodies(module: str) -> list[tuple[str, str]]:
    from llvmlite import binding

    from masksolve._machine_code import target_machine

    return _BODY.findall(target_machine().emit_assembly(binding.parse_assembly(module)))


def _instructions(body: str, times: list[int] | None) -> Counter[str]:
    """Count the instructions of a function, of which each loop runs that often, or once; a function may have none."""
    parts = _LOOP.split(body)
    times = [1] * (len(parts) // 2) if times is None else times
    assert len(parts) in (1, 2 * len(times) + 1), "a loop that nobody knows"
    total: Counter[str] = Counter()
    for number, part in enumerate(parts):
        for line in part.splitlines():
            total.update(dict.fromkeys(_kinds_of(line), times[number // 2] if number % 2 else 1))
    return total


def _kinds_of(line: str) -> list[str]:
    """Return the kind of an instruction in AT&T syntax; its destination stands last."""
    code, _, operands = line.strip().partition("\t")
    if not code.startswith(("v", "k")) or code == "vzeroupper":
        return []
    kinds = []
    is_store = operands.endswith((")", "}")) and ")" in operands.rsplit(", %", 1)[-1]
    is_move = code.startswith("vmov")
    if "(" in operands:
        kinds.append("stores" if is_store else "loads")
        if "(%rsp)" in operands:
            kinds.append("spills")
    if not (is_move and "(" in operands):
        kinds.append("vector")
    if re.match(r"v(min|max)p[sd]$|vp(min|max)sw$", code):
        kinds.append("min/max")
    return kinds


def _replaced(calls: Counter[tuple[int, str]]) -> dict[str, Any]:
    """Return what takes the place of what calls machine code, and notes the calls."""
    from masksolve._methods.exact.layout import Code, Layout

    names: dict[int, str] = {}

    def unpack(program: Any) -> tuple[Code, Code, Layout, int, int]:
        numbers = [int(number) for number in program]
        functions, fields = len(Code._fields), len(Layout._fields)
        code, clamped = Code(*numbers[:functions]), Code(*numbers[functions : 2 * functions])
        for kind, prefix in ((clamped, "clamped_"), (code, "")):
            names.update({address: prefix + name for name, address in kind._asdict().items()})
        return code, clamped, Layout(*numbers[2 * functions :][:fields]), *numbers[-2:]

    def call(address: int, vectors: Any, a: int, b: int, c: int, x: float) -> None:
        calls[vectors.numbers.itemsize, names[address]] += 1
        _FUNCTION(address)(vectors.numbers.ctypes.data, int(a), int(b), int(c), float(x))

    return {"unpack": unpack, "call": call, "lowest_bit": lambda word: (int(word) & -int(word)).bit_length() - 1}


def _replaced_narrow(calls: Counter[tuple[int, str]], prefix: str) -> dict[str, Any]:
    """Return the same for 16-bit integers."""
    from masksolve._methods.exact.narrow.layout import LANES, Code, Layout

    names: dict[int, str] = {}

    def unpack(program: Any) -> tuple[Code, Layout]:
        numbers = [int(number) for number in program]
        code = Code(*numbers[: len(Code._fields)])
        names.update({address: prefix + name for name, address in code._asdict().items()})
        return code, Layout(*numbers[len(Code._fields) :])

    def call(address: int, memory: Any, a: int, b: int, c: int, d: int) -> None:
        calls[2, names[address]] += 1
        _NARROW_FUNCTION(address)(memory.ctypes.data, int(a), int(b), int(c), int(d))

    def lanes(address: int, kind: Any) -> NDArray[Any]:
        return np.frombuffer((ctypes.c_char * (LANES * np.dtype(kind).itemsize)).from_address(address), kind)

    def fill_lanes(address: int, first: int, step: int) -> None:
        lanes(address, np.int64)[:] = int(first) + int(step) * np.arange(LANES)

    def count_at_least(address: int, least: int) -> int:
        return int((lanes(address, np.int32) >= least).sum())

    return {"unpack": unpack, "call": call, "fill_lanes": fill_lanes, "count_at_least": count_at_least}


def _interpreted(kernel: Any, instead: dict[str, Any]) -> Callable[..., Any]:
    """Turn the kernel, and those that it calls, into Python functions, some of which are replaced."""
    from masksolve._translated import Constant

    scopes: dict[str, dict[str, Any]] = {}

    def scope_of(module: dict[str, Any]) -> dict[str, Any]:
        # One for each module, so that functions see the names of their own.
        name = module["__name__"]
        if name not in scopes:
            scopes[name] = {**module, **{key: value for key, value in instead.items() if key in module}}
            for key, value in scopes[name].items():
                if key not in instead and isinstance(value, FunctionType) and value.__module__.startswith(_KERNELS):
                    scopes[name][key] = FunctionType(value.__code__, scope_of(value.__globals__), key)
        return scopes[name]

    function = FunctionType(kernel.py_func.__code__, scope_of(kernel.py_func.__globals__))

    def run(*arguments: Any) -> Any:
        return function(*[each.array if isinstance(each, Constant) else each for each in arguments])

    return run


if __name__ == "__main__":
    main()
