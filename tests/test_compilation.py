"""Compiling: kept on disk, safe when several processes start at once, and possible where nothing can be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOLVE_BOTH_DTYPES = """
import sys
import numpy as np
import masksolve as ms

dtypes = [np.float32, np.float64]
if int(sys.argv[1]) % 2:
    dtypes.reverse()
for dtype in dtypes:
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(dtype)
    w[:32] = np.rint(w[:32])
    for n, m in ((3, 8), (1, 4)):
        assert ms.certify(w, ms.solve_matrix(w, n, m), n, m).optimal
"""


def start(cache: object, number: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SOLVE_BOTH_DTYPES, str(number)],
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache)},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


@pytest.mark.slow
def test_processes_that_compile_at_the_same_moment_do_not_disturb_each_other(tmp_path: Path) -> None:
    for process in [start(tmp_path, number) for number in range(8)]:
        finish(process)
    # What they left on disk works, too.
    for number in range(2):
        finish(start(tmp_path, number))
    assert list(tmp_path.rglob("*.nbc"))


def test_where_nothing_can_be_written_code_is_compiled_but_not_kept() -> None:
    assert finish(start("/proc/no-such-folder", 0)) == ""
