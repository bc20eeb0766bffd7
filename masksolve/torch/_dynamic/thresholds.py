"""Weights under trainable thresholds: what reading one gives, its gradients, and how thresholds come and go.

The Parameter keeps its place and its name, as under a Sparsifier, and its thresholds are a Parameter beside it. The
module gets a subclass of its class in which the weight's name is a property: whoever reads it gets the masked weight.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from masksolve.torch._training.masked_read import MaskedRead
from masksolve.torch._training.masking import is_transformed, masked_product
from masksolve.torch._training.read_once import read_once, reading_once

# A module's attribute: its Thresholds by the weights' names.
_STATE = "_thresholds"


class Thresholds:
    """The thresholds of one weight, however many names it has; a copy of the model has a copy.

    Parameters
    ----------
    home : nn.Module
        The module that has the thresholds among its Parameters: the first of those that share the weight.
    attribute : str
        The weight's name there.
    guard : float or None
        The density at or below which they start at zero again; None: never.
    """

    def __init__(self, home: nn.Module, attribute: str, guard: float | None) -> None:
        self.home = home
        self.name = thresholds_name(attribute)
        self.guard = guard

    @property
    def values(self) -> nn.Parameter:
        """The thresholds: one for each entry of the weight's first axis."""
        return cast(nn.Parameter, self.home._parameters[self.name])

    @torch.no_grad()
    def kept(self, weight: Tensor) -> Tensor:
        """Return the mask of the weight, as both are now: True = kept."""
        return _excess(weight, self.values) > 0

    @torch.no_grad()
    def restart_if_empty(self, weight: Tensor) -> None:
        """Set all thresholds to zero if they leave no more of the weight than the guard allows."""
        if self.guard is not None:
            kept = self.kept(weight)
            # A tensor, so that a GPU is not waited for.
            self.values.masked_fill_(kept.sum() / kept.numel() <= self.guard, 0)

    def __call__(self, weight: Tensor) -> Tensor:
        """Return what reading the weight gives."""
        # A copy, because the guard changes the thresholds in place, between a forward and its backward too.
        value, kept = _Thresholding.apply(weight, self.values.clone())  # type: ignore[no-untyped-call]
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or is_transformed():
            return cast(Tensor, value)
        return MaskedRead.of(value, weight, kept) if type(weight) is nn.Parameter else cast(Tensor, value)


class _Thresholding(torch.autograd.Function):
    """The masked weight and its mask, with the long-tailed estimate of the step's derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        kept = _excess(weight, thresholds) > 0
        return masked_product(weight, kept), kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weight, thresholds = ctx.saved_tensors
        excess = _excess(weight, thresholds)
        grad = grad.to(excess.dtype)
        through_step = grad * long_tail(excess)
        of_weight = of_thresholds = None
        if ctx.needs_input_grad[0]:
            # As numbers: products of bools and floats are slow on a CPU.
            kept = (excess > 0).to(excess.dtype)
            of_weight = torch.addcmul(grad * kept, through_step, weight.abs()).to(weight.dtype)
        if ctx.needs_input_grad[1]:
            of_thresholds = -(through_step * weight).sum(tuple(range(1, weight.ndim)))
        return of_weight, of_thresholds


def _excess(weight: Tensor, thresholds: Tensor) -> Tensor:
    """Return by how much magnitudes exceed the thresholds of their rows, in the wider of both dtypes."""
    return weight.abs() - thresholds.view(-1, *[1] * (weight.ndim - 1))


def long_tail(excess: Tensor) -> Tensor:
    """Return the estimate of the derivative of the unit step: 2 - 4|x|, from 0.4 on 0.4, beyond 1 nothing.

    Source: Xu and Cheung, BMVC 2019, for binary networks.
    """
    distance = excess.abs()
    ends = (distance <= 1).to(distance.dtype)
    # The line falls below 0.4 where the tail begins.
    return distance.mul_(-4).add_(2).clamp_(min=0.4).mul_(ends)


def thresholds_name(attribute: str) -> str:
    """Return the name of the Parameter that holds the thresholds of a weight."""
    return f"{attribute}_thresholds"


class _Thresholded:
    """What is put before a module's class."""

    _unthresholded: tuple[type[nn.Module], tuple[str, ...]]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            for attribute, thresholds in getattr(self, _STATE).items():
                # Where it was taken away, reading it says so.
                if (weight := self._parameters.get(attribute)) is not None:
                    thresholds.restart_if_empty(weight)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __delattr__(self, name: str) -> None:
        base, attributes = self._unthresholded
        # torch.nn.utils.parametrize deletes first, and would take the masked weight for the dense one.
        if name in attributes:
            raise RuntimeError(
                f"{name!r} of this {base.__name__} has trainable thresholds: it can be neither deleted nor "
                "parametrized; finalize its DynamicSparsifier first"
            )
        super().__delattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        rebuild, arguments, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        made = arguments[0]
        if rebuild is not copyreg.__newobj__ or "_unthresholded" not in vars(made):  # type: ignore[attr-defined]
            return rebuild, arguments, *rest
        return _rebuild, (*made._unthresholded, *arguments[1:]), *rest

    def __prepare_scriptable__(self) -> None:
        base, attributes = self._unthresholded
        raise RuntimeError(
            f"torch.jit.script cannot compile this {base.__name__} while its {' and '.join(attributes)} has trainable "
            "thresholds; finalize the DynamicSparsifier, or a copy of the model, first"
        )


