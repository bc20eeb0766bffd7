"""The number of cores to use. This module does not import NumPy, which reads once how many threads it may have."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Return how many cores this process may run on, which containers and `taskset` make fewer than the machine's."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
