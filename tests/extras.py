"""Optional libraries: a test that needs one is skipped where it is not installed; the reason names the extra."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest

EXTRAS = {
    "flow": ("ortools",),
    "lp": ("scipy", "pulp"),
    "cli": ("click", "rich", "safetensors", "ml_dtypes", "filelock", "xxhash"),
    "cluster": ("distributed",),
    "permute": ("scipy",),
    "torch": ("torch",),
    "transformers": ("transformers",),
}
# These are in the dependency group `test`, not in an extra.
TOOLS = ("accelerate", "grimp", "lightning", "matplotlib", "pytorch_lightning", "triton")
METHODS = {"flow", "lp"}


def library(name: str) -> ModuleType:
    """Import an optional library, or skip the test."""
    extra = next((extra for extra, names in EXTRAS.items() if name in names), None)
    reason = f"needs {name}, of the extra `{extra}`" if extra else f"needs {name}, of the dependency group `test`"
    module: ModuleType = pytest.importorskip(name, reason=reason)
    return module


def need(extra: str) -> None:
    """Skip the test unless the extra, or the tool of this name, is installed."""
    for name in EXTRAS.get(extra, (extra,)):
        library(name)


def dtype_of(given: Any) -> np.dtype[Any]:
    """Return the dtype; names that NumPy does not know, such as "bfloat16", are those of ml_dtypes."""
    try:
        return np.dtype(given)
    except TypeError:
        return np.dtype(getattr(library("ml_dtypes"), given))
