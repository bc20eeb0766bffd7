"""Compiling: kept on disk, safe when several processes start at once, and possible where nothing can be written."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from llvmlite import binding

import masksolve as ms
from masksolve import _machine_code as machine_code
from masksolve._machine_code import VECTOR_BYTES, stored, target_machine
from masksolve._methods.exact.codegen import write_module
from masksolve._methods.exact.layout import layout, new_vectors
from masksolve._networks import selection_network
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
    assert list(tmp_path.rglob("solve_exactly-*.o"))


def test_where_nothing_can_be_written_code_is_compiled_but_not_kept() -> None:
    # Root may write anywhere, so that permissions would not do.
    script = """
import os, sys
from numba.core import caching

def refuse(*arguments, **options):
    raise OSError("read-only file system")

caching._CacheLocator.ensure_cache_path = os.makedirs = os.replace = refuse
os.access = lambda *arguments: False

import masksolve as ms
# In machine code of our own, and in Numba's.
assert ms.solve_block([[3.0, 1.0], [1.0, 3.0]], 1, 2).tolist() == [[True, False], [False, True]]
assert ms.is_valid_mask(ms.random_mask(16, 32), 16, 32)
"""
    assert processes.run(script, NUMBA_CACHE_DIR="") == ""


def test_code_is_kept_beside_the_package_or_in_the_user_s_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = Path(machine_code.__file__).with_name("__pycache__")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert machine_code.cache_folder() == str(tmp_path / "masksolve")
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    assert machine_code.cache_folder() == str(beside)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine_code.cache_folder() == str(tmp_path / "masksolve")


def test_stored_code_is_used_again_only_if_it_is_whole_and_made_of_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    made: list[bytes] = []

    def get(source: bytes, code: bytes) -> bytes:
        def make() -> bytes:
            made.append(code)
            return code

        monkeypatch.setattr(machine_code, "_sources", lambda: source)
        return stored("vectors", make)

    assert [get(b"a", b"first"), get(b"a", b"unused"), get(b"b", b"other")] == [b"first", b"first", b"other"]
    assert made == [b"first", b"other"]
    for file in tmp_path.rglob("*.o"):
        file.write_bytes(file.read_bytes()[:-1])
    assert get(b"a", b"again") == get(b"a", b"unused") == b"again"
    assert made == [b"first", b"other", b"again"]


def test_all_that_writes_machine_code_is_what_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(machine_code.__file__).parent
    read = Path.read_bytes
    files: set[str] = set()

    def recorded(path: Path) -> bytes:
        files.add(path.relative_to(package).as_posix())
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", recorded)
    digest = machine_code._sources.__wrapped__()
    # Every module that the solver and the judge have loaded, and no other folder's.
    ms.certify(np.eye(4), ms.solve_matrix(np.eye(4), 2, 4), 2, 4)
    loaded = {Path(str(module.__file__)) for name, module in sys.modules.items() if name.startswith("masksolve._")}
    assert {path.relative_to(package).as_posix() for path in loaded} - files == set()

    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "_networks.py"))
    assert machine_code._sources.__wrapped__() != digest

    def refuse(path: Path) -> bytes:
        raise OSError

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert machine_code._sources.__wrapped__() is None
    monkeypatch.setattr(machine_code, "_sources", lambda: None)
    assert stored("vectors", lambda: b"not kept") == b"not kept"


def test_machine_code_on_the_disk_is_bounded_and_what_was_used_last_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(machine_code, "STORED_BYTES", 5000)

    def get(number: int) -> bytes:
        return stored(f"vectors-{number}", lambda: bytes(900))

    def kept() -> set[str]:
        return {file.name.rsplit("-", 1)[0] for file in tmp_path.rglob("*.o")}

    get(0)
    (folder,) = {file.parent for file in tmp_path.rglob("*.o")}
    (folder / "kernel-1.py311.1.nbc").write_bytes(bytes(9000))
    (folder / "vectors-of-an-older-version.o").write_bytes(bytes(900))
    # A process that was killed has left this.
    (folder / "vectors-7-0.o.123").write_bytes(bytes(900))
    for age, file in enumerate(folder.iterdir()):
        os.utime(file, (1000 + age, 1000 + age))
    for number in range(1, 9):
        get(number)
        get(0)
    assert kept() == {f"vectors-{number}" for number in (0, 5, 6, 7, 8)}
    assert not list(folder.glob("*.123"))
    assert (folder / "kernel-1.py311.1.nbc").exists()


def test_a_cache_that_vanishes_or_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))

    def get(number: int) -> bytes:
        def make() -> bytes:
            # Another process removes everything while this one compiles.
            for folder in tmp_path.iterdir():
                shutil.rmtree(folder)
            return bytes(number)

        return stored(f"vectors-{number}", make)

    assert [get(1), get(2)] == [bytes(1), bytes(2)]

    def refuse(*arguments: object) -> None:
        raise PermissionError

    for name in ("remove", "utime", "scandir", "replace"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(machine_code, "STORED_BYTES", 0)
    for number in (2, 3):
        assert stored(f"vectors-{number}", functools.partial(bytes, number)) == bytes(number)


@processes.X86_64
@pytest.mark.parametrize(("n", "m", "itemsize"), [(2, 4, 4), (3, 7, 4), (8, 16, 4), (4, 8, 8)])
def test_selection_is_packed_min_and_max_alone(n: int, m: int, itemsize: int) -> None:
    machine = target_machine()
    module = binding.parse_assembly(write_module(n, m, itemsize, itemsize))
    assembly = machine.emit_assembly(module).split("\nmove_rows:")[1].split(".size")[0]
    kind = "ps" if itemsize == 4 else "pd"
    packed = len(re.findall(rf"\bv?(?:min|max){kind}\b", assembly))
    assert packed == len(selection_network(n, m).steps)
    assert not re.search(r"\bv?(?:min|max)s[sd]\b", assembly)


@processes.X86_64
@processes.EVERY_PROCESSOR
@processes.some_sizes([*range(2, 34), 63, 64, 65, 127, 128], [*range(34, 63), *range(66, 127)])
def test_masks_of_every_size_can_be_stored_on_every_kind_of_processor(processor: str, sizes: list[int]) -> None:
    modules = """
