"""How many cores there are to use. It imports no NumPy, which reads once how many threads it may have."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """The cores this process may run on, which containers and `taskset` make fewer than the machine's."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
