"""Where the inputs of a weight come from: calls of its layer, or products that another module's forward makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from masksolve.torch._layers import (
    Layout,
    experts_lie_transposed,
    is_conv1d,
    is_recurrent,
    is_stack_of_experts,
    layout_of,
)


@dataclass(frozen=True)
class Source:
    """A weight, and the module whose calls show its inputs.

    A Linear is called with the inputs of its weight. Attentions, recurrent layers and stacks of experts multiply with
    theirs within their own forward: such a weight `is_multiplied`, and each of its matrices, which are the groups of
    its layout, may get other inputs.

    Attributes
    ----------
    module : nn.Module
        The one that is called.
    owner, attribute : nn.Module, str
        Where the weight is.
    """

    module: nn.Module
    owner: nn.Module
    attribute: str = "weight"

    @property
    def is_multiplied(self) -> bool:
        """Whether the module's forward multiplies with the weight, instead of being called with its inputs."""
        is_own = self.module is self.owner and self.attribute == "weight"
        return not is_own or is_stack_of_experts(self.owner, self.attribute)

    @property
    def weight(self) -> nn.Parameter:
        """The weight."""
        found: nn.Parameter = getattr(self.owner, self.attribute)
        return found

    @property
    def layout(self) -> Layout:
        """The axes of the weight, whichever way it is masked."""
        return layout_of(self.owner, self.attribute)

    @property
    def operators(self) -> Tensor:
        """The matrices (groups, outputs, inputs) of the weight."""
        return self.layout.operators(self.weight.detach())

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias that is added to what all of its matrices return, if the owner has such a one."""
        name = self.attribute.replace("weight", "bias")
        bias = self.owner._parameters.get(name if name != self.attribute else f"{name}_bias")
        return bias if bias is not None and bias.numel() == self.operators[..., 0].numel() else None

    def output(self, weight: Tensor, bias: Tensor | None, x: Tensor, groups: range) -> Tensor:
        """Return what these groups of the weight, with the bias, make of rows of inputs or images."""
        if isinstance(self.owner, _ConvNd):
            found: Tensor = self.owner._conv_forward(x, weight, bias)
            return found
        chosen = slice(groups.start, groups.stop)
        added = None if bias is None else bias.view(self.operators.shape[:2])[chosen].flatten()
        return functional.linear(x, self.layout.operators(weight)[chosen].flatten(0, 1), added)


def called(module: nn.Module) -> Source:
    """Return the source of the inputs that a module is called with, whatever it does with them."""
    return Source(module, module)


def sources_of(model: nn.Module) -> dict[str, Source]:
    """Return the weights that AdaPrune can repair, by name."""
    found: dict[str, Source] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for owner, attribute in _weights(module):
            # A parametrized weight is computed again for each product.
            if owner._parameters.get(attribute) is not None:
                parts = [path, "" if owner is module else "out_proj", attribute]
                # The modules of an attention come after it.
                found.setdefault(".".join(filter(None, parts)), Source(module, owner, attribute))
    return found


@contextmanager
def replaced_forwards(
    modules: Iterable[nn.Module], replace: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Let each module call what `replace` makes of its forward, within the context."""
    own = {module: module.__dict__.get("forward") for module in modules}
    try:
        for module in own:
            module.__dict__["forward"] = replace(module, module.forward)
        yield
    finally:
        for module, forward in own.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


def _weights(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the owner and the name of each weight that the calls of a module multiply with."""
    is_convolution = isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)
    if isinstance(module, nn.Linear) or is_convolution or is_conv1d(module):
        yield module, "weight"
        return
    if isinstance(module, torch.jit.ScriptModule):
        return
    if isinstance(module, nn.MultiheadAttention):
        yield from ((module, name) for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"))
        yield module.out_proj, "weight"
    for name in module._parameters:
        is_known = is_stack_of_experts(module, name) and experts_lie_transposed(module) is not None
        if is_known or is_recurrent(module, name):
            yield module, name
