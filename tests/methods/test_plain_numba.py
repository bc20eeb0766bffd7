"""Solving in plain Numba: the same masks and potentials, bit for bit; and what is relied on of Numba."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numba
import numpy as np
import pytest

import masksolve as ms
from tests import processes
from tests.tables import FAMILIES, PATTERNS, Pair, name_of, weights_of

# With a row of more than one word.
EQUILIBRATED = [*((n, m) for n, m in PATTERNS if n < m), (33, 66)]
LARGE_TILES = ["gaussian float32", "gaussian float64", "int8", "half zero"]


def solutions(pattern: Pair, families: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Digests of the masks and potentials of families of weights, cold and warm, under both readings."""
    n, m = pattern
    for family in families:
        # Enough tiles for some to be deferred, and for groups that are not full.
        weights = weights_of(family, (9 * m, 5 * m))
        for saturated in (True, False):
            cold = ms.solve_matrix(weights, n, m, saturated=saturated, return_potentials=True, threads=1)
            start = np.random.default_rng(1).permutation(cold[1].ravel()).reshape(cold[1].shape)
            warm = ms.solve_matrix(
                weights, n, m, saturated=saturated, potentials=start, return_potentials=True, threads=1
            )
            # Partial tiles of all shapes, at the edges.
            ragged = ms.solve_matrix(weights[1:, : -(m // 2)], n, m, saturated=saturated, threads=1)
            digest = hashlib.sha256(b"".join(array.tobytes() for array in (*cold, *warm, ragged))).hexdigest()
            yield f"{name_of(pattern)}, {family}, {'exactly' if saturated else 'at most'} n", digest


def all_solutions() -> dict[str, str]:
    """Those of every family whose tiles equilibration solves: others take seconds if large, by the same kernels."""
    return dict(
        solution
        for pattern in EQUILIBRATED
        for solution in solutions(pattern, FAMILIES if pattern[1] <= 16 else LARGE_TILES)
    )


@pytest.mark.slow
def test_masks_and_potentials_are_the_same_in_plain_numba() -> None:
    # Compiling takes more time than a script of `processes.run` has.
    script = """
import json
from masksolve import _translated
from masksolve._methods.exact import inner_loops, plain
from tests.methods.test_plain_numba import all_solutions
assert not _translated.has_machine_code and inner_loops.call is plain.call
print(json.dumps(all_solutions()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "MASKSOLVE_PLAIN_NUMBA": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == all_solutions()


def test_plain_numba_writes_no_machine_code_of_ours() -> None:
    script = """
import sys
import masksolve as ms
from masksolve import _machine_code
_machine_code.stored = _machine_code.engine_of = None
import masksolve._methods.exact
ms.solve_block([[1, 2], [2, 1]], 1, 2, method="greedy")
print("masksolve._methods.exact.codegen" in sys.modules)
"""
    assert processes.run(script, MASKSOLVE_PLAIN_NUMBA="1") == "False\n"


@pytest.mark.parametrize("value", ["yes", "2"])
def test_the_variable_for_plain_numba_is_0_or_1(value: str) -> None:
    script = """
try:
    import masksolve._translated
except ValueError as error:
    print(error)
"""
    printed = processes.run(script, MASKSOLVE_PLAIN_NUMBA=value)
    assert printed.startswith(f"the environment variable MASKSOLVE_PLAIN_NUMBA is {value!r}: set it to 1 ")


def test_numba_is_used_by_its_public_api_alone_and_not_by_the_default_method() -> None:
    package = Path(ms.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            found |= {name for name in modules if name.split(".")[0] == "numba"}
    # What Numba's documentation tells users to import.
    assert found == {"numba", "numba.extending"}
    script = """
import sys
import numpy as np
import masksolve as ms
weights = np.arange(35.0).reshape(5, 7)
for options in ({}, {"saturated": False}, {"direction": "rows"}):
    mask = ms.solve_matrix(weights, 2, 4, **options)
    assert ms.certify(weights, mask, 2, 4, **options).optimal
print("numba" in sys.modules)
"""
    assert processes.run(script) == "False\n"


def test_code_that_llvm_does_not_read_is_done_without_and_said_once(tmp_path: Path) -> None:
    script = """
import logging, sys
from llvmlite import binding
parse = binding.parse_assembly
def refuse_vector_code(text, *context):
    if "move_rows" in text:
        raise RuntimeError("LLVM IR parsing error: expected type")
    return parse(text, *context)
binding.parse_assembly = refuse_vector_code
logging.basicConfig(stream=sys.stdout, format="%(name)s %(levelname)s: %(message)s")
from masksolve._methods.exact import inner_loops, plain
assert inner_loops.call is plain.call
"""
    printed = processes.run(script, NUMBA_CACHE_DIR=str(tmp_path)).splitlines()
    assert len(printed) == 1
    assert printed[0].startswith("masksolve WARNING: solving in plain Numba")
    assert "does not read the code for 1:2" in printed[0]


def test_the_numba_that_is_installed_is_within_the_bounds() -> None:
    project = Path(ms.__file__).parents[1] / "pyproject.toml"
    requirements = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    (required,) = [each for each in requirements if each.startswith("numba")]
    bounds = re.fullmatch(r"numba>=(\d+)\.(\d+)\.\d+,<(\d+)\.(\d+)", required)
    assert bounds, f"{required} has no upper bound"
    lowest, highest = (int(bounds[1]), int(bounds[2])), (int(bounds[3]), int(bounds[4]))
    assert lowest <= numba.version_info[:2] < highest
