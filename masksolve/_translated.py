"""Kernels that are translated to machine code (`_translate`), which need no Numba: it is not even imported.

With the environment variable MASKSOLVE_PLAIN_NUMBA=1 there is no machine code of our own: everything is compiled by
Numba's public API, in every process again, and the inner loops are plain Numba (`_methods/exact/plain`). Masks and
potentials are the same, bit for bit. Where LLVM does not compile the machine code, that happens by itself, with a
warning of the logger `masksolve`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import inspect
import logging
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
from llvmlite import binding, ir
from numpy.typing import NDArray

from masksolve._machine_code import PLAIN_VARIABLE, engine_of, lock, stored, target_machine
from masksolve._translate import ArrayType, Intrinsic, translate

_logger = logging.getLogger("masksolve")
_NAME = "kernel"


def _asks_for_plain_numba() -> bool:
    value = os.environ.get(PLAIN_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(
            f"the environment variable {PLAIN_VARIABLE} is {value!r}: set it to 1 to compile with Numba's public API "
            "alone, to 0 or not at all otherwise"
        )
    return value == "1"


# Whether there is to be machine code.
has_machine_code = not _asks_for_plain_numba()
_inner: list[Callable[..., Any]] = []


def go_on_in_plain_numba(error: Exception) -> None:
    """Compile every kernel by Numba, and log why; to be called before any is defined."""
    global has_machine_code
    has_machine_code = False
    _logger.warning("solving in plain Numba, which takes longer to compile and to run: %s", error)
    for function in _inner:
        function.__globals__[function.__name__] = inner(function)


def translated(function: Callable[..., Any]) -> Any:
    """Translate a function on its first call, to run without the GIL, and keep the code on disk.

    It takes integers, floats, bools, arrays, and plain tuples of these; its annotation says how many integers or bools
    it returns. What it calls are inner functions.
    """
    return _translated(function, vectorised=False)


def translated_with_vectors(function: Callable[..., Any]) -> Any:
    """Do as `translated`, and let LLVM turn loops into vector code, which takes it twice as long."""
    return _translated(function, vectorised=True)


def _translated(function: Callable[..., Any], vectorised: bool) -> Any:
    if has_machine_code:
        return _Kernel(function, vectorised)
    import numba

    return numba.njit(nogil=True)(function)


def inner(function: Callable[..., Any]) -> Any:
    """Let translated functions call a function: it is written out in each of them."""
    if has_machine_code:
        _inner.append(function)
        return function
    import numba

    return numba.njit(nogil=True)(function)


def intrinsic(emit: Callable[..., ir.Value | None]) -> Any:
    """Return a function for kernels that is machine code: emit(builder, *arguments) writes it.

    Arguments are integers, floats or bools, in LLVM's types; what it returns is an integer, or None, as annotated.
    """
    if has_machine_code:
        return Intrinsic(emit)
    from numba import types
    from numba.extending import intrinsic as numba_intrinsic

    parameters = list(inspect.signature(emit).parameters)[1:]
    returns = inspect.get_annotations(emit, eval_str=True)["return"] is not None

    def codegen(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        value = emit(builder, *arguments)
        return value if returns else context.get_dummy_value()

    def typed(typingctx: Any, *arguments: Any) -> tuple[Any, Any]:
        return (types.int64 if returns else types.void)(*arguments), codegen

    # Numba reads how many arguments there are from the signature.
    scope: dict[str, Any] = {"typed": typed}
    exec(f"def named(typingctx, {', '.join(parameters)}): return typed(typingctx, {', '.join(parameters)})", scope)
    return numba_intrinsic(scope["named"])


class _Kernel:
    """A translated function, compiled for the types of its arguments when they are first seen."""

    def __init__(self, function: Callable[..., Any], vectorised: bool) -> None:
        self.py_func, self._vectorised = function, vectorised
        self.__doc__, self.__name__, self.__module__ = function.__doc__, function.__name__, function.__module__
        returned = inspect.get_annotations(function, eval_str=True)["return"]
        self._returned: tuple[type, ...] = get_args(returned) or ((returned,) if returned is not None else ())
        self._results = struct.Struct(f"{len(self._returned)}q")
        self._compiled: dict[tuple[int, ...], tuple[Any, struct.Struct, Any, Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        return self.prepared(*arguments)()

    def prepared(self, *arguments: Any) -> Callable[[], Any]:
        """Return a call with these arguments."""
        numbers: list[float] = []
        kinds = []
        for argument in arguments:
            # Most are, and are looked at here, for small calls are made in loops.
            if type(argument) is Constant:
                numbers += argument.numbers
                kinds.append(argument.kind)
            else:
                kinds.append(_take(argument, numbers))
        signature = tuple(kinds)
        compiled = self._compiled.get(signature)
        if compiled is None:
            compiled = self._compile(signature, numbers)
        run, layout, block_type, _ = compiled
        block = block_type()
        layout.pack_into(block, 0, *numbers)
        returned, unpack, size = self._returned, self._results.unpack_from, layout.size
        are_integers = len(returned) > 1 and set(returned) == {int}

        def call() -> Any:
            run(block)
            found = unpack(block, size)
            if are_integers:
                return found
            if len(found) == 1:
                return returned[0](found[0])
            return tuple([kind(number) for kind, number in zip(returned, found, strict=True)]) or None

        return call

    def _compile(self, signature: tuple[int, ...], numbers: Sequence[float]) -> tuple[Any, struct.Struct, Any, Any]:
        with lock:
            if signature not in self._compiled:
                engine = engine_of(self._code(signature))
                run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address(_NAME))
                layout = struct.Struct("".join("d" if isinstance(each, float) else "q" for each in numbers))
                block = ctypes.c_char * (layout.size + 8 * len(self._returned))
                self._compiled[signature] = run, layout, block, engine
            return self._compiled[signature]

    def _code(self, signature: tuple[int, ...]) -> bytes:
        types = tuple(_as_translated(_kinds[number]) for number in signature)

        def compiled() -> bytes:
            return _compiled(translate(self.py_func, types, _NAME), self._vectorised)

        if not self.__module__.startswith(f"{__package__}."):
            return compiled()  # what is kept on disk is known to be made of the package's files
        digest = hashlib.sha256(repr((self.__module__, types)).encode()).hexdigest()
        return stored(f"{self.__name__}-{digest[:8]}", compiled)


class Constant:
    """An array that many calls of kernels are given, looked at once: it has to stay where it is."""

    __slots__ = ("array", "kind", "numbers")

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array
        self.numbers: list[float] = []
        self.kind = _take(array, self.numbers)


def prepared(kernel: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Return a call of a kernel with arguments that are looked at once: arrays have to stay where they are."""
    if not isinstance(kernel, _Kernel):
        return functools.partial(kernel, *arguments)
    call = kernel.prepared(*arguments)
    # It has the arrays' addresses alone.
    call.arguments = arguments  # type: ignore[attr-defined]
    return call


