"""Channels that can go without any change of what the model computes, seen from the weights alone.

Two kinds: those that nothing reads (the weights of all readers are zero there), and those whose filters have no weight
left, so that they are constant. A constant is added to the biases of the readers. Cutting channels may leave others
without readers or without weights, so this goes on until there are none.

The authors of PFP look for gradients and activations that are zero over a sample instead. That needs several passes,
and says nothing of other inputs: a filter that is silent on the sample may fire later. Weights that are zero prove it
for all inputs. What they cannot prove, such as a ReLU whose input is never positive, has a sensitivity of zero and goes
first when the budget asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from masksolve.torch._filters.channels import ChannelMap, Layer
from masksolve.torch._filters.surgery import Surgery

# Runs one batch while functions see the inputs of some modules.
Show = Callable[[dict[nn.Module, Callable[[Tensor], object]]], Any]


def drop_empty(surgery: Surgery, show: Show) -> int:
    """Cut all channels that change nothing, except the last of a group, and return how many."""
    channels, before = surgery.channels, int(surgery.gone.sum())
    while True:
        made, read = _used(channels)
        live = channels.free & ~surgery.gone
        constant = live & read & ~made & ~channels.mixed
        biases, kept = _folded(channels, constant, show)
        empty = live & ~read | constant & ~kept
        for group in channels.groups:
            own = group.classes[~surgery.gone[group.classes]]
            if empty[own].all():
                empty[own[0]] = False
        if not empty.any():
            return int(surgery.gone.sum()) - before
        for layer, columns in biases:
            values = columns[:, torch.from_numpy(empty[layer.inputs]).to(columns.device)].sum(1)
            if bool((values != 0).any()):
                surgery.add_to_bias(layer, values.to(columns.dtype))
        surgery.cut(empty)


def _used(channels: ChannelMap) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return of each class whether a filter that makes it has weights, and whether any weight reads it."""
    made, read = (np.zeros(channels.classes, dtype=bool) for _ in range(2))
    for layer in channels.layers:
        used = (
            layer.weight.detach().flatten(2) != 0 if layer.is_convolution else layer.weight.detach().unsqueeze(2) != 0
        )
        np.logical_or.at(made, layer.outputs, used.any(2).any(1).cpu().numpy())
        np.logical_or.at(read, layer.inputs, used.any(2).any(0).cpu().numpy())
    return made, read


def _folded(
    channels: ChannelMap, constant: NDArray[np.bool_], show: Show
) -> tuple[list[tuple[Layer, Tensor]], NDArray[np.bool_]]:
    """Return what each reader gets from each of its constant inputs, and the constants that no bias can take.

    That they are constant is known from the weights; what they are is read off any input of the model.
    """
    unfit = np.zeros(channels.classes, dtype=bool)
    readers = [layer for layer in channels.layers if constant[layer.inputs].any()]
    seen: dict[Layer, Tensor] = {}
    if readers:
        show({layer.module: partial(_note, seen, layer) for layer in readers})
    found = []
    for layer in readers:
        values, flat = _values(layer, seen[layer])
        columns = layer.weight.detach().flatten(2).sum(2) if layer.is_convolution else layer.weight.detach()
        # Zero adds nothing. Anything else needs a bias, and to be the same wherever the filter is.
        takes_any = layer.bias is not None and not _sees_zeros(layer)
        # Of several calls one input is known.
        fits = flat & ((values == 0) | takes_any) & (layer.calls == 1)
        np.logical_or.at(unfit, layer.inputs, ~fits.cpu().numpy())
        found.append((layer, columns * values))
    return found, unfit & constant


def _note(seen: dict[Layer, Tensor], layer: Layer, x: Tensor) -> None:
    # What follows may write to it in place.
    seen[layer] = x.detach().clone()


def _values(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return one value of each input channel, and whether it is that at all places."""
    if not isinstance(layer.module, _ConvNd):
        rows = x.reshape(-1, x.shape[-1])
        return rows[0], (rows == rows[0]).all(0)
    point = x.unflatten(0, (-1, 1))[0, 0] if x.ndim == len(layer.module.kernel_size) + 2 else x
    rows = point.flatten(1)
    return rows[:, 0], (rows == rows[:, :1]).all(1)


def _sees_zeros(layer: Layer) -> bool:
    """Return whether filters see zeros around their input."""
    module = layer.module
    is_padded = isinstance(module, _ConvNd) and any(module._reversed_padding_repeated_twice)
    return is_padded and module.padding_mode == "zeros"
