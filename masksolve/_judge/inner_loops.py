"""The judge's functions: as machine code where the solver's are, in plain Numba otherwise."""

from __future__ import annotations

from typing import Any

# Importing them says whether there is machine code.
import masksolve._methods.exact.inner_loops  # noqa: F401
from masksolve import _translated

if not _translated.has_machine_code:
    from masksolve._judge import plain

    functions: Any = plain
else:
    from masksolve._judge import codegen

    functions = codegen

program, prove, weigh, differ = functions.program, functions.prove, functions.weigh, functions.differ