def constant(array: NDArray[Any]) -> Any:
    """Return what to give to kernels for an array that many calls are given: small calls are made in loops."""
    return Constant(array) if has_machine_code else array


_NUMBERS = frozenset((int, float, bool))
# The types of arguments, each by its number: tuples of numbers are found faster than tuples of tuples.
_kinds: list[Any] = []
_numbers_of_kinds: dict[Any, int] = {}


def _take(argument: Any, numbers: list[float]) -> int:
    """Append the numbers that stand for an argument, and return the number of its type in `_kinds`."""
    kind: Any = type(argument)
    if kind is np.ndarray:
        contiguous = argument.flags.c_contiguous
        numbers.append(argument.__array_interface__["data"][0])
        numbers += argument.shape
        if not contiguous:
            numbers += argument.strides
        kind = np.ndarray, argument.dtype, argument.ndim, contiguous
    elif kind is tuple:
        kind = tuple(map(type, argument))
        if _NUMBERS.issuperset(kind):
            numbers += argument
        else:
            kind = tuple([_kinds[_take(each, numbers)] for each in argument])
    elif kind in _NUMBERS:
        numbers.append(argument)
    elif isinstance(argument, np.generic):
        return _take(argument.item(), numbers)
    else:
        raise TypeError(f"{argument!r} is of a type that kernels do not take")
    number = _numbers_of_kinds.get(kind)
    return _number_of(kind) if number is None else number


def _number_of(kind: Any) -> int:
    with lock:
        if kind not in _numbers_of_kinds:
            _kinds.append(kind)
            _numbers_of_kinds[kind] = len(_kinds) - 1
        return _numbers_of_kinds[kind]


def _as_translated(kind: Any) -> Any:
    """Return the type of an argument as `translate` takes it."""
    if not isinstance(kind, tuple):
        return kind
    if kind and kind[0] is np.ndarray:
        _, dtype, dimensions, contiguous = kind
        if not dtype.isnative:
            raise TypeError(f"kernels do not take arrays of another machine's dtype, {dtype.str}")
        return ArrayType(dtype.str[1:], dimensions, contiguous)
    return tuple(map(_as_translated, kind))


def _compiled(source: str, vectorised: bool) -> bytes:
    """Return LLVM IR as optimised machine code."""
    machine = target_machine()
    module = binding.parse_assembly(source)
    module.verify()
    # Kernels look after the groups of tiles that vector code works on: unrolled loops are not worth their compilation.
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization, options.loop_unrolling = vectorised, False
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    code: bytes = machine.emit_object(module)
    return code
