"""Compiling: kept on disk, safe when several processes start at once, and possible where nothing can be written."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from llvmlite import binding

from masksolve._jit import stored
from masksolve._methods._networks import selection_network
from masksolve._methods._vectors import VECTOR_BYTES, layout, new_vectors, target_machine, write_module
from tests import processes

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


def test_stored_code_is_used_again_only_if_it_is_whole_and_made_of_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    made: list[bytes] = []

    def get(made_of: bytes, code: bytes) -> bytes:
        def make() -> bytes:
            made.append(code)
            return code

        return stored(start, "vectors", made_of, make)

    assert [get(b"a", b"first"), get(b"a", b"unused"), get(b"b", b"other")] == [b"first", b"first", b"other"]
    assert made == [b"first", b"other"]
    for file in tmp_path.rglob("*.o"):
        file.write_bytes(file.read_bytes()[:-1])
    assert get(b"a", b"again") == get(b"a", b"unused") == b"again"
    assert made == [b"first", b"other", b"again"]
    # A function that lies in no file has no place for its code.
    assert stored(eval("lambda: 0"), "vectors", b"a", lambda: b"not kept") == b"not kept"


def test_a_kernel_is_compiled_anew_when_one_that_it_calls_has_changed(tmp_path: Path) -> None:
    script = """
import sys
sys.path.insert(0, sys.argv[1])
from caller import doubled
print(doubled(), sum(doubled.stats.cache_hits.values()))
"""
    callee = "from masksolve._jit import inner_kernel\n@inner_kernel\ndef number():\n    return {}\n"
    (tmp_path / "caller.py").write_text(
        "from masksolve._jit import kernel\nfrom callee import number\n"
        "@kernel\ndef doubled():\n    return 2 * number()\n"
    )
    printed = []
    for number in (1, 1, 3, 3):
        (tmp_path / "callee.py").write_text(callee.format(number))
        # Python's own cache goes by the second.
        printed.append(processes.run(script, tmp_path, NUMBA_CACHE_DIR=str(tmp_path), PYTHONDONTWRITEBYTECODE="1"))
    assert printed == ["2 0\n", "2 1\n", "6 0\n", "6 1\n"]


@pytest.mark.parametrize(("n", "m", "itemsize"), [(2, 4, 4), (3, 7, 4), (8, 16, 4), (4, 8, 8)])
def test_selection_is_packed_min_and_max_alone(n: int, m: int, itemsize: int) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("the instructions' names are those of x86-64")
    machine = target_machine()
    module = binding.parse_assembly(write_module(n, m, itemsize, itemsize))
    assembly = machine.emit_assembly(module).split("\nmove_rows:")[1].split(".size")[0]
    kind = "ps" if itemsize == 4 else "pd"
    packed = len(re.findall(rf"\bv?(?:min|max){kind}\b", assembly))
    assert packed == len(selection_network(n, m).steps)
    assert not re.search(r"\bv?(?:min|max)s[sd]\b", assembly)


@pytest.mark.parametrize("processor", ["x86-64", "haswell", "skylake-avx512"])
def test_masks_of_every_size_can_be_stored_on_every_kind_of_processor(processor: str, tmp_path: Path) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("the processors are of x86-64")
    # In a process of its own: LLVM ends the process where it cannot compile.
    script = f"""
from llvmlite import binding, ir
from masksolve._methods import _vectors

binding.initialize_native_target()
binding.initialize_native_asmprinter()
target = binding.Target.from_default_triple()
machine = target.create_target_machine(cpu={processor!r}, features="", opt=3, jit=True)
for m in range(2, 65):
    for itemsize in (4, 8):
        module = ir.Module()
        function = ir.Function(module, _vectors._PROTOTYPE, "store")
        builder = ir.IRBuilder(function.append_basic_block())
        _vectors._Writer(builder, function.args, 1, m, itemsize, False).store()
        builder.ret_void()
        machine.emit_object(binding.parse_assembly(str(module)))
print("compiled")
"""
    assert processes.run(script, tmp_path) == "compiled\n"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("m", [4, 7, 8, 16, 32])
def test_no_vector_lies_in_two_lines_of_the_cache(m: int, dtype: type) -> None:
    itemsize = np.dtype(dtype).itemsize
    for _ in range(4):
        for vectors in new_vectors(m, itemsize):
            assert vectors.ctypes.data % VECTOR_BYTES == 0
            assert vectors.nbytes == layout(m, itemsize).size * VECTOR_BYTES


def test_the_cores_that_a_process_may_use_are_counted() -> None:
    script = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from masksolve._methods._chunks import usable_cores
print(usable_cores())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
