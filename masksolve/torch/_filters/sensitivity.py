"""Sensitivities: how much of any output of the layers that read it a channel makes, at most, over some points."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from masksolve.torch._batches import windows
from masksolve.torch._filters.channels import Layer

Part = Literal["element", "share"]
PARTS: tuple[Part, ...] = ("element", "share")

# Products at a time.
_CHUNK = 1 << 20
# Sums up to this are rounding, and no channel counts for much of them.
_SMALLEST = float(torch.finfo(torch.float32).eps)


class Sensitivity:
    """The sensitivities of the channels that one layer reads, as inputs come in.

    Activations and weights are split by their signs, so that every output is the difference of sums of terms that are
    not negative. The part of a channel in one of these sums is its largest term ("element") or all of its terms
    ("share"); its sensitivity is the largest part over outputs, signs, places and points.

    Attributes
    ----------
    classes : ndarray of int64
        The classes of the channels.
    sums : int
        How many sums were looked at.
    """

    def __init__(self, layer: Layer, part: Part) -> None:
        weight = layer.weight.detach().flatten(1)
        self._weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        self._layer, self._part = layer, part
        columns = np.repeat(layer.inputs, layer.kernel)
        self.classes, places = np.unique(columns, return_inverse=True)
        # The columns of each channel; channels of fewer than others get one of zeros, which follows the last.
        order, counts = np.argsort(places, kind="stable"), np.bincount(places)
        table = np.full((len(counts), counts.max()), len(columns))
        table[np.arange(counts.max()) < counts[:, np.newaxis]] = order
        self._table = torch.from_numpy(table).to(weight.device)
        self._found = torch.zeros(len(counts), dtype=self._weight.dtype, device=weight.device)
        self.sums = 0

    def add(self, x: Tensor) -> None:
        """Look at the inputs of one call."""
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"an input of {self._layer.name!r} holds NaN or infinities; nothing was changed")
        for rows in input_rows(self._layer, x.to(self._weight.dtype)):
            for signed in (rows, -rows) if bool((rows < 0).any()) else (rows,):
                for weight in (self._weight, -self._weight):
                    self._add(signed.clamp(min=0), weight.clamp(min=0))

    def result(self) -> NDArray[np.float64]:
        """Return the sensitivity of each channel."""
        found: NDArray[np.float64] = self._found.double().cpu().numpy()
        return found

    def _add(self, rows: Tensor, weight: Tensor) -> None:
        self.sums += len(rows) * len(weight)
        products = weight.numel() if self._part == "element" else len(self._table) * len(weight)
        for chunk in rows.split(max(1, _CHUNK // products)):
            sums = chunk @ weight.T
            inverse = torch.where(sums > _SMALLEST, 1 / sums, 0)
            # Rounding may make a part of a sum larger than the sum.
            found = (self._elements if self._part == "element" else self._shares)(chunk, weight, inverse).clamp(max=1)
            self._found = torch.maximum(self._found, found)

    def _elements(self, rows: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
        # The weights do not depend on the row: they can wait until its largest quotient is known.
        quotients = (rows.unsqueeze(1) * inverse.unsqueeze(2)).amax(0)
        largest = (quotients * weight).amax(0)
        return _with_zero(largest)[self._table].amax(1)

    def _shares(self, rows: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
        # (channels, rows, columns of one) @ (channels, columns of one, outputs)
        own = _with_zero(rows)[:, self._table].transpose(0, 1) @ _with_zero(weight)[:, self._table].permute(1, 2, 0)
        return (own * inverse).amax((1, 2))


def input_rows(layer: Layer, x: Tensor) -> Iterator[Tensor]:
    """Yield what the filters of a layer are multiplied with, (places, columns), point by point."""
    if not isinstance(layer.module, _ConvNd):
        yield x.reshape(-1, x.shape[-1])
        return
    axes = len(layer.module.kernel_size)
    # (B, channels, *places, *kernel) -> (B, *places, channels, *kernel)
    found = windows(layer.module, x).movedim(1, 1 + axes)
    for point in found:
        yield point.flatten(axes).flatten(0, axes - 1)


def _with_zero(values: Tensor) -> Tensor:
    """Return values with a column of zeros behind the last."""
    return torch.nn.functional.pad(values, (0, 1))
