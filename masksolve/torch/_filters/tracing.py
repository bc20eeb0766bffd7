"""Tracing a model by torch.fx: from which layer to which each channel goes, and what happens to it in between.

Every position along the channels' axis of a value carries the number of its channel. Operations that treat channels
alike hand the numbers on, sums and products tie those that meet, and whatever is not known holds them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_flatten, tree_unflatten

from masksolve.torch._batches import arguments
from masksolve.torch._filters.channels import ChannelMap, Follower, Labels, Layer, Ties, channel_map
from masksolve.torch._outputs import outputs_of, relative_change, rounding

# Exactly these: a subclass may read its weight in a way of its own.
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FOLLOWERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.PReLU)

# Functions, methods and modules of PyTorch that treat every number alike, by name.
_POINTWISE = re.compile(
    r"(relu6?|leaky_?relu|[cs]?elu|gelu|silu|mish|tanh|tanhshrink|(log|hard)?sigmoid|hard(tanh|swish)|soft(plus|sign)"
    r"|threshold|abs|neg|exp|clamp|identity|(alpha_?)?dropout([123]d)?|contiguous|clone|detach|float|double|half"
    r"|bfloat16|to)_?",
    re.IGNORECASE,
)
_POOLS = re.compile(r"(adaptive_?)?(max|avg|lp)_?pool([123])d", re.IGNORECASE)
# Operations in which channels of several values meet.
_TOGETHER = re.compile(r"i?(add|sub|mul|div|truediv)_?|maximum|minimum")
_RESHAPES = ("flatten", "view", "reshape", "squeeze")
_SIZES = ("size", "dim", "getattr")


@dataclass(frozen=True, eq=False)
class _Channels:
    """A value that has channels along one axis."""

    dim: int
    labels: Labels


@dataclass(frozen=True)
class _Plain:
    """A value without channels that could be cut; `origin` says in words where it comes from."""

    origin: str


_Value = _Channels | _Plain


class _Tracer(fx.Tracer):
    """Traces one call: tensors among its arguments are placeholders, and everything else is what it is."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self._leaves, self._form = tree_flatten((tuple(args), dict(kwargs)))

    @property
    def tensors(self) -> list[Tensor]:
        """What the placeholders stand for."""
        return [each for each in self._leaves if isinstance(each, Tensor)]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Subclasses of layers are left whole too, as they may compute something else.
        is_layer = isinstance(m, (nn.Linear, _ConvNd, _BatchNorm, nn.PReLU))
        return is_layer or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        values = [
            self.create_proxy("placeholder", f"input_{place}", (), {}) if isinstance(each, Tensor) else each
            for place, each in enumerate(self._leaves)
        ]
        args, kwargs = tree_unflatten(values, self._form)
        return (lambda *given: root_fn(self.root, *given, **kwargs)), list(args)


def trace(model: nn.Module, batch: Any, expected: Sequence[Tensor], left: Callable[[str], str | None]) -> ChannelMap:
    """Return the channels of a model that is called with such a batch, of which it makes what is `expected`.

    `left` gets the name of a weight, and returns the reason if its filters have to stay.
    """
    tracer = _Tracer(*arguments(batch))
    kind, attributes = type(model).__name__, set(vars(model))
    try:
        graph = tracer.trace(model)
        walk = _Walk(model, graph, iter(tracer.tensors))
    except Exception as error:
        raise ValueError(
            f"this {kind} cannot be traced by torch.fx ({_first_line(error)}); its forward must not depend on "
            "values of tensors. Prune a part of it that can be traced, such as its convolutions, by itself"
        ) from error
    finally:
        # Tensors that the forward makes by itself, which torch.fx hangs on the model.
        for name in set(vars(model)) - attributes:
            delattr(model, name)
    try:
        change = relative_change(expected, outputs_of(walk.run()))
        complaint = "" if change <= rounding(model) else f"computes something else (outputs differ by {change:.1e})"
    except Exception as error:
        complaint = f"does not run ({_first_line(error)})"
    if complaint:
        raise ValueError(
            f"the graph that torch.fx traces of this {kind}, from the forward of its classes, {complaint}; prune a "
            "part of it by itself, without hooks"
        )
    return walk.finish(left)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


