"""The inner loops of equilibration: as machine code where that can be had, in plain Numba otherwise.

Both have the same functions: `program` makes the functions of `Code` for a pattern, which `unpack` finds in it, and
`call` calls one of them; `narrow_program` and `narrow_call` do so for 16-bit integers.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from masksolve import _translated
from masksolve._machine_code import parsed, stored


def _import_inner_loops() -> tuple[ModuleType, ModuleType]:
    if _translated.has_machine_code:
        try:
            from masksolve._methods.exact import codegen
            from masksolve._methods.exact.narrow import codegen as narrow_codegen

            def read_the_least() -> bytes:
                # Of all patterns: whatever LLVM has against the code, it has it here.
                parsed(codegen.write_module, (1, 2, 4, 4), "1:2")
                parsed(narrow_codegen.write_module, (1, 2, 2, False, False, 4), "1 of each line of 2x2")
                return b"read"

            # Kept on disk, like code, that LLVM has read it.
            stored("least", read_the_least)
        except Exception as error:
            _translated.go_on_in_plain_numba(error)
        else:
            return codegen, narrow_codegen
    # Only now: how its functions are compiled, and those that call them, depends on it.
    from masksolve._methods.exact import plain
    from masksolve._methods.exact.narrow import plain as narrow_plain

    return plain, narrow_plain


_loops: Any
_narrow_loops: Any
_loops, _narrow_loops = _import_inner_loops()
program, call = _loops.program, _loops.call
narrow_program, narrow_call = _narrow_loops.program, _narrow_loops.call
