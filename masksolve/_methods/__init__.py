"""The registry of methods: which there are, what each needs, and its `solve`, imported when it is asked for.

A method is one file of this folder with a function

    solve(tiles, masks, margins, *, threads, **options) -> None

that fills the boolean masks (P, Q, r, c) for the weights tiles (P, Q, r, c), both strided views, and a row in the
table below.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from masksolve._errors import MethodNotInstalledError
from masksolve._inputs import nearest


@dataclass(frozen=True)
class Method:
    """One row of the registry.

    `options` are the keywords that `solve` takes beyond the common ones, `extra` the extra of this package that
    installs `requires`.
    """

    module: str
    options: frozenset[str] = frozenset()
    requires: str | None = None
    extra: str | None = None


_METHODS = {
    "exact": Method("exact"),
    "flow": Method("flow", requires="ortools", extra="flow"),
    "lp": Method("lp", options=frozenset({"backend"}), requires="scipy", extra="lp"),
    "enumerate": Method("enumerate"),
    "greedy": Method("greedy", options=frozenset({"complete"})),
    "two-approx": Method("two_approx"),
}


def available_methods() -> tuple[str, ...]:
    """Return the methods that this installation can run, preferred first.

    Examples
    --------
    >>> available_methods()[0]
    'exact'
    """
    return tuple(name for name, method in _METHODS.items() if _is_installed(method))


def extras_of_methods() -> dict[str, str | None]:
    """Return every method there is, preferred first, and the extra that installs what it needs."""
    return {name: method.extra for name, method in _METHODS.items()}


def load_method(name: str, options: Collection[str]) -> Callable[..., None]:
    """Return the `solve` of a method, after checking that it exists, takes these options and can be imported."""
    method = _METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        raise ValueError(f"unknown method {name!r}{nearest(name, _METHODS)}")
    for option in sorted(set(options) - method.options) if options else ():
        if method.options:
            raise TypeError(f"method {name!r} has no option {option!r}{nearest(option, sorted(method.options))}")
        raise TypeError(f"method {name!r} has no option {option!r}; it takes none")
    if not _is_installed(method):
        raise MethodNotInstalledError(
            f"method {name!r} needs {method.requires}, which is not installed; pip install 'masksolve[{method.extra}]'"
        )
    return _solve_of(method.module)


@cache
def _solve_of(module: str) -> Callable[..., None]:
    solve: Callable[..., None] = importlib.import_module(f"{__name__}.{module}").solve
    return solve


def _is_installed(method: Method) -> bool:
    return method.requires is None or find_spec(method.requires) is not None