class _Walk(fx.Interpreter):
    """Runs a graph once, and follows the channels."""

    def __init__(self, model: nn.Module, graph: fx.Graph, given: Iterator[Any]) -> None:
        super().__init__(fx.GraphModule(model, graph))
        self._model, self._given = model, given
        self._ties = Ties()
        self._values: dict[fx.Node, _Value] = {}
        self._shapes: dict[fx.Node, torch.Size] = {}
        self._layers: dict[str, Layer] = {}
        self._followers: dict[str, Follower] = {}
        self._others: dict[str, str] = {}
        self._read: dict[str, str] = {}

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return next(self._given)

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if isinstance(found, Tensor):
            self._shapes[n] = found.shape
        self._values[n] = self._value(n, found)
        return found

    def finish(self, left: Callable[[str], str | None]) -> ChannelMap:
        """Return the channels, once the graph has run."""
        for name, module in self._model.named_modules():
            if isinstance(module, (nn.Linear, _ConvNd)) and name not in self._layers:
                self._others.setdefault(name, "the traced model does not call it by itself")
        owners: dict[int, list[str]] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        for name, layer in self._layers.items():
            prefix = f"{name}." if name else ""
            shared = [
                each for p in layer.module.parameters() for each in owners[id(p)] if each.rpartition(".")[0] != name
            ]
            reason = f"it shares a parameter with {shared[0]}" if shared else self._read.get(name)
            if reason is not None:
                self._ties.hold(layer.outputs, reason)
                self._ties.hold(layer.inputs, f"what {name} reads, as {reason}")
            elif (reason := left(f"{prefix}weight")) is not None:
                self._ties.hold(layer.outputs, reason)
        for name, follower in self._followers.items():
            if any(len(owners[id(p)]) > 1 for p in follower.module.parameters()):
                self._ties.hold(follower.channels, f"normed by {name}, which shares a parameter")
        return channel_map(self._ties, list(self._layers.values()), self._followers.values(), self._others)

    def _value(self, node: fx.Node, found: Any) -> _Value:
        """Return where the channels of a node's value are."""
        if node.op == "placeholder":
            return _Plain("an input of the model")
        if node.op == "get_attr":
            name = str(node.target).rpartition(".")[0]
            self._read[name] = f"the model reads {node.target} by itself"
            return _Plain(f"{node.target}, which is no layer's output")
        if node.op == "output":
            return self._hold(node, "an output of the model")
        if node.op == "call_module":
            return self._of_module(node, found)
        name, words = _name_of(node.target), f"what goes into {_name_of(node.target)}, which may mix channels"
        if not _is_of_torch(node.target):
            return self._hold(node, words)
        if _POINTWISE.fullmatch(name):
            return self._pointwise(node, found, words)
        if pool := _POOLS.fullmatch(name):
            return self._pooled(node, found, int(pool[3]), words)
        if _TOGETHER.fullmatch(name):
            return self._together(node, found, words)
        if name in ("cat", "concat", "concatenate"):
            return self._concatenated(node, found, words)
        if name in _RESHAPES:
            return self._reshaped(node, found, words)
        if name == "getitem":
            return self._indexed(node, found, words)
        if name == "mean":
            return self._averaged(node, found, words)
        if name in _SIZES and not isinstance(found, Tensor):
            return _Plain("a size")
        return self._hold(node, words)

    def _of_module(self, node: fx.Node, found: Any) -> _Value:
        name, module = str(node.target), self._model.get_submodule(str(node.target))
        kind = type(module).__name__
        words = f"what goes into {name}, a {kind}"
        own = module._parameters.get("weight")
        if type(module) in _LAYERS and own is not None:
            if getattr(module, "groups", 1) == 1:
                return self._layer(node, found, name, module)
            words = f"what goes into {name}, a convolution of {module.groups} groups"
        elif type(module) in _FOLLOWERS and not (isinstance(module, nn.PReLU) and module.num_parameters == 1):
            value = self._input(node)
            if isinstance(value, _Plain):
                return value
            if value.dim == 1:
                if name in self._followers:
                    self._ties.tie(self._followers[name].channels, value.labels)
                self._followers.setdefault(name, Follower(module, value.labels))
                return value
        elif _is_of_torch(type(module)):
            if _POINTWISE.fullmatch(kind) or isinstance(module, nn.PReLU):
                return self._pointwise(node, found, words)
            if pool := _POOLS.fullmatch(kind):
                return self._pooled(node, found, int(pool[3]), words)
            if isinstance(module, nn.Flatten):
                return self._reshaped(node, found, words)
        if isinstance(module, (nn.Linear, _ConvNd)):
            what = words.removeprefix(f"what goes into {name}, ")
            self._others[name] = f"{what}, which is left whole" if own is not None else "its weight is no parameter"
        return self._hold(node, words)

    def _layer(self, node: fx.Node, found: Tensor, name: str, module: nn.Module) -> _Value:
        value, shape = self._input(node), self._shapes[node.all_input_nodes[0]]
        axes = module.kernel_size if isinstance(module, _ConvNd) else None
        dim = len(shape) - 1 - (len(axes) if axes else 0)
        if isinstance(value, _Channels) and value.dim == dim:
            inputs = value.labels
        else:
            origin = value.origin if isinstance(value, _Plain) else f"what {name} reads along another axis"
            if isinstance(value, _Channels):
                self._ties.hold(value.labels, origin)
            inputs = self._ties.fresh(shape[dim])
            self._ties.hold(inputs, origin)
        layer = self._layers.get(name)
        if layer is None:
            weight = module.get_parameter("weight")
            places = found.numel() // max(1, len(found) * len(weight))
            layer = Layer(name, module, self._ties.fresh(len(weight)), inputs, 0, places)
            self._layers[name] = layer
        else:
            self._ties.tie(layer.inputs, inputs)
        layer.calls += 1
        return _Channels(dim, layer.outputs)

    def _pointwise(self, node: fx.Node, found: Any, words: str) -> _Value:
        value = self._input(node)
        is_alone = len(node.all_input_nodes) == 1 and isinstance(found, Tensor)
        return value if is_alone and found.shape == self._shapes[node.all_input_nodes[0]] else self._hold(node, words)

    def _pooled(self, node: fx.Node, found: Any, axes: int, words: str) -> _Value:
        value = self._input(node)
        if isinstance(value, _Channels) and not (isinstance(found, Tensor) and value.dim < found.ndim - axes):
            return self._hold(node, words)
        return value

    def _together(self, node: fx.Node, found: Any, words: str) -> _Value:
        """Tie channels that meet."""
        values = {each: self._values[each] for each in node.all_input_nodes}
        labelled = {each: value for each, value in values.items() if isinstance(value, _Channels)}
        if not labelled or not isinstance(found, Tensor):
            return self._hold(node, words) if labelled else next(iter(values.values()))
        # From the last axis, as broadcasting counts.
        axes = {found.ndim - len(self._shapes[each]) + value.dim for each, value in labelled.items()}
        dim, first = next(iter(axes)), next(iter(labelled.values()))
        if len(axes) > 1 or any(len(value.labels) != found.shape[dim] for value in labelled.values()):
            return self._hold(node, words)
        for value in labelled.values():
            self._ties.tie(first.labels, value.labels)
        for each, other in values.items():
            if isinstance(other, _Plain):
                self._ties.mix(first.labels)
                shape = self._shapes.get(each, torch.Size())
                place = dim - found.ndim + len(shape)
                if place >= 0 and shape[place] > 1:
                    name = _name_of(node.target)
                    self._ties.hold(first.labels, f"what meets, in {name}, {other.origin}")
        return _Channels(dim, first.labels)

    def _concatenated(self, node: fx.Node, found: Any, words: str) -> _Value:
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
        if not isinstance(parts, (tuple, list)) or not isinstance(dim, int):
            return self._hold(node, words)
        dim %= found.ndim
        nodes = [each for each in parts if isinstance(each, fx.Node)]
        values = [self._values[each] for each in nodes]
        channels = [value for value in values if isinstance(value, _Channels)]
        if not channels:
            return values[0]
        if any(value.dim != channels[0].dim for value in channels):
            return self._hold(node, words)
        if channels[0].dim != dim:
            return self._together(node, found, words) if len(channels) == len(values) else self._hold(node, words)
        labels = []
        for each, value in zip(nodes, values, strict=True):
            own = value.labels if isinstance(value, _Channels) else self._ties.fresh(self._shapes[each][dim])
            if isinstance(value, _Plain):
                self._ties.hold(own, value.origin)
            labels.append(own)
        return _Channels(dim, np.concatenate(labels))

    def _reshaped(self, node: fx.Node, found: Any, words: str) -> _Value:
        """Hand on channels whose axis stays, or is the first of those that become one."""
        value = self._input(node)
        if isinstance(value, _Plain):
            return value
        before, after, dim = self._shapes[node.all_input_nodes[0]], found.shape, value.dim
        sizes = _sizes_in(node)
        name = "flatten" if node.op == "call_module" else _name_of(node.target)
        if (
            name in ("view", "reshape")
            and isinstance(sizes[dim] if len(sizes) > dim else None, int)
            and sizes[dim] != -1
        ):
            return self._hold(node, f"what goes into {name}, whose sizes {sizes} the code fixes; write flatten(1)")
        # Without an axis to squeeze, a single channel that is left would be squeezed away.
        if name != "squeeze" or len(node.args) + len(node.kwargs) > 1:
            if after[: dim + 1] == before[: dim + 1]:
                return value
            if len(after) == dim + 1 and after[:dim] == before[:dim] and after[dim] == math.prod(before[dim:]):
                return _Channels(dim, np.repeat(value.labels, math.prod(before[dim + 1 :])))
        return self._hold(node, words)

    def _indexed(self, node: fx.Node, found: Any, words: str) -> _Value:
        """Hand on channels of which an index takes all, such as x[:, :, None, None]."""
        value = self._input(node)
        if isinstance(value, _Plain) or not isinstance(found, Tensor):
            return self._hold(node, words)
        index = node.args[1]
        axis = dim = 0
        for item in index if isinstance(index, tuple) else (index,):
            is_own = axis == value.dim and item is not None
            if not (item is None or isinstance(item, (int, slice))) or (is_own and item != slice(None)):
                return self._hold(node, words)
            if is_own:
                break
            axis += item is not None
            dim += not isinstance(item, int)
        return _Channels(dim + value.dim - axis, value.labels)

    def _averaged(self, node: fx.Node, found: Any, words: str) -> _Value:
        value = self._input(node)
        if isinstance(value, _Plain):
            return value
        given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        ndim = len(self._shapes[node.all_input_nodes[0]])
        axes = (
            [given] if isinstance(given, int) else list(given) if isinstance(given, (tuple, list)) else [*range(ndim)]
        )
        dims = {each % ndim for each in axes if isinstance(each, int)}
        if value.dim in dims or len(dims) < len(axes):
            return self._hold(node, words)
        return _Channels(value.dim - (sum(each < value.dim for each in dims) if found.ndim < ndim else 0), value.labels)

    def _input(self, node: fx.Node) -> _Value:
        return self._values[node.all_input_nodes[0]] if node.all_input_nodes else _Plain("a constant")

    def _hold(self, node: fx.Node, reason: str) -> _Value:
        """Let the channels that go into a node stay."""
        for each in node.all_input_nodes:
            value = self._values[each]
            if isinstance(value, _Channels):
                self._ties.hold(value.labels, reason)
        return _Plain(reason.replace("what goes into", "what comes out of", 1))


def _name_of(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _is_of_torch(target: Any) -> bool:
    """Return whether a function is PyTorch's or Python's own; methods, which come as names, are those of tensors."""
    module = getattr(target, "__module__", None) or "torch"
    return isinstance(target, str) or module.split(".")[0] in ("torch", "_operator", "builtins")


def _sizes_in(node: fx.Node) -> list[Any]:
    """Return the sizes that a view or a reshape is called with."""
    rest = node.args[1:] or tuple(node.kwargs.get(name) for name in ("size", "shape") if name in node.kwargs)
    return [*rest[0]] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else [*rest]
