"""Exact transposable N:M sparsity masks."""

from masksolve import conversion, diversity
from masksolve._api import solve_block, solve_blocks, solve_matrix
from masksolve._certificate import Certificate, certify
from masksolve._check import check_mask, is_valid_mask
from masksolve._errors import InvalidMaskError, MethodNotInstalledError
from masksolve._methods import available_methods
from masksolve._pattern import Pattern
from masksolve._sampling import random_mask

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "InvalidMaskError",
    "MethodNotInstalledError",
    "Pattern",
    "available_methods",
    "certify",
    "check_mask",
    "conversion",
    "diversity",
    "is_valid_mask",
    "random_mask",
    "solve_block",
    "solve_blocks",
    "solve_matrix",
]