class _ThresholdedRecurrent(_Thresholded):
    """The same for what keeps its weights in a list of its own, which its kernels get: that list is read anew."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, _: Any) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Do nothing: what a forward computes with is not there before, nor after."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # nn.RNNBase reads its weights several times.
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        with reading_once(self):
            return super().forward(*args, **kwargs)


@cache
def _thresholded_class(base: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    """Make the subclass of a module's class in which some weights are read through their thresholds."""
    kind = _ThresholdedRecurrent if issubclass(base, nn.RNNBase) else _Thresholded
    own: dict[str, Any] = {each: property(_reader(each), _writer(each)) for each in attributes}
    # Tracers recognise the layers of torch.nn by the module of their class.
    own |= {"_unthresholded": (base, attributes), "_thresholded_attributes": attributes, "__module__": base.__module__}
    return type(f"Thresholded{base.__name__}", (kind, base), {**own, "__doc__": base.__doc__})


def _reader(attribute: str) -> Callable[[Any], Tensor | None]:
    def read(self: Any) -> Tensor | None:
        return read_once(self, attribute, compute)

    def compute(self: Any) -> Tensor | None:
        try:
            weight: Tensor | None = self._parameters[attribute]
            return None if weight is None else getattr(self, _STATE)[attribute](weight)
        except (AttributeError, KeyError) as error:
            # On an AttributeError nn.Module would return the dense weight.
            raise RuntimeError(f"the masked parameter {attribute!r} cannot be read: {error!r}") from error

    return read


def _writer(attribute: str) -> Callable[[Any, Any], None]:
    def write(self: Any, value: Any) -> None:
        if getattr(self, "_is_replica", False):
            raise RuntimeError("DataParallel replicates no thresholds; use DistributedDataParallel, or finalize")
        raise RuntimeError(
            f"parameter {attribute!r} has trainable thresholds and was taken away from its module; finalize its "
            "DynamicSparsifier first"
        )

    return write


def _rebuild(base: Any, attributes: tuple[str, ...], *arguments: Any) -> nn.Module:
    """Make a module as pickle and copy do before they fill it."""
    made: Any = _thresholded_class(base, attributes)
    return cast(nn.Module, made.__new__(made, *arguments))


def attach(owner: nn.Module, attribute: str, thresholds: Thresholds) -> None:
    """Put a weight of a module under thresholds, which its home has among its Parameters."""
    base, attributes = vars(type(owner)).get("_unthresholded", (type(owner), ()))
    vars(owner).setdefault(_STATE, {})[attribute] = thresholds
    owner.__class__ = _thresholded_class(base, (*attributes, attribute))


def held(owner: nn.Module, attribute: str) -> tuple[nn.Parameter, Thresholds]:
    """Return a dense weight under thresholds, and these."""
    return cast(nn.Parameter, owner._parameters[attribute]), vars(owner)[_STATE][attribute]


def is_outermost(owner: nn.Module) -> bool:
    """Return whether the class with thresholds is the module's own, and none was put on top, as parametrize does."""
    return "_unthresholded" in vars(type(owner))


def detach(owner: nn.Module) -> None:
    """Make the weights of a module plain ones again, with their dense values."""
    for thresholds in vars(owner).pop(_STATE).values():
        if thresholds.home is owner:
            del owner._parameters[thresholds.name]
    owner.__class__ = cast(Any, type(owner))._unthresholded[0]
    if isinstance(owner, nn.RNNBase):
        # Its own list is of the Parameters that it had before.
        owner._init_flat_weights()
