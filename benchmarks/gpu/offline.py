"""Compilation of the kernels for a GPU that need not be there, through Triton's launcher, and their machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import masksolve as ms
from masksolve._tiles import Region, regions
from masksolve.torch._solver import kernels as kernel
from masksolve.torch._solver.device import _tiles
from masksolve.torch._solver.direct_4x4 import halves, is_direct
from masksolve.torch._solver.fixed_point import stages_for

HOPPER = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Compiled:
    """One variant of a kernel: its PTX, its instructions in order, and the resources that it takes of a multiprocessor.

    `setup`, `round` and `finish` are the instructions of one thread: before the rounds, in each round with an attempt
    at a proof, and after them. A kernel without rounds has `setup` alone.
    """

    name: str
    ptx: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    setup: tuple[str, ...]
    round: tuple[str, ...]
    finish: tuple[str, ...]


def compile_variants(
    pattern: ms.Pattern, dtype: torch.dtype, *, saturated: bool = True, ragged: bool = False, every_stage: bool = False
) -> list[Compiled]:
    """Compile the kernels that whole or ragged matrices launch: the first for each shape of tiles, or all."""
    side = 32 * pattern.m + (pattern.m - 1 if ragged else 0)
    weights = torch.zeros(side, side, dtype=dtype)
    masks = torch.empty(side, side, dtype=torch.bool)
    variants = []
    with recorded_launches() as kernels:
        for region in regions(side, side, pattern, "both", saturated):
            tiles, mask_tiles = _tiles(weights, region), _tiles(masks, region)
            count = tiles.shape[:3].numel()
            potentials = torch.empty(count, region.tile_shape[1])
            launches: list[tuple[str, Callable[[], object]]] = []
            if is_direct(region.tile_shape, region.margins, tiles):
                launches.append(("directly", partial(kernel.solve_directly, tiles, mask_tiles, halves(pattern.n))))
            for index, stage in enumerate(stages_for(*region.tile_shape, region.margins)):
                which = torch.arange(count) if launches else None
                solve = partial(kernel.solve_stage, tiles, mask_tiles, potentials, which, stage, index > 0)
                launches.append((f"stage {index + 1}", solve))
            for what, launch in launches if every_stage else launches[:1]:
                launch()
                name = f"{pattern} {_shape(region)} {str(dtype).removeprefix('torch.')} {what}"
                variants.append(_read(kernels[-1], f"{name}{'' if saturated else ' at most'}"))
    return variants


def _shape(region: Region) -> str:
    return "x".join(map(str, region.tile_shape))


@contextmanager
def recorded_launches() -> Iterator[list[Any]]:
    """Compile launches for Hopper, and record them instead of running them."""
    if not isinstance(kernel._solve, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set, so that nothing is compiled; unset it and start again")
    launched: list[Any] = []
    active = mock.Mock()
    active.get_current_target.return_value = HOPPER
    active.get_current_device.return_value = 0
    active.get_current_stream.return_value = 0
    active.utils.load_binary.return_value = (1, 1, 0, 0, 1024)
    active.utils.get_device_properties.return_value = {"max_shared_mem": 1 << 17}
    compiled = triton.compiler.CompiledKernel

    def run(kernel: Any) -> Any:
        return lambda *_: launched.append(kernel)

    with mock.patch.object(driver, "_active", active), mock.patch.object(compiled, "run", property(run)):
        yield launched


def _read(kernel: Any, name: str) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(binary))
        assembly = _tool("nvdisasm", "-c", str(binary))
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    setup, loop, finish = _sections(assembly)
    return Compiled(
        name=name,
        ptx=kernel.asm["ptx"],
        registers=numbers["REG"],
        spilled_bytes=numbers["STACK"] + numbers["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        setup=setup,
        round=loop,
        finish=finish,
    )


def _tool(name: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _sections(assembly: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the instructions before the loop, in it, and after it up to the exit; those behind are for rare cases."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in assembly.splitlines():
        label = re.match(r"\s*(\.L\w+):", line)
        code = re.match(r"\s+(?:/\*\w+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", line)
        if label:
            labels[label[1]] = len(instructions)
        elif code:
            target = re.search(r"\((\.L\w+)\)", line)
            if code[1] == "BRA" and target:
                jumps.append((len(instructions), target[1]))
            instructions.append(code[1])
    end = max(index for index, code in enumerate(instructions) if code == "EXIT") + 1
    back = [(labels[target], index) for index, target in jumps if labels[target] <= index < end]
    if not back:
        return tuple(instructions[:end]), (), ()
    first, last = min(start for start, _ in back), max(index for _, index in back) + 1
    return tuple(instructions[:first]), tuple(instructions[first:last]), tuple(instructions[last:end])
