"""A masked weight: the parametrization that holds the mask, its gradients, and how it comes and goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Gradient = Literal["ste", "sr-ste", "masked"]
GRADIENTS: tuple[Gradient, ...] = get_args(Gradient)
# A mask -> what is wrong with it for the weight that asks, in words; None if nothing is.
MaskFault = Callable[[Tensor], str | None]


class MaskedWeight(nn.Module):
    """The parametrization of one weight: zero where the mask is False.

    Attributes
    ----------
    mask : Tensor of bool, shaped like the weight
        True = kept. A persistent buffer, changed in place.
    decay : Tensor, a scalar
        How strongly "sr-ste" pulls pruned weights to zero. A buffer, so that changing it recompiles nothing.
    gradient : {"ste", "sr-ste", "masked"}
        What the dense weight gets for the gradient g of the masked one: g; g + decay * (1 - mask) * weight; mask * g.
    fault : callable
        Judges masks that come from elsewhere.
    """

    mask: Tensor
    decay: Tensor

    def __init__(self, mask: Tensor, gradient: Gradient, decay: float, fault: MaskFault) -> None:
        super().__init__()
        self.gradient = gradient
        self.fault = fault
        self.register_buffer("mask", mask)
        self.register_buffer("decay", torch.tensor(decay, device=mask.device), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight, of the same shape and dtype."""
        return cast(Tensor, _Mask.apply(weight, self.mask, self.decay, self.gradient))  # type: ignore[no-untyped-call]

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is assigned to the parameter becomes the dense weight."""
        return weight

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"gradient={self.gradient!r}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        key = f"{prefix}mask"
        mask = state_dict.get(key)
        is_judged = isinstance(mask, Tensor) and not mask.is_meta and mask.shape == self.mask.shape
        fault = self.fault(cast(Tensor, mask)) if is_judged else None
        if fault is not None:
            # As where a shape does not fit: all else is loaded, and whoever called raises.
            *_, errors = rest
            errors.append(f"{key}: {fault}; the mask stays as it was")
            state_dict = {**state_dict, key: self.mask}
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Mask(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, mask: Tensor, decay: Tensor, gradient: Gradient) -> Tensor:
        # On a CPU two to three times faster than torch.where; pruned weights may become -0.0.
        return weight * mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Gradient], output: Tensor) -> None:
        weight, mask, decay, ctx.gradient = inputs
        if ctx.gradient == "sr-ste":
            ctx.save_for_backward(weight, mask, decay)
        elif ctx.gradient == "masked":
            ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.gradient == "sr-ste":
            weight, mask, decay = ctx.saved_tensors
            grad = grad + decay * (weight * ~mask)
        elif ctx.gradient == "masked":
            (mask,) = ctx.saved_tensors
            grad = grad * mask
        return grad, None, None, None


def attach(owner: nn.Module, attribute: str, masked: MaskedWeight) -> None:
    """Mask a parameter of a module. The Parameter stays the same object, so that optimizers keep theirs."""
    order = tuple(owner._parameters)
    was_parametrized = parametrize.is_parametrized(owner)
    weight = cast(nn.Parameter, getattr(owner, attribute))
    # Registering resets the autograd node of the parameter, on which DDP waits for its gradient: so on a stand-in.
    setattr(owner, attribute, nn.Parameter(weight.detach(), weight.requires_grad))
    parametrize.register_parametrization(owner, attribute, masked)
    cast(nn.ModuleDict, owner.parametrizations)[attribute].original = weight
    if not was_parametrized:
        # state_dict lists parameters in this order, and optimizers number them by it; `detach` restores it.
        vars(owner.parametrizations)["order"] = order


def masked_parameter(owner: nn.Module, attribute: str) -> tuple[nn.Parameter, MaskedWeight] | None:
    """The dense weight of a masked parameter and its mask, as they are now; None if it is not masked."""
    if not parametrize.is_parametrized(owner, attribute):
        return None
    held = cast(nn.ModuleDict, owner.parametrizations)[attribute]
    masked = next((each for each in cast(nn.ModuleList, held) if isinstance(each, MaskedWeight)), None)
    return None if masked is None else (cast(nn.Parameter, held.original), masked)


def check_weight(name: str, weight: Tensor, masked: MaskedWeight) -> None:
    """Refuse a parameter that has lost its values, or whose shape is not that of its mask any more."""
    if weight.is_meta:
        raise ValueError(
            f"parameter {name!r} is on the meta device now and has no values; materialise the model first (to_empty "
            "and load_state_dict)"
        )
    if weight.shape != masked.mask.shape:
        raise ValueError(
            f"parameter {name!r} has shape {tuple(weight.shape)} now, and had {tuple(masked.mask.shape)} when it was "
            "masked; finalize before changing shapes, and make a new Sparsifier after"
        )


def detach(owner: nn.Module, attribute: str) -> None:
    """Write the zeros into a masked parameter and make it a plain one again."""
    found = masked_parameter(owner, attribute)
    assert found is not None
    weight, masked = found
    with torch.no_grad():
        # Adding zero turns the -0.0 of a negative weight into 0.0.
        weight.mul_(masked.mask).add_(0.0)
    order: tuple[str, ...] = vars(owner.parametrizations).get("order", ())
    # Copies share the class that parametrize made, from which it would take the property of all of them.
    shared = type(owner)
    owner.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    parametrize.remove_parametrizations(owner, attribute, leave_parametrized=False)
    for name in order:
        if name in owner._parameters:
            owner._parameters[name] = owner._parameters.pop(name)
