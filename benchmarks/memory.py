"""Measures the peak memory of a call beyond what it is given and returns: Linux's account of this process."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_beyond_result(work: Callable[[], NDArray[np.bool_]]) -> int | None:
    """Bytes that work held at its peak beyond those resident before and those of the array it returns.

    None where the system does not report it. Call work once before, so that code it loads does not count.
    """
    try:
        _give_back_free_memory()
        _CLEAR.write_text("5")  # the peak starts again from what is resident now
        before = _status("VmRSS")
        result = work()
        return _status("VmHWM") - before - result.nbytes
    except OSError:
        return None


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _give_back_free_memory() -> None:
    library = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
