"""LEMON's network simplex in C++, the fastest other exact solver found: `lemon.cpp`, compiled here when first needed.

Needs a C++ compiler and LEMON's headers (Debian: `apt-get install g++ liblemon-dev`); importing this module without
them raises ImportError. The weights of a tile become integers of 40 bits in C++.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess

import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import OUTPUT, ROOT

_SOURCE = ROOT / "benchmarks" / "peers" / "lemon.cpp"


def solve(tiles: NDArray[np.float32], n: int) -> NDArray[np.bool_]:
    """Masks with exactly n ones in every line."""
    tiles = np.ascontiguousarray(tiles)
    masks = np.empty(tiles.shape, np.bool_)
    unsolved = _LIBRARY.solve_tiles(tiles.ctypes.data, masks.ctypes.data, len(tiles), tiles.shape[1], n)
    if unsolved:
        raise RuntimeError(f"LEMON left {unsolved} of {len(tiles)} tiles unsolved")
    return masks


def _build() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise ImportError("no C++ compiler; apt-get install g++ liblemon-dev")
    library = ROOT / OUTPUT / "lemon.so"
    if not library.exists() or library.stat().st_mtime < _SOURCE.stat().st_mtime:
        library.parent.mkdir(parents=True, exist_ok=True)
        # C++14: LEMON 1.3.1 uses what later standards dropped.
        flags = ["-std=c++14", "-O3", "-march=native", "-DNDEBUG", "-shared", "-fPIC"]
        done = subprocess.run([compiler, *flags, "-o", library, _SOURCE], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
            raise ImportError(f"lemon.cpp does not compile ({reason.strip()}); apt-get install liblemon-dev")
    loaded = ctypes.CDLL(str(library))
    loaded.solve_tiles.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    loaded.solve_tiles.restype = ctypes.c_long
    return loaded


_LIBRARY = _build()
