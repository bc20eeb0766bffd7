"""Exact transposable N:M sparsity masks, with proofs.

The names below solve, check and certify masks of NumPy arrays. Beside them are

masksolve.diversity
    Mask diversity: how many masks a constraint allows.
masksolve.odds
    Odds that pruned weights are N:M already, and the choice of a pattern from them.
masksolve.budget
    N of M for each layer, chosen so that all together keep the most importance at a given density.
masksolve.permute
    Orders of rows and columns in which the best mask keeps more. Needs the extra `permute`.
masksolve.torch
    PyTorch: masks of tensors, training under masks (`Sparsifier`), pruning of trained models (`adaprune`).
    Needs the extra `torch`.
masksolve.checkpoint
    Pruning, checking and comparing safetensors checkpoints. Needs the extra `cli`, as does the command `masksolve`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from masksolve._version import __version__ as __version__

if TYPE_CHECKING:
    from masksolve import budget, diversity, odds
    from masksolve import checkpoint as checkpoint
    from masksolve import permute as permute
    from masksolve import torch as torch
    from masksolve._certificate import Certificate, certify
    from masksolve._check import check_mask, is_valid_mask
    from masksolve._errors import InvalidMaskError, MethodNotInstalledError, NotInstalledError
    from masksolve._methods import available_methods
    from masksolve._pattern import Pattern
    from masksolve._solve import solve_block, solve_blocks, solve_matrix
    from masksolve.diversity._sample import random_mask


__all__ = [
    "Certificate",
    "InvalidMaskError",
    "MethodNotInstalledError",
    "NotInstalledError",
    "Pattern",
    "available_methods",
    "budget",
    "certify",
    "check_mask",
    "diversity",
    "is_valid_mask",
    "odds",
    "random_mask",
    "solve_block",
    "solve_blocks",
    "solve_matrix",
]

# Imported when they are asked for: a command that is interrupted while it imports has to have begun.
_HOMES = {
    "Certificate": "_certificate",
    "InvalidMaskError": "_errors",
    "MethodNotInstalledError": "_errors",
    "NotInstalledError": "_errors",
    "Pattern": "_pattern",
    "available_methods": "_methods",
    "certify": "_certificate",
    "check_mask": "_check",
    "is_valid_mask": "_check",
    "random_mask": "diversity._sample",
    "solve_block": "_solve",
    "solve_blocks": "_solve",
    "solve_matrix": "_solve",
}


def __getattr__(name: str) -> Any:
    if name in ("budget", "checkpoint", "conversion", "diversity", "odds", "permute", "torch"):
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
