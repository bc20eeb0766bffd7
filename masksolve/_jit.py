"""How every kernel of the package is compiled, and how one is run without compiling."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import numba
from numba.core.registry import CPUDispatcher

# nogil: tiles are split over Python threads, because Numba's own parallel layers abort when two threads enter them
# at once or after a fork.
kernel = numba.njit(nogil=True, cache=True)


def interpreted(function: Any) -> Callable[..., Any]:
    """The same kernel run by the Python interpreter, with the kernels it calls: for object arrays of Python ints."""
    code = function.py_func
    scope = {
        name: interpreted(value) if isinstance(value, CPUDispatcher) and value is not function else value
        for name, value in code.__globals__.items()
        if name in code.__code__.co_names or name == "__builtins__"
    }
    return FunctionType(code.__code__, scope, code.__name__, code.__defaults__, code.__closure__)
