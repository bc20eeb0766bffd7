"""Pruning checkpoints larger than memory, beside a plain copy of the same files: `python -m benchmarks.checkpoints`."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import OUTPUT, describe, header, pin_threads

_FOLDER = Path("build/checkpoints")
_SHARD_BYTES = 5 << 30
_BLOCK = 1 << 24
_RESERVE = 2 << 30


@dataclass(frozen=True)
class Cell:
    """One thing done to one checkpoint; memory is that of all its processes together, at its peak."""

    checkpoint: str
    what: str
    workers: int
    seconds: float
    bytes_a_second: float
    times_copy: float | None
    rss: int | None
    pss: int | None


def main() -> None:
    """Make the checkpoints one by one, measure, remove them; print and save the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__)
    parser.add_argument(
        "--parameters", type=float, default=1e9, help="of the sharded checkpoint, in bfloat16; 0: none (1e9)"
    )
    parser.add_argument("--tensor", type=float, default=1.0, help="GiB of the one tensor of the other; 0: none (1)")
    parser.add_argument("--pattern", default="4:8")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, default=_FOLDER, help="where there is room for the files")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the CSV and JSON files")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="also put the table between the marks 'checkpoints' of FILE"
    )
    arguments = parser.parse_args()
    pin_threads(1)

    from benchmarks import report
    from benchmarks.marks import write_between_marks

    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    room = (shutil.disk_usage(folder).free - _RESERVE) // 2
    layers = max(1, round((min(arguments.parameters, room / 2) - _OUTSIDE) / _A_LAYER))
    side = 1 << 14
    cases: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    if arguments.tensor > 0:
        cases[f"one tensor of {arguments.tensor:g} GiB"] = [("w", (math.ceil(arguments.tensor * 2**29 / side), side))]
    if arguments.parameters > 0:
        parameters = layers * _A_LAYER + _OUTSIDE
        cases[f"{parameters / 1e9:.2f} billion parameters"] = list(_decoder(layers))
    cells = []
    for name, shapes in cases.items():
        cells += measure(name, shapes, folder, arguments.pattern, arguments.workers)
    text = f"{report.markdown(*table(cells))}\n\n{arguments.pattern}, bfloat16.\n\n{header(1)}"
    print(text)
    if arguments.write:
        write_between_marks(arguments.write, "checkpoints", text)
    paths = report.save(arguments.output, "checkpoints", describe(1), cells)
    print(f"\nwrote {', '.join(map(str, paths))}")


# The matrices of a decoder with 4096 features, of which 32 layers are 8 billion parameters.
_LAYER = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
    "input_layernorm": (4096,),
}
_A_LAYER = sum(map(math.prod, _LAYER.values()))
_VOCABULARY = (128256, 4096)
_OUTSIDE = 2 * math.prod(_VOCABULARY)


def _decoder(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", _VOCABULARY
    for layer in range(layers):
        for name, shape in _LAYER.items():
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "lm_head.weight", _VOCABULARY


def write_checkpoint(folder: Path, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> int:
    """Write bfloat16 tensors of Gaussian weights in shards with an index; returns all bytes."""
    import numpy as np

    rng = np.random.default_rng(0)
    # Drawn once; every tensor begins somewhere else in it.
    block = (rng.standard_normal(_BLOCK, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in shapes:
        if shards[-1] and size + 2 * math.prod(shape) > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += 2 * math.prod(shape)
    folder.mkdir()
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        position = 0
        entries = {}
        for name, shape in tensors:
            stop = position + 2 * math.prod(shape)
            entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, stop]}
            weight_map[name] = file_name
            position = stop
        text = json.dumps(entries).encode()
        with (folder / file_name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, shape in tensors:
                left = math.prod(shape)
                while left:
                    start = int(rng.integers(_BLOCK // 2))
                    part = block[start : start + left]
                    file.write(part.tobytes())
                    left -= len(part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(file.stat().st_size for file in folder.iterdir())


def measure(
    name: str, shapes: Sequence[tuple[str, tuple[int, ...]]], folder: Path, pattern: str, workers: Sequence[int]
) -> list[Cell]:
    """Copy, prune and check one checkpoint, with the input read from the disk each time; leaves nothing."""
    source, target = folder / "in", folder / "out"
    for old in (source, target):
        shutil.rmtree(old, ignore_errors=True)
    print(f"measuring: {name}", file=sys.stderr, flush=True)
    nbytes = write_checkpoint(source, shapes)
    try:
        _forget(source)
        start = time.perf_counter()
        _copy(source, target)
        copy = time.perf_counter() - start
        cells = [Cell(name, "plain copy, on the disk", 1, copy, nbytes / copy, 1.0, None, None)]
        for count in workers:
            command = [sys.executable, "-m", "masksolve"]
            options = ["--pattern", pattern, "--workers", str(count)]
            shutil.rmtree(target)
            _forget(source)
            cells.append(
                _timed(name, "prune", count, nbytes, copy, [*command, "prune", source, "--output", target, *options])
            )
            _forget(target)
            cells.append(_timed(name, "check", count, nbytes, copy, [*command, "check", target, *options]))
        return cells
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)


def _timed(name: str, what: str, workers: int, nbytes: int, copy: float, command: Sequence[object]) -> Cell:
    start = time.perf_counter()
    with subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        memory = _Memory(process.pid)
        _, err = process.communicate()
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        raise SystemExit(f"{what} failed: {err.decode().splitlines()[-1]}")
    rss, pss = memory.peaks()
    return Cell(name, what, workers, seconds, nbytes / seconds, seconds / copy, rss, pss)


class _Memory:
    """Watches the memory of a process and all its children: resident, and with shared pages counted once."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._rss = self._pss = 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def peaks(self) -> tuple[int | None, int | None]:
        """Return the two peaks in bytes, once the process has ended; None where the system does not say."""
        self._thread.join()
        return self._rss or None, self._pss or None

    def _watch(self) -> None:
        try:
            import psutil
        except ImportError:
            return
        while True:
            rss = pss = 0
            try:
                process = psutil.Process(self._pid)
                for each in [process, *process.children(recursive=True)]:
                    held = each.memory_full_info()
                    rss += held.rss
                    pss += getattr(held, "pss", held.uss)
            except psutil.NoSuchProcess:
                if not psutil.pid_exists(self._pid):
                    return
                continue
            except psutil.Error:
                return
            self._rss, self._pss = max(self._rss, rss), max(self._pss, pss)
            time.sleep(0.05)


def _copy(source: Path, target: Path) -> None:
    """Copy the files, and wait until they are on the disk, as the pruned files are."""
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as copied:
            os.fsync(copied.fileno())


def _forget(folder: Path) -> None:
    """Ask the system to drop the files from its cache, so that they are read from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, for people."""
    columns = ["checkpoint", "what", "workers", "s", "MB/s", "times the copy", "peak RSS, MiB", "peak PSS, MiB"]
    rows = [
        [
            cell.checkpoint,
            cell.what,
            str(cell.workers),
            f"{cell.seconds:.1f}",
            f"{cell.bytes_a_second / 1e6:.0f}",
            f"{cell.times_copy:.2f}",
            *("n/a" if held is None else f"{held / 2**20:.0f}" for held in (cell.rss, cell.pss)),
        ]
        for cell in cells
    ]
    return columns, rows


if __name__ == "__main__":
    main()
