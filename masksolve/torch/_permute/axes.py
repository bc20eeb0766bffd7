"""Axes of a model whose order changes nothing that it computes, found from the modules' types and the children's names.

The hidden axis of a feed-forward block or of an expert, the value channels of an attention head, the channels between
two layers of an nn.Sequential, and those between the convolutions of a residual block. Names promise nothing: whoever
reorders has to compare what the model computes before and after.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from masksolve.torch._layers import is_conv1d

Kind = Literal["hidden", "value", "channels"]

# Names of children: the layers that make the hidden axis, and the one that takes it.
_FEED_FORWARD: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("linear1",), "linear2"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate.dense",), "output.dense"),
    (("intermediate_dense",), "output_dense"),
)
# Names of children: the layer that makes the values, the one that takes the heads' outputs, and the module that knows
# the size of a head.
_ATTENTION = (
    ("v_proj", "o_proj", ""),
    ("v_proj", "out_proj", ""),
    ("v", "o", ""),
    ("self.value", "output.dense", "self"),
)
_SIZES_OF_HEADS = ("head_dim", "attention_head_size", "key_value_proj_dim")
# Modules that treat every channel alike.
_ELEMENTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Hardswish,
    nn.Softplus,
    nn.Identity,
    nn.Dropout,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
)


@dataclass(frozen=True, eq=False)
class Member:
    """A tensor that has the axis, or one expert of a stack of them: along `dim`, line k lies at index[k]."""

    tensor: Tensor
    dim: int
    index: Tensor
    expert: int | None = None

    def reorder(self, order: Tensor) -> None:
        """Put line order[k] in the place of line k."""
        index, own = self.index.to(self.tensor.device), self._own(self.tensor)
        own.index_copy_(self.dim, index, own.index_select(self.dim, index[order.to(index.device)]))

    def matrices(self, values: Tensor) -> list[Tensor]:
        """Return values of the tensor's shape as matrices (lines, others), one for each kernel position."""
        lines = self._own(values).movedim(self.dim, 0)[self.index.to(values.device)]
        return list(lines.flatten(2).unbind(2)) if lines.ndim > 2 else [lines]

    def _own(self, values: Tensor) -> Tensor:
        return values if self.expert is None else values[self.expert]


@dataclass(frozen=True, eq=False)
class Axis:
    """Lines that may be reordered, within each of so many `groups` of the same size.

    `makers` are the weights that make them and `takers` those that multiply them; `others` are biases and norms.
    """

    name: str
    kind: Kind
    length: int
    groups: int
    makers: Sequence[Member]
    takers: Sequence[Member]
    others: Sequence[Member]

    def reorder(self, order: Tensor) -> None:
        """Put line order[k] in the place of line k, in all members."""
        with torch.no_grad():
            for member in (*self.makers, *self.takers, *self.others):
                member.reorder(order)


def axes_of(model: nn.Module, path: str = "") -> list[Axis]:
    """Return the axes of a model, or of a part of it, which is at `path`."""
    found: list[Axis] = []
    for name, module in model.named_modules(prefix=path):
        prefix = f"{name}." if name else ""
        found += _hidden_axes(prefix, module)
        found += _axes_of_experts(prefix, module)
        found += _value_axes(prefix, module)
        found += _channel_axes(prefix, module)
    return found


def _child(module: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path.split(".") if path else ():
        found = None if found is None else found._modules.get(name)
    return found


@dataclass(frozen=True)
class _Layer:
    """A Linear, Conv1D of transformers or convolution, with the dims of its weight."""

    weight: Tensor
    bias: Tensor | None
    out_dim: int
    in_dim: int

    @property
    def outputs(self) -> int:
        return self.weight.shape[self.out_dim]

    @property
    def inputs(self) -> int:
        return self.weight.shape[self.in_dim]


def _layer(module: nn.Module | None) -> _Layer | None:
    """Return a module as a layer, if it is one whose outputs may be reordered."""
    if module is None:
        return None
    transposed = is_conv1d(module)
    is_conv = isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd) and module.groups == 1
    weight = module._parameters.get("weight")
    if weight is None or not (transposed or is_conv or isinstance(module, nn.Linear)):
        return None
    return _Layer(weight, module._parameters.get("bias"), *((1, 0) if transposed else (0, 1)))


def _axis(
    name: str,
    kind: Kind,
    makers: Sequence[_Layer],
    takers: Sequence[tuple[_Layer, Tensor]],
    *,
    groups: int = 1,
    index: Tensor | None = None,
    others: Sequence[Tensor] = (),
) -> Axis:
    """Return an axis of the outputs of some layers, all of them or those at `index`."""
    lines = torch.arange(makers[0].outputs) if index is None else index
    biases = [Member(layer.bias, 0, lines) for layer in makers if layer.bias is not None]
    return Axis(
        name,
        kind,
        len(lines),
        groups,
        [Member(layer.weight, layer.out_dim, lines) for layer in makers],
        [Member(layer.weight, layer.in_dim, places) for layer, places in takers],
        [*biases, *(Member(each, 0, lines) for each in others)],
    )


