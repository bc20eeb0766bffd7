"""Forwards that read a parameter several times and compute what is read once, each thread for itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
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


def read_once(module: nn.Module, attribute: str, compute: Callable[[nn.Module], Tensor | None]) -> Tensor | None:
    """Return what a module reads of a parameter: computed anew, unless its forward keeps what it has read."""
    found = None if torch.compiler.is_compiling() else _READS.of.get(id(module))
    if found is None:
        return compute(module)
    if attribute not in found:
        found[attribute] = compute(module)
    return found[attribute]