from masksolve._methods.exact import codegen

for m in sizes:
    for itemsize in (4, 8):
        module = ir.Module()
        function = ir.Function(module, codegen._PROTOTYPE, "store")
        builder = ir.IRBuilder(function.append_basic_block())
        codegen._Writer(builder, function.args, 1, m, itemsize, False).store()
        builder.ret_void()
        yield module
"""
    processes.compile_for(processor, sizes, modules)


TARGET = """
import re
from llvmlite import binding
from masksolve._machine_code import VECTOR_BYTES, compiler_identity, target_cpu, target_machine
from masksolve._methods.exact.codegen import write_module
assembly = target_machine().emit_assembly(binding.parse_assembly(write_module(1, 2, 4, 4)))
registers = [name for name in ("xmm", "ymm", "zmm") if re.search(rf"%{name}\\d", assembly)]
print(target_cpu().name, VECTOR_BYTES, registers[-1])
"""


@processes.X86_64
@pytest.mark.parametrize(
    ("name", "features", "expected"),
    [
        ("generic", None, "generic 32 xmm"),
        pytest.param("x86-64", "", "x86-64 32 xmm", marks=pytest.mark.slow),
        pytest.param("x86-64-v3", "", "x86-64-v3 32 ymm", marks=pytest.mark.slow),
        ("haswell", "", "haswell 32 ymm"),
        ("haswell", "-avx", "haswell 32 xmm"),
        ("x86-64", "+avx2", "x86-64 32 ymm"),
        ("x86-64", "+avx512f,+avx512vl", "x86-64 64 zmm"),
        pytest.param("x86-64-v4", "", "x86-64-v4 64 zmm", marks=pytest.mark.slow),
        ("skylake-avx512", "-avx512f", "skylake-avx512 32 ymm"),
    ],
)
def test_machine_code_is_for_the_cpu_that_numba_is_told(name: str, features: str | None, expected: str) -> None:
    told = {"NUMBA_CPU_NAME": name} | ({} if features is None else {"NUMBA_CPU_FEATURES": features})
    assert processes.run(TARGET, **told) == f"{expected}\n"


@processes.X86_64
def test_the_cache_keeps_code_for_several_cpus_apart(tmp_path: Path) -> None:
    script = """
import numpy as np
from masksolve._methods.exact.codegen import program
program(1, 4, 4, 4)
"""
    files: list[set[str]] = []
    for features in ("", "+avx", "", "+avx"):
        processes.run(script, NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES=features, NUMBA_CACHE_DIR=str(tmp_path))
        files.append({file.name for file in tmp_path.rglob("vectors-1-4-*.o")})
    assert [len(each) for each in files] == [1, 2, 2, 2]


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
from masksolve._cores import usable_cores
print(usable_cores())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