def _hidden_axes(prefix: str, module: nn.Module) -> Iterator[Axis]:
    for names, last in _FEED_FORWARD:
        makers, taker = [_layer(_child(module, name)) for name in names], _layer(_child(module, last))
        if taker is None or any(maker is None or maker.outputs != taker.inputs for maker in makers):
            continue
        found = cast(list[_Layer], makers)
        yield _axis(f"{prefix}{last}", "hidden", found, [(taker, torch.arange(taker.inputs))])
        return
    fused, taker = _layer(_child(module, "gate_up_proj")), _layer(_child(module, "down_proj"))
    if fused is not None and taker is not None and fused.outputs == 2 * taker.inputs:
        biases = [] if fused.bias is None else _halves(fused.bias, 0, taker.inputs)
        lines = torch.arange(taker.inputs)
        yield Axis(
            f"{prefix}down_proj",
            "hidden",
            taker.inputs,
            1,
            _halves(fused.weight, fused.out_dim, taker.inputs),
            [Member(taker.weight, taker.in_dim, lines)],
            biases,
        )


def _halves(
    tensor: Tensor, dim: int, length: int, expert: int | None = None, *, interleaved: bool = False
) -> list[Member]:
    """Return the gates' lines and those that they are multiplied with."""
    lines = torch.arange(length)
    places = (2 * lines, 2 * lines + 1) if interleaved else (lines, lines + length)
    return [Member(tensor, dim, index, expert) for index in places]


def _axes_of_experts(prefix: str, module: nn.Module) -> Iterator[Axis]:
    """Yield the hidden axis of each expert of a stack, (experts, ...)."""
    fused, taker = (module._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    if fused is None or taker is None or fused.ndim != 3 or taker.ndim != 3 or len(fused) != len(taker):
        return
    # (2 x hidden, in) and (out, hidden), or both transposed.
    transposed = fused.shape[1] == taker.shape[2] and fused.shape[2] == 2 * taker.shape[1]
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    length = taker.shape[1 + in_dim]
    if fused.shape[1 + out_dim] != 2 * length:
        return
    biases = module._parameters.get("gate_up_proj_bias")
    # As in GPT-OSS, the only one that has them.
    interleaved = biases is not None
    for expert in range(len(fused)):
        yield Axis(
            f"{prefix}down_proj.{expert}",
            "hidden",
            length,
            1,
            _halves(fused, out_dim, length, expert, interleaved=interleaved),
            [Member(taker, in_dim, torch.arange(length), expert)],
            [] if biases is None else _halves(biases, 0, length, expert, interleaved=interleaved),
        )


def _value_axes(prefix: str, module: nn.Module) -> Iterator[Axis]:
    if isinstance(module, nn.MultiheadAttention):
        yield from _value_axis_of_torch(prefix, module)
        return
    fused, projection = _layer(_child(module, "c_attn")), _layer(_child(module, "c_proj"))
    size = _size_of_head(module)
    if fused is not None and projection is not None and fused.outputs == 3 * projection.inputs and size:
        width = projection.inputs
        places = torch.arange(width)
        index = places + 2 * width
        yield _axis(f"{prefix}c_proj", "value", [fused], [(projection, places)], groups=width // size, index=index)
        return
    for value, output, knows in _ATTENTION:
        maker, taker, owner = _layer(_child(module, value)), _layer(_child(module, output)), _child(module, knows)
        size = 0 if owner is None else _size_of_head(owner)
        if maker is None or taker is None or size == 0 or maker.outputs % size or taker.inputs % maker.outputs:
            continue
        # Heads of queries that share a head of values follow one another.
        heads, shared = maker.outputs // size, taker.inputs // maker.outputs
        places = torch.arange(taker.inputs).view(heads, shared, size)
        takers = [(taker, places[:, k].flatten()) for k in range(shared)]
        yield _axis(f"{prefix}{output}", "value", [maker], takers, groups=heads)
        return


def _value_axis_of_torch(prefix: str, module: nn.MultiheadAttention) -> Iterator[Axis]:
    width, weight = module.embed_dim, module._parameters.get("in_proj_weight")
    output = _layer(module.out_proj)
    if weight is None or output is None or module.bias_v is not None:
        return
    fused = _Layer(weight, module._parameters.get("in_proj_bias"), 0, 1)
    places = torch.arange(width)
    index = places + 2 * width
    name = f"{prefix}out_proj"
    yield _axis(name, "value", [fused], [(output, places)], groups=module.num_heads, index=index)


def _size_of_head(module: nn.Module) -> int:
    found = next((getattr(module, name) for name in _SIZES_OF_HEADS if hasattr(module, name)), 0)
    return found if isinstance(found, int) and found > 0 else 0


def _channel_axes(prefix: str, module: nn.Module) -> Iterator[Axis]:
    if isinstance(module, nn.Sequential):
        yield from _chain(prefix, list(module.named_children()))
        return
    number = 1
    while _layer(_child(module, f"conv{number + 1}")) is not None:
        steps = [f"conv{number}", f"bn{number}", f"conv{number + 1}"]
        children = [(name, child) for name in steps if (child := _child(module, name)) is not None]
        yield from _chain(prefix, children)
        number += 1


def _chain(prefix: str, children: Sequence[tuple[str, nn.Module]]) -> Iterator[Axis]:
    """Yield the axes between layers that follow one another, with nothing between that mixes channels."""
    maker: _Layer | None = None
    others: list[Tensor] = []
    for name, child in children:
        layer = _layer(child)
        if layer is not None:
            if maker is not None and layer.inputs == maker.outputs and layer.weight.ndim == maker.weight.ndim:
                places = torch.arange(layer.inputs)
                yield _axis(f"{prefix}{name}", "channels", [maker], [(layer, places)], others=others)
            maker, others = layer, []
        elif isinstance(child, _BatchNorm):
            held = (*child._parameters.values(), child.running_mean, child.running_var)
            others = [*others, *(each for each in held if each is not None)]
        elif not isinstance(child, _ELEMENTWISE):
            maker = None
