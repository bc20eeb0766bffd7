"""Machine code: the CPU that it is made for, and where it is kept on disk.

What Numba takes from its environment variables holds here, too: NUMBA_CPU_NAME, NUMBA_CPU_FEATURES, NUMBA_CACHE_DIR.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
from llvmlite import binding, ir
from numpy.typing import NDArray

PLAIN_VARIABLE = "MASKSOLVE_PLAIN_NUMBA"

# What all machine code in a folder takes together: that of a hundred patterns or so.
STORED_BYTES = 16 << 20

_CHECKSUM = hashlib.sha256().digest_size
_IS_CODE = re.compile(r"\.o(\.\d+)?$")


class Cpu(NamedTuple):
    """A CPU as LLVM knows it: its name, and what it has beyond or lacks, as in "+avx2,-avx512f"."""

    name: str
    features: str


@cache
def target_cpu() -> Cpu:
    """Return the CPU that this runs on, unless NUMBA_CPU_NAME or NUMBA_CPU_FEATURES say otherwise, as for Numba."""
    name, features = _told_cpu()
    return Cpu(
        binding.get_host_cpu_name() if name is None else name, _host_features() if features is None else features
    )


def _told_cpu() -> tuple[str | None, str | None]:
    name = os.environ.get("NUMBA_CPU_NAME") or None
    return name, os.environ.get("NUMBA_CPU_FEATURES", "" if name == "generic" else None)


def _host_features() -> str:
    try:
        features: str = binding.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM knows them of some architectures only
        return ""
    return features


def target_machine() -> binding.TargetMachine:
    """Return what compiles for the target CPU; a new one each time, for an execution engine takes it over."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    cpu, features = target_cpu()
    return binding.Target.from_default_triple().create_target_machine(cpu=cpu, features=features, opt=3, jit=True)


def _vector_bytes() -> int:
    if _told_cpu() == (None, None):
        has_avx512 = "+avx512f" in target_cpu().features.split(",")
    else:
        # Only LLVM knows what the name of a CPU stands for, and what a feature brings along.
        sum_of_two = "define <16 x float> @f(<16 x float> %a, <16 x float> %b) {{\n{}\nret <16 x float> %c\n}}"
        module = binding.parse_assembly(sum_of_two.format("%c = fadd <16 x float> %a, %b"))
        has_avx512 = "zmm" in target_machine().emit_assembly(module)
    # On narrower machines the networks would spill their registers to memory.
    return 64 if has_avx512 else 32


VECTOR_BYTES = _vector_bytes()


def compiler_identity() -> bytes:
    """Return what machine code depends on beyond its source: the versions of the compiler, and the target CPU."""
    return repr((llvmlite.__version__, binding.llvm_version_info, target_machine().triple, target_cpu())).encode()


def address_of(array: NDArray[Any]) -> int:
    """Return where an array's first entry lies; it is found sooner than by `array.ctypes`."""
    address: int = array.__array_interface__["data"][0]
    return address


def pointer_to(kind: ir.Type) -> ir.Type:
    """Return a pointer type: without a target from LLVM 17 on; llvmlite 0.44, with LLVM 15, reads typed ones."""
    return ir.PointerType() if binding.llvm_version_info >= (17,) else kind.as_pointer()


# One thread at a time compiles. A child that is forked in between would wait for that thread, which it does not have.
lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


def new_engine(
    write: Callable[..., str], arguments: tuple[int, ...], name: str, what_for: str
) -> binding.ExecutionEngine:
    """Return the owner of the machine code of the LLVM IR write(*arguments), which lives as long as the owner does.

    The code is kept on disk, under this name.
    """

    def compiled() -> bytes:
        code: bytes = target_machine().emit_object(parsed(write, arguments, what_for))
        return code

    return engine_of(stored("-".join(map(str, (name, *map(int, arguments)))), compiled))


def parsed(write: Callable[..., str], arguments: tuple[int, ...], what_for: str) -> binding.ModuleRef:
    """Return the LLVM IR write(*arguments), as LLVM reads it."""
    try:
        return binding.parse_assembly(write(*arguments))
    except RuntimeError as error:
        raise RuntimeError(
            f"LLVM {'.'.join(map(str, binding.llvm_version_info))} does not read the code for {what_for}; "
            f"with the environment variable {PLAIN_VARIABLE}=1 none is needed"
        ) from error


def engine_of(code: bytes) -> binding.ExecutionEngine:
    """Return the owner of machine code, linked, which lives as long as the owner does."""
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), target_machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


@cache
def _sources() -> bytes | None:
    """Return a digest of all that writes machine code; None where that cannot be read, as in an archive."""
    package = Path(__file__).parent
    try:
        files = [*package.glob("*.py"), *package.glob("_judge/*.py"), *package.glob("_methods/**/*.py")]
        read = [file.read_bytes() for file in sorted(files)]
    except OSError:
        return None
    return hashlib.sha256(b"".join(read)).digest() if read else None


def cache_folder() -> str | None:
    """Return the folder for machine code: NUMBA_CACHE_DIR, beside the package, or the user's; None if none will do."""
    told = os.environ.get("NUMBA_CACHE_DIR")
    if told:
        return os.path.join(told, "masksolve")
    package = os.path.dirname(__file__)
    beside = os.path.join(package, "__pycache__")
    if os.access(beside if os.path.isdir(beside) else package, os.W_OK):
        return beside
    if sys.platform == "win32":
        user = os.environ.get("LOCALAPPDATA")
    elif sys.platform == "darwin":
        user = os.path.expanduser("~/Library/Caches")
    else:
        user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(user, "masksolve") if user else None


def stored(name: str, make: Callable[[], bytes]) -> bytes:
    """Return the machine code that make() compiles, kept on disk while all that writes machine code is the same."""
    folder, sources = cache_folder(), _sources()
    if folder is None or sources is None:
        return make()
    made_of = sources + compiler_identity() + name.encode()
    path = os.path.join(folder, f"{name}-{hashlib.sha256(made_of).hexdigest()[:16]}.o")
    with suppress(OSError), open(path, "rb") as file:
        checksum, code = file.read(_CHECKSUM), file.read()
        if hashlib.sha256(code).digest() == checksum:
            with suppress(OSError):
                os.utime(path)  # the files used longest ago are removed first
            return code
    code = make()
    with suppress(OSError):
        os.makedirs(folder, exist_ok=True)
        # Other processes that compile the same at the same moment put the same in its place.
        part = f"{path}.{os.getpid()}"
        with open(part, "wb") as new:
            new.write(hashlib.sha256(code).digest() + code)
        os.replace(part, path)
        _remove_oldest(folder)
    return code


def _remove_oldest(folder: str) -> None:
    """Remove the machine code that was used longest ago, whatever it is made of, until the rest takes STORED_BYTES."""
    kept = 0
    for _, size, path in sorted(_files_of_code(folder), reverse=True):
        kept += size
        if kept > STORED_BYTES:
            # Another process may have removed it, or, on Windows, be reading it.
            with suppress(OSError):
                os.remove(path)


def _files_of_code(folder: str) -> Iterator[tuple[float, int, str]]:
    """Return when each file was used last, its size and its path, those that a process left half written included."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if _IS_CODE.search(entry.name):
                with suppress(OSError):
                    status = entry.stat()
                    yield status.st_mtime, status.st_size, entry.path
