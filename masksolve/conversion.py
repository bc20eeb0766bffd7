"""The former name of `masksolve.odds`, for one release more."""

import warnings
from typing import Any

from masksolve import odds


def __getattr__(name: str) -> Any:
    if name not in odds.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"masksolve.conversion.{name} is masksolve.odds.{name} now; masksolve 0.2 has the new name alone",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(odds, name)
