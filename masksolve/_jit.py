"""Compile every kernel of the package, and keep the code on disk.

Kernels use parts of Numba that are not public (`_numba_internals`), and the default method emits machine code of its
own (`_methods/exact/codegen`). With the environment variable MASKSOLVE_PLAIN_NUMBA=1 they use neither: everything is
compiled by Numba's public API alone, in every process again, and the inner loops are plain Numba
(`_methods/exact/plain`). Masks and potentials are the same, bit for bit. Where a version of Numba lacks what is relied
on, or does not compile the machine code, that happens by itself, with a warning of the logger `masksolve`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numba

PLAIN_VARIABLE = "MASKSOLVE_PLAIN_NUMBA"

_logger = logging.getLogger("masksolve")


def _asks_for_plain_numba() -> bool:
    value = os.environ.get(PLAIN_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(
            f"the environment variable {PLAIN_VARIABLE} is {value!r}: set it to 1 to compile with Numba's public API "
            "alone, to 0 or not at all otherwise"
        )
    return value == "1"


def _import_internals() -> ModuleType | None:
    if _asks_for_plain_numba():
        return None
    try:
        from masksolve import _numba_internals
    except (ImportError, AttributeError) as error:
        _warn_of_plain_numba(error)
        return None
    return _numba_internals


def _warn_of_plain_numba(error: Exception) -> None:
    _logger.warning(
        "solving in plain Numba, which takes longer to compile and to run: Numba %s is not as expected: %s",
        numba.__version__,
        error,
    )


# None where kernels are to be compiled without them.
internals: Any = _import_internals()


def go_on_in_plain_numba(error: Exception) -> None:
    """Compile every kernel that is yet to be defined by Numba's public API alone, and log why."""
    global internals
    internals = None
    _warn_of_plain_numba(error)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function on its first call, to run without the GIL, and keep the code on disk.

    Without the GIL, because tiles are split over Python threads: Numba's own parallel layers abort when two threads
    enter them at once or after a fork. Where no folder for the code can be written, it is compiled again in every
    process.
    """
    dispatcher: Any = numba.njit(nogil=True)(function)
    if internals is not None:
        internals.keep_on_disk(dispatcher, function)
    return dispatcher


def inner_kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that only kernels call, and that allots no memory, into each of them.

    It has none of what Python would need to call it, is not kept on its own, and counts no references to its arrays,
    which would take as long as the rest: whoever calls the kernel holds them.
    """
    njit: Any = numba.njit  # whose type hints lack these flags
    return njit(nogil=True, **({} if internals is None else internals.INNER_FLAGS))(function)
