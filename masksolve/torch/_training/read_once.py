"""Forwards that read a parameter several times and compute what is read once, each thread for itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class _Reads(threading.local):
    """What the forwards that run have read: by the module's id, by the parameter's name."""

    def __init__(self) -> None:
        self.of: dict[int, dict[str, Tensor | None]] = {}


_READS = _Reads()


@contextmanager
def reading_once(module: nn.Module) -> Iterator[None]:
    """Let a module keep what it reads first of each parameter."""
    before = _READS.of
    _READS.of = {**before, id(module): {}}
    try:
        yield
    finally:
        _READS.of = before


def read_before(module: nn.Module) -> dict[str, Tensor | None] | None:
    """Return what a module has read so far, to be added to; None if it reads anew each time, as in compiled code."""
    return None if torch.compiler.is_compiling() else _READS.of.get(id(module))
