"""The inner loops of equilibration: as machine code where that can be had, in plain Numba otherwise.

Both have the same two functions: `program` makes the functions of `Code` for a pattern, which `unpack` finds in it, and
`call` calls one of them.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from masksolve import _jit


def _import_inner_loops() -> ModuleType:
    if _jit.internals is not None:
        try:
            from masksolve._methods.exact import codegen

            # The least of all patterns: whatever LLVM has against the code, it has it here.
            codegen.program(1, 2, 4, 4)
        except Exception as error:
            _jit.go_on_in_plain_numba(error)
        else:
            return codegen
    # Only now: how its functions are compiled, and those that call them, depends on it.
    from masksolve._methods.exact import plain

    return plain


_loops: Any = _import_inner_loops()
program, call = _loops.program, _loops.call
