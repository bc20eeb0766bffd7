"""The number of optimizer steps, which travels with the model."""

from __future__ import annotations

import torch
from torch import Tensor

from masksolve.torch._training.masking import MaskedWeight


class StepCount:
    """A number in a buffer beside a mask, so that `model.load_state_dict` alone resumes a training.

    Read from the buffer only where something else has written there: reading from a GPU waits for all its work.
    """

    def __init__(self, masked: MaskedWeight) -> None:
        self._masked = masked
        masked.home.register_buffer(masked.counter, torch.zeros((), dtype=torch.int64, device=masked.mask.device))
        self._value = 0
        self._seen = _moment(self._buffer)

    @property
    def value(self) -> int:
        """The number of steps."""
        buffer = self._buffer
        # After `finalize`, and on the meta device, it is what it was.
        if buffer is not None and not buffer.is_meta and self._seen != _moment(buffer):
            self._value, self._seen = int(buffer), _moment(buffer)
        return self._value

    @value.setter
    def value(self, value: int) -> None:
        buffer = self._buffer
        assert buffer is not None
        buffer.fill_(value)
        self._value, self._seen = value, _moment(buffer)

    @property
    def _buffer(self) -> Tensor | None:
        return self._masked.home._buffers.get(self._masked.counter)


def _moment(buffer: Tensor | None) -> tuple[int, int]:
    assert buffer is not None
    return id(buffer), buffer._version
