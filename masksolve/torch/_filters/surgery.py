"""Layers made smaller, in place, and as they were again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from masksolve.torch._filters.channels import ChannelMap, Labels, Layer

# What modules call the numbers of their outputs and inputs, or of what follows them.
_OUTPUTS = ("out_features", "out_channels")
_INPUTS = ("in_features", "in_channels")
_CHANNELS = ("num_features", "num_parameters")


class Surgery:
    """Changes to a model, the last of which can be undone.

    Parameters stay the same objects and get new values, so that whoever holds them (ties, an optimizer without
    momentum) has the new ones; their gradients, of another shape now, go.
    """

    def __init__(self, channels: ChannelMap) -> None:
        self.channels = channels
        self.gone = np.zeros(channels.classes, dtype=bool)
        self._undo: list[Callable[[], object]] = []

    @property
    def mark(self) -> int:
        """The number of changes so far."""
        return len(self._undo)

    def undo(self, mark: int) -> None:
        """Undo all changes after a mark."""
        while len(self._undo) > mark:
            self._undo.pop()()

    def cut(self, cut: NDArray[np.bool_]) -> None:
        """Take classes of channels away from all layers that make, norm or read them."""
        for layer in self.channels.layers:
            rows, columns = ~cut[layer.outputs], ~cut[layer.inputs]
            if not columns.all():
                self._replace(layer.module, "weight", _selected(layer.weight, columns, 1))
                self._resize(layer.module, _INPUTS, columns)
                self._relabel(layer, "inputs", layer.inputs[columns])
            if not rows.all():
                self._replace(layer.module, "weight", _selected(layer.weight, rows, 0))
                if layer.bias is not None:
                    self._replace(layer.module, "bias", _selected(layer.bias, rows, 0))
                self._resize(layer.module, _OUTPUTS, rows)
                self._relabel(layer, "outputs", layer.outputs[rows])
        for follower in self.channels.followers:
            kept = ~cut[follower.channels]
            if not kept.all():
                for name, tensor in follower.tensors.items():
                    self._replace(follower.module, name, _selected(tensor, kept, 0))
                self._resize(follower.module, _CHANNELS, kept)
                self._relabel(follower, "channels", follower.channels[kept])
        self._relabel(self, "gone", self.gone | cut)

    def scale(self, factors: NDArray[np.float64]) -> None:
        """Multiply what layers read of each class by its factor."""
        for layer in self.channels.layers:
            own = factors[layer.inputs]
            if (own != 1).any():
                weight = layer.weight.detach()
                along = torch.from_numpy(own).to(weight).view(1, -1, *[1] * (weight.ndim - 2))
                self._replace(layer.module, "weight", weight * along)

    def add_to_bias(self, layer: Layer, values: Tensor) -> None:
        """Add values to the bias of a layer that has one."""
        assert layer.bias is not None
        self._replace(layer.module, "bias", layer.bias.detach() + values)

    def _replace(self, module: nn.Module, name: str, values: Tensor) -> None:
        parameter = module._parameters.get(name)
        if parameter is None:
            self._undo.append(partial(module._buffers.__setitem__, name, module._buffers[name]))
            module._buffers[name] = values
            return
        self._undo.append(partial(_set, parameter, parameter.data, parameter.grad))
        _set(parameter, values, None)

    def _resize(self, module: nn.Module, names: tuple[str, ...], kept: NDArray[np.bool_]) -> None:
        name = next(each for each in names if hasattr(module, each))
        # A class may have several positions along an axis, and the attribute counts those.
        self._undo.append(partial(setattr, module, name, getattr(module, name)))
        setattr(module, name, int(np.count_nonzero(kept)))

    def _relabel(self, owner: object, name: str, labels: Labels | NDArray[np.bool_]) -> None:
        self._undo.append(partial(setattr, owner, name, getattr(owner, name)))
        setattr(owner, name, labels)


def _set(parameter: nn.Parameter, values: Tensor, gradient: Tensor | None) -> None:
    parameter.grad = None
    # Graphs of earlier steps that are still held keep the node that adds up the parameter's gradients, and with it the
    # old shape. PyTorch makes a new node if the dtype changes.
    parameter.data = values.new_empty(0, dtype=torch.float32 if values.dtype == torch.float64 else torch.float64)
    parameter.data = values
    parameter.grad = gradient


def _selected(tensor: Tensor, kept: NDArray[np.bool_], dim: int) -> Tensor:
    return tensor.detach().index_select(dim, torch.from_numpy(np.flatnonzero(kept)).to(tensor.device))
