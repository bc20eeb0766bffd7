"""Everything of Numba that the package uses beyond its public API: its cache on disk, its lock, its compiler flags.

Importing this raises ImportError, naming the parts that are missing, where a version of Numba has moved one of them;
`_jit` then compiles without them. `tests/test_numba_internals.py` fails for the same parts, by the same names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import is_jitted

try:
    import fcntl as _locks
except ImportError:  # Windows has none of the kind, and refuses to overwrite a file that is being read
    _locks: Any = None  # type: ignore[no-redef]


# No wrappers for Python, none of the code that counts references, and inlined whatever LLVM thinks of it.
INNER_FLAGS = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": True, "_nrt": False}


def _probe() -> None:
    """Do nothing: a function to make a dispatcher of; it is never compiled."""


def _takes(flag: str) -> Callable[[], bool]:
    dispatcher: Any = numba.njit(_probe)
    return lambda: hasattr(dispatcher.targetdescr.options, flag)


# Each part that is relied on, by its name, and whether it is where it is expected.
RELIED_ON: dict[str, Callable[[], bool]] = {
    "numba.core.caching.FunctionCache.cache_path": lambda: hasattr(FunctionCache, "cache_path"),
    "numba.core.caching.FunctionCache.save_overload": lambda: callable(getattr(FunctionCache, "save_overload", None)),
    "numba.core.caching.FunctionCache(...)._cache_file": lambda: (
        "_cache_file" in FunctionCache.__init__.__code__.co_names
    ),
    "numba.core.caching.IndexDataCacheFile(...)._source_stamp": lambda: hasattr(
        IndexDataCacheFile("", "", None), "_source_stamp"
    ),
    "numba.njit(...)._cache": lambda: hasattr(numba.njit(_probe), "_cache"),
    "numba.core.compiler_lock.global_compiler_lock.acquire": lambda: callable(
        getattr(global_compiler_lock, "acquire", None)
    ),
    "numba.core.compiler_lock.global_compiler_lock.release": lambda: callable(
        getattr(global_compiler_lock, "release", None)
    ),
    **{f"numba.njit(..., {flag}=...)": _takes(flag) for flag in INNER_FLAGS},
}


def _holds(is_there: Callable[[], bool]) -> bool:
    try:
        return is_there()
    except Exception:  # whatever a part that is no longer what it was may raise
        return False


if _missing := [name for name, is_there in RELIED_ON.items() if not _holds(is_there)]:
    raise ImportError(f"Numba {numba.__version__} has no {', '.join(_missing)}")

if hasattr(os, "register_at_fork"):
    # A child that is forked while a thread compiles would wait for that thread, which it does not have.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


def keep_on_disk(dispatcher: Any, function: Callable[..., Any]) -> None:
    """Let a kernel keep its code on disk, where a folder for it can be written."""
    with suppress(RuntimeError, OSError):
        dispatcher._cache = _Cache(function)


def cache_folder(function: Callable[..., Any]) -> str | None:
    """Return the folder in which a kernel's code would be kept; None where none can be written."""
    try:
        folder: str = _Cache(function).cache_path
    except (RuntimeError, OSError):
        return None
    return folder


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
    """Return the file of a module, those that say how it is compiled, and those of modules whose kernels it imports."""
    files = {__file__, str(Path(__file__).with_name("_jit.py")), scope["__file__"]}
    for value in scope.values():
        if is_jitted(value) and value.py_func.__globals__ is not scope:
            files |= _files_of(value.py_func.__globals__)
    return files


@cache
def _digest(file: str) -> bytes:
    return hashlib.sha256(Path(file).read_bytes()).digest()


@contextmanager
def _only_process(path: str) -> Iterator[None]:
    with open(path, "w") as file:
        if _locks is not None:
            # Closing the file gives the lock back.
            _locks.flock(file, _locks.LOCK_EX)
        yield
