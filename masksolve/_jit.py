"""How every kernel of the package is compiled and kept on disk, and how one is run without compiling."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
from numba.core.caching import FunctionCache
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher

try:
    import fcntl as _locks
except ImportError:  # Windows has none of the kind, and refuses to overwrite a file that is being read
    _locks: Any = None  # type: ignore[no-redef]

if hasattr(os, "register_at_fork"):
    # A child that is forked while a thread compiles would wait for that thread, which it does not have.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function on its first call, to run without the GIL, and keep the code on disk.

    Without the GIL, because tiles are split over Python threads: Numba's own parallel layers abort when two threads
    enter them at once or after a fork. Where no folder for the code can be written, it is compiled anew in every
    process.
    """
    dispatcher: Any = numba.njit(nogil=True)(function)
    with suppress(RuntimeError, OSError):
        dispatcher._cache = _Cache(function)
    return dispatcher


def inner_kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that only kernels call, and that allots no memory, into each of them.

    It has none of what Python would need to call it, is not kept on its own, and counts no references to its arrays,
    which would take as long as the rest: whoever calls the kernel holds them.
    """
    njit: Any = numba.njit  # whose type hints lack these flags
    return njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True, _nrt=False)(function)


class _Cache(FunctionCache):
    """Numba's cache, in which one process at a time writes, and which knows the files that a kernel is made of.

    Numba numbers the files of a function's signatures without a lock: of two processes that compile different ones
    at the same moment, one may write its code into the file that the other has just listed as its own. And it takes
    code for fresh as long as the function's own file is the same, whatever has become of kernels that are called.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file._source_stamp = [_digest(file) for file in sorted(_files_of(function.__globals__))]

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError), _only_process(os.path.join(self.cache_path, "masksolve.lock")):
            super().save_overload(sig, data)


def _files_of(scope: dict[str, Any]) -> set[str]:
    """The file of a module, this one, and those of the modules whose kernels it has imported."""
    files = {__file__, scope["__file__"]}
    for value in scope.values():
        if isinstance(value, CPUDispatcher) and value.py_func.__globals__ is not scope:
            files |= _files_of(value.py_func.__globals__)
    return files


@cache
def _digest(file: str) -> bytes:
    return hashlib.sha256(Path(file).read_bytes()).digest()


def stored(beside: Callable[..., Any], name: str, made_of: bytes, make: Callable[[], bytes]) -> bytes:
    """Machine code that make() compiles, kept on disk where a kernel's would be while `made_of` is the same."""
    try:
        folder = _Cache(beside).cache_path
    except (RuntimeError, OSError):
        return make()
    path = os.path.join(folder, f"{name}-{hashlib.sha256(made_of).hexdigest()[:16]}.o")
    with suppress(OSError), open(path, "rb") as file:
        checksum, code = file.read(_CHECKSUM), file.read()
        if hashlib.sha256(code).digest() == checksum:
            return code
    code = make()
    with suppress(OSError):
        os.makedirs(folder, exist_ok=True)
        # Other processes that compile the same at the same moment put the same in its place.
        part = f"{path}.{os.getpid()}"
        with open(part, "wb") as new:
            new.write(hashlib.sha256(code).digest() + code)
        os.replace(part, path)
    return code


_CHECKSUM = hashlib.sha256().digest_size


@contextmanager
def _only_process(path: str) -> Iterator[None]:
    with open(path, "w") as file:
        if _locks is not None:
            # Closing the file gives the lock back.
            _locks.flock(file, _locks.LOCK_EX)
        yield


def interpreted(function: Any) -> Callable[..., Any]:
    """The same kernel run by the Python interpreter, with the kernels it calls: for object arrays of Python ints."""
    code = function.py_func
    scope = {
        name: interpreted(value) if isinstance(value, CPUDispatcher) and value is not function else value
        for name, value in code.__globals__.items()
        if name in code.__code__.co_names or name == "__builtins__"
    }
    return FunctionType(code.__code__, scope, code.__name__, code.__defaults__, code.__closure__)
