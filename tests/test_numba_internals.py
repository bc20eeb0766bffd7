"""What is relied on beyond Numba's public API: all of it named in one table, and where it is expected."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import numba
import pytest

import masksolve
from masksolve._numba_internals import RELIED_ON
from tests import processes

PACKAGE = Path(masksolve.__file__).parent


@pytest.mark.parametrize("name", RELIED_ON)
def test_what_is_relied_on_is_where_it_is_expected(name: str) -> None:
    assert RELIED_ON[name](), (
        f"Numba {numba.__version__} has moved {name}, which masksolve/_numba_internals.py relies on"
    )


def test_only_the_table_s_module_imports_private_parts_of_numba() -> None:
    # Modules and names that Numba's documentation tells users to import.
    public = {"numba", "numba.types", "numba.extending"}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            found |= {(path.name, name) for name in modules if name.startswith("numba.") and name not in public}
    assert {file for file, _ in found} == {"_numba_internals.py"}
    assert all(any(name.startswith(module) for name in RELIED_ON) for _, module in found)


REMOVALS = {
    "numba.core.caching.FunctionCache.save_overload": (
        "for kind in FunctionCache.__mro__: remove(kind, 'save_overload')"
    ),
    "numba.njit(..., _nrt=...)": (
        "for kind in numba.njit(lambda: 0).targetdescr.options.__mro__: remove(kind, '_nrt')"
    ),
    "global_compiler_lock": "remove(numba.core.compiler_lock, 'global_compiler_lock')",
}


@pytest.mark.parametrize("name", REMOVALS)
def test_what_a_version_of_numba_has_moved_is_named_once_and_done_without(name: str) -> None:
    script = f"""
import logging, sys
import numba.core.compiler_lock
from numba.core.caching import FunctionCache
def remove(owner, name):
    if name in vars(owner):
        delattr(owner, name)
{REMOVALS[name]}
logging.basicConfig(stream=sys.stdout, format="%(name)s %(levelname)s: %(message)s")
import masksolve._methods.exact.strict
from masksolve import _jit
from masksolve._methods.exact import inner_loops, plain
assert _jit.internals is None and inner_loops.call is plain.call
"""
    printed = processes.run(script).splitlines()
    assert len(printed) == 1
    assert printed[0].startswith("masksolve WARNING: solving in plain Numba")
    assert name in printed[0]


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
    project = PACKAGE.parent / "pyproject.toml"
    requirements = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    (required,) = [each for each in requirements if each.startswith("numba")]
    bounds = re.fullmatch(r"numba>=(\d+)\.(\d+)\.\d+,<(\d+)\.(\d+)", required)
    assert bounds, f"{required} has no upper bound"
    lowest, highest = (int(bounds[1]), int(bounds[2])), (int(bounds[3]), int(bounds[4]))
    assert lowest <= numba.version_info[:2] < highest
