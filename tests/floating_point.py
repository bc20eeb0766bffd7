"""Floating-point modes that a library may leave a thread in, for tests."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

# Where <fenv.h> keeps the control register, and its bits: by architecture, on Linux.
_REGISTERS = {"x86_64": 28, "aarch64": 0}
_BITS = {
    "x86_64": {"flush to zero": 0x8000, "subnormals are zero": 0x0040, "both": 0x8040, "upwards": 0x4000},
    "aarch64": {"flush to zero": 1 << 24, "subnormals are zero": 1 << 24, "both": 1 << 24, "upwards": 1 << 22},
}
MODES = list(_BITS["x86_64"])


def set_mode(name: str) -> None:
    """Leave this thread in a mode; skip the test where it is not known how."""
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in _REGISTERS:
        pytest.skip("the control register is known on Linux for x86-64 and aarch64 only")
    start = _REGISTERS[machine]
    environment = ctypes.create_string_buffer(64)
    library = ctypes.CDLL(None)
    library.fegetenv(environment)
    register = int.from_bytes(environment.raw[start : start + 4], "little") | _BITS[machine][name]
    environment[start : start + 4] = register.to_bytes(4, "little")
    library.fesetenv(environment)


def is_default() -> bool:
    """Whether arithmetic on this thread is IEEE's: seen from Python, whose floats are C's."""
    tiny, one = float.fromhex("0x1p-1022"), 1.0
    return tiny / 2 > 0 and one + 2.0**-60 == one


@contextmanager
def mode(name: str) -> Iterator[None]:
    """This thread in a mode, and as it was afterwards."""
    library, saved = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    library.fegetenv(saved)
    set_mode(name)
    try:
        assert not is_default()
        yield
        assert not is_default(), "the mode was not put back"
    finally:
        library.fesetenv(saved)
