"""Compile kernels by Numba, and keep their code on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function on its first call, to run without the GIL, and keep the code on disk.

    Without the GIL, because tiles are split over Python threads: Numba's own parallel layers abort when two threads
    enter them at once or after a fork. Where no folder for the code can be written, it is compiled again in every
    process. A kernel calls functions of its own file alone, and is always called with the same types: Numba's cache
    sees no other file change, and two processes that compile for different types at once disturb each other.
    """
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # Numba's, where it finds no folder
        return inner_kernel(function)


def inner_kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that only kernels call; its code is kept with theirs."""
    return numba.njit(nogil=True)(function)
