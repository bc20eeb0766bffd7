"""IEEE arithmetic, which every proof relies on, whatever mode the calling thread is in.

A library linked with -ffast-math, or `torch.set_flush_denormal(True)`, makes a thread take subnormal numbers for
zero. Weights that are subnormal then look alike, and rounding is not monotone where differences are flushed.
"""

from __future__ import annotations

import ctypes
import sys
from types import TracebackType

_SMALLEST_NORMAL = sys.float_info.min
_HALF_AN_ULP = 2.0**-53
# An fenv_t takes 32 bytes or less wherever this runs.
_ENVIRONMENT_BYTES = 64
# <fenv.h>: FE_DFL_ENV of glibc and musl; Windows: the bits that say what becomes of subnormal numbers, and rounding.
_DEFAULT_ENVIRONMENT = ctypes.c_void_p(-1)
_DENORMAL_AND_ROUNDING = 0x03000300


class IeeeArithmetic:
    """Context manager: in its body, this thread rounds to nearest and keeps subnormal numbers.

    Costs a tenth of a microsecond where that is so anyway. The mode is put back at the end.

    Raises
    ------
    RuntimeError
        If the mode is another one and cannot be changed on this platform.
    """

    _saved: ctypes.Array[ctypes.c_char] | int | None = None

    def __enter__(self) -> None:
        if _is_ieee(_SMALLEST_NORMAL, _HALF_AN_ULP):
            return
        self._saved = _set_default()
        if not _is_ieee(_SMALLEST_NORMAL, _HALF_AN_ULP):
            _restore(self._saved)
            raise RuntimeError(
                "this thread flushes subnormal numbers to zero or does not round to nearest, and masksolve cannot "
                "change that on this platform; turn it off, as by torch.set_flush_denormal(False), before solving"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._saved is not None:
            _restore(self._saved)


def _is_ieee(smallest_normal: float, half_an_ulp: float) -> bool:
    """Return whether Python's own arithmetic, on this thread, is. Numbers are arguments, or they would be folded."""
    # 1 + half an ulp is a tie, to even; upwards it would be more, and 1 - half an ulp is a float.
    return smallest_normal * 0.5 > 0.0 and 1.0 + half_an_ulp == 1.0 and 1.0 - half_an_ulp * 0.25 == 1.0


def _set_default() -> ctypes.Array[ctypes.c_char] | int:
    """Set the thread's default mode; return what `_restore` takes."""
    if sys.platform == "win32":
        control = ctypes.CDLL("ucrtbase")._controlfp
        was: int = control(0, 0)
        control(0, _DENORMAL_AND_ROUNDING)
        return was
    library = ctypes.CDLL(None)
    saved = ctypes.create_string_buffer(_ENVIRONMENT_BYTES)
    library.fegetenv(saved)
    if sys.platform == "darwin":
        library.fesetenv(ctypes.byref(ctypes.c_char.in_dll(library, "_FE_DFL_ENV")))
    else:
        library.fesetenv(_DEFAULT_ENVIRONMENT)
    return saved


def _restore(saved: ctypes.Array[ctypes.c_char] | int) -> None:
    if isinstance(saved, int):
        ctypes.CDLL("ucrtbase")._controlfp(saved, _DENORMAL_AND_ROUNDING)
    else:
        ctypes.CDLL(None).fesetenv(saved)
