"""Timing on a CUDA device."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def milliseconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Measure the median time of a call, from an idle device until it is idle again, after a warm-up that compiles."""
    run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)
