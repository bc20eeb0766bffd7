"""Masked parameters: how a mask comes and goes, what reading the parameter gives, and what its gradient is.

The Parameter keeps its place, its name and its identity in `module._parameters`, so that optimizers, checkpoints and
everything else that goes by names see an unchanged model. The mask is a buffer beside it. The module gets a class of
its own, a subclass of the one that it had, in which the parameter's name is a property: whoever reads it, in the
module's forward or elsewhere, gets the masked weight.
"""

from __future__ import annotations

import copyreg
import weakref
from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import Any, Literal, NamedTuple, cast, get_args
from uuid import uuid4

import torch
from torch import Tensor, nn

from masksolve._pattern import Pattern
from masksolve.torch._dtensor import is_sharded
from masksolve.torch._training.masked_read import MaskedRead
from masksolve.torch._training.read_once import read_once, reading_once

Gradient = Literal["ste", "sr-ste", "masked", "soft"]
GRADIENTS: tuple[Gradient, ...] = get_args(Gradient)
# A mask -> what is wrong with it for the weight that asks, in words; None if nothing is.
MaskFault = Callable[[Tensor], str | None]


class Shared:
    """What the masks of a Sparsifier have in common.

    Attributes
    ----------
    scale : float
        That of the loss whose backward comes next, as of a GradScaler: the decay of "sr-ste" is scaled with it.
    """

    def __init__(self) -> None:
        self.scale = 1.0
        self._origin = uuid4()

    def is_copy_of(self, other: Shared) -> bool:
        """Return whether this was copied from another one, or from what that was copied from."""
        return self is not other and self._origin == other._origin


class MaskedWeight:
    """The state of one masked parameter, however many names it has; a copy of the model has a copy.

    Parameters
    ----------
    home : nn.Module
        The module that has the mask among its buffers: the first of those that share the parameter. Were it a buffer
        of each of them, checkpoints would hold tensors that share memory, which safetensors refuses.
    attribute : str
        The parameter's name there.
    mask : Tensor of bool, shaped like the weight
        True = kept.
    gradient : {"ste", "sr-ste", "masked", "soft"}
        What the dense weight gets for the gradient g of the masked one: g; g + decay * (1 - mask) * weight; mask * g;
        g. Under "soft" the weight is multiplied with more than the mask: see `set_thresholds`.
    decay : float
        How strongly "sr-ste" pulls pruned weights to zero.
    shared : Shared
        By all masks of the Sparsifier.
    fault : callable
        Judges masks that come from elsewhere.
    thin : Pattern or None
        What a Linear thins the gradients of its outputs to, for the product that gives the weight's gradient.
    """

    def __init__(
        self,
        home: nn.Module,
        attribute: str,
        *,
        mask: Tensor,
        gradient: Gradient,
        decay: float,
        shared: Shared,
        fault: MaskFault,
        thin: Pattern | None = None,
    ) -> None:
        self.home = home
        self.buffer = mask_name(attribute)
        self.gradient = gradient
        self.decay = decay
        self.shared = shared
        self.fault = fault
        self.thin = thin
        # The buffer that the weight is multiplied with.
        self.multiplier = self.buffer
        # Whether anything has read the parameter; compiled code does not set it.
        self.is_read = False
        # Whether this belongs to a copy of the Sparsifier's model, which the Sparsifier does not update.
        self.is_copy = False
        home.register_buffer(self.buffer, mask)
        if gradient == "soft":
            self.multiplier = f"{attribute}_{_FACTOR}"
            weight = cast(nn.Parameter, home._parameters[attribute]).detach()
            home.register_buffer(self.multiplier, torch.empty_like(weight).copy_(mask))
            home.register_buffer(self.scale, torch.ones((), dtype=weight.dtype, device=weight.device))

    @property
    def counter(self) -> str:
        """The name of the buffer that counts steps, beside the mask; one of a Sparsifier's masks has it."""
        return f"{self.buffer}_steps"

    @property
    def scale(self) -> str:
        """The name of the buffer that has the scale of "soft"."""
        return f"{self.multiplier}_scale"

    @property
    def buffers(self) -> tuple[str, ...]:
        """The names of all buffers that there may be."""
        softened = (self.multiplier, self.scale) if self.gradient == "soft" else ()
        return self.buffer, self.counter, *softened

    @property
    def mask(self) -> Tensor:
        """The mask. It changes in place, and is another tensor after the model has moved."""
        return cast(Tensor, self.home._buffers[self.buffer])

    @property
    def factor(self) -> Tensor:
        """What the weight is multiplied with: the mask, or its shrunken form."""
        return cast(Tensor, self.home._buffers[self.multiplier])

    def absent(self, mask: Tensor) -> Tensor:
        """Return where a masked weight has not the dense one's value: where it is pruned, under "soft" anywhere."""
        return torch.ones_like(mask) if self.gradient == "soft" else ~mask

    def set_mask(self, mask: Tensor) -> None:
        """Replace the mask: the one way to do it from within the package, as packed forms have to know."""
        self.mask.copy_(mask)
        self.look()

    def set_thresholds(self, weight: Tensor, thresholds: Tensor, *, rescale: bool = False) -> None:
        """Shrink the masked weight, as it is now, by thresholds: scale * sign(w) * max(abs(w) - threshold, 0) is left.

        As factors, so that until the next refresh it is masked as ever, by a mask that is not 0 and 1.

        Parameters
        ----------
        rescale : bool
            Whether to choose the scale first: that which brings what is left closest to the dense weight, by least
            squares.
        """
        dense = weight.detach().float() if weight.dtype != torch.float64 else weight.detach()
        sizes = dense.abs()
        shares = ((sizes - thresholds.to(sizes)).clamp_(min=0) / sizes).nan_to_num_(0) * self.mask
        scale = cast(Tensor, self.home._buffers[self.scale])
        if rescale and bool(shares.any()):
            left = sizes * shares
            scale.copy_((sizes * left).sum() / left.square().sum())
        self.factor.copy_(shares.mul_(scale))

    @property
    def softening(self) -> dict[str, Tensor]:
        """The factor and the scale of "soft"; empty for other gradients."""
        if self.gradient != "soft":
            return {}
        return {"factor": self.factor, "scale": cast(Tensor, self.home._buffers[self.scale])}

    def look(self) -> None:
        """Note that the mask has changed. Does nothing for a mask that is only multiplied with."""

    def __call__(self, weight: Tensor, mask: Tensor) -> Tensor:
        """Return the masked weight, of the same shape and dtype; `mask` is the factor, or a shard or replica of it."""
        # Dynamo traces autograd functions only without a jvp of their own, and no subclasses are needed there.
        if torch.compiler.is_compiling():
            return weight * mask if self.gradient == "masked" else _apply(_StraightThrough, weight, mask)
        self.is_read = True
        if self.gradient == "sr-ste":
            self.watch(weight)
        if is_sharded(weight) and not _lie_alike(weight, mask):
            # FSDP outside a forward: it reads its own shards, and nothing else can be computed with them.
            return weight
        transformed = is_transformed()
        needs_gradient = transformed or (weight.requires_grad and torch.is_grad_enabled())
        if not needs_gradient or torch._C._get_tracing_state() is not None:
            value = masked_product(weight, mask)
        elif self.gradient != "masked":
            value = _apply(_TransformableStraightThrough, weight, mask)
        else:
            value = weight * mask if transformed else _apply(_Masking, weight, mask)
        # Changes of a transformation's values reach nothing.
        return MaskedRead.of(value, weight, mask) if type(weight) is nn.Parameter and not transformed else value

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.is_copy = True
        # This and its home have each other, and either may be filled first.
        if "_parameters" in vars(self.home):
            _look(self.home)

    def watch(self, weight: Tensor) -> None:
        """Make the gradient of a dense weight get the decay of "sr-ste", once however many backwards add to it.

        As a hook of the weight itself, which is called with the sum of its gradients: every use of the masked weight in
        a forward adds to that sum, and would add a decay of its own.
        """
        if self.gradient == "sr-ste" and weight.requires_grad:
            hooks: dict[int, Any] = weight._backward_hooks or {}
            if not any(isinstance(hook, _Decay) for hook in hooks.values()):
                weight.register_hook(_Decay(self, weight))


class _Decay:
    def __init__(self, masked: MaskedWeight, weight: Tensor) -> None:
        # Python's collector does not see a cycle through PyTorch's hooks.
        self.masked = weakref.ref(masked)
        self.weight = weakref.ref(weight)

    def __call__(self, grad: Tensor) -> Tensor | None:
        weight, masked = self.weight(), self.masked()
        if weight is None or masked is None:
            return None
        pruned = (~masked.mask).to(weight.dtype)
        if weight.grad is not None:
            # What has been accumulated has it already, unless it is zero. A tensor, so that a GPU is not waited for.
            pruned *= ~weight.grad.any()
        # A copy may train elsewhere, in a loop of another scale.
        scale = 1.0 if masked.is_copy else masked.shared.scale
        return torch.addcmul(grad, weight, pruned, value=scale * masked.decay)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return masked_product(weight, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _TransformableStraightThrough(_StraightThrough):
    """The same under vmap, and forward: a tangent of the dense weight passes like a gradient, as both are estimates."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.clone()


class _Masking(torch.autograd.Function):
    """The masked weight with its true gradient, whose gradient is the same function."""

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return masked_product(weight, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _, mask = inputs
        ctx.save_for_backward(mask)
        ctx.save_for_forward(mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _apply(_Masking, grad, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _apply(_Masking, tangent, *ctx.saved_tensors)


def masked_product(weight: Tensor, mask: Tensor) -> Tensor:
    """Return weight * mask, two to three times faster than torch.where on a CPU; pruned weights may become -0.0."""
    # Dynamo cannot trace what follows the first question.
    if torch.compiler.is_compiling() or is_transformed() or torch._C._get_tracing_state() is not None:
        return weight * mask
    if weight.device.type == "cpu" and mask.dtype == torch.bool:
        # A product of two dtypes converts the mask first, in memory of its own: here that is the result's.
        return mask.to(weight.dtype).mul_(weight)
    return weight * mask


def is_transformed() -> bool:
    """Return whether one of torch.func's transformations runs."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _apply(function: type[torch.autograd.Function], weight: Tensor, mask: Tensor) -> Tensor:
    return cast(Tensor, function.apply(weight, mask))


def _lie_alike(weight: Tensor, mask: Tensor) -> bool:
    return is_sharded(weight) and is_sharded(mask) and weight.device_mesh == mask.device_mesh


def mask_name(attribute: str) -> str:
    """Return the name of the buffer that holds the mask of a parameter."""
    return f"{attribute}_mask"


# The end of the name of the buffer that shrinks a parameter.
_FACTOR = "mask_factor"


@cache
def _masked_class(
    base: type[nn.Module], attributes: tuple[str, ...], forward: Callable[..., Tensor] | None
) -> type[nn.Module]:
    """Make the subclass of a module's class that masks some of its parameters.

    One for all modules of a class, so that what torch.compile makes of one of them serves the others. It holds nothing
    of a module.
    """

    class Masked(base):  # type: ignore[misc, valid-type]
        _unmasked = (base, attributes, forward)
        _masked_attributes = attributes

        def __delattr__(self, name: str) -> None:
            # torch.nn.utils.parametrize deletes first, and would take the masked weight for the dense one.
            if name in attributes:
                raise RuntimeError(
                    f"{name!r} of this {base.__name__} is masked by a Sparsifier: it can be neither deleted nor "
                    "parametrized; finalize the Sparsifier first"
                )
            super().__delattr__(name)

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            super()._apply(fn, recurse)
            _look(self)
            return self

        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
            *_, errors = rest
            # If this module is the whole model, its own guard runs later, and refuses the whole state_dict.
            if not guards(self) and (faults := mask_faults(self, state_dict, prefix)):
                # As for a shape that does not fit: all else is loaded, and the caller raises.
                errors += [f"{fault}; the mask stays as it was" for fault in faults.values()]
                state_dict = {**state_dict, **{key: self._buffers[key.removeprefix(prefix)] for key in faults}}
            super()._load_from_state_dict(state_dict, prefix, *rest)
            _look(self)

        def __setstate__(self, state: Any) -> None:
            super().__setstate__(state)
            _look(self)

        def __reduce_ex__(self, protocol: Any) -> Any:
            rebuild, arguments, *rest = super().__reduce_ex__(protocol)
            if rebuild is not copyreg.__newobj__ or arguments[0] is not Masked:  # type: ignore[attr-defined]
                return rebuild, arguments, *rest
            return _rebuild, (base, attributes, forward, *arguments[1:]), *rest

        def __prepare_scriptable__(self) -> None:
            raise RuntimeError(
                f"torch.jit.script cannot compile this {base.__name__} while a Sparsifier masks its "
                f"{' and '.join(attributes)}; finalize the Sparsifier, or a copy of the model, first"
            )

    for attribute in attributes:
        setattr(Masked, attribute, property(_reader(attribute), _writer(attribute)))
    if forward is not None:
        Masked.forward = forward
    elif issubclass(base, nn.MultiheadAttention):
        Masked.forward = _run_once(base.forward)
    Masked.__name__, Masked.__qualname__ = f"Masked{base.__name__}", f"Masked{base.__qualname__}"
    # Tracers recognise the layers of torch.nn by it.
    Masked.__module__ = base.__module__
    Masked.__doc__ = base.__doc__
    return Masked


def _run_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward in which a parameter is masked once, however often it is read.

    That of MultiheadAttention reads its weights three times, twice to look at their shape and dtype.
    """

    @wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        with reading_once(self):
            return forward(self, *args, **kwargs)

    return run


def _reader(attribute: str) -> Callable[[Any], Tensor | None]:
    def read(self: Any) -> Tensor | None:
        return read_once(self, attribute, compute)

    def compute(self: Any) -> Tensor | None:
        # The replicas of DataParallel have plain attributes in place of parameters.
        held = self._parameters if attribute in self._parameters else self.__dict__
        try:
            weight: Tensor | None = held[attribute]
            masked = self._masked[attribute]
            buffer = masked.multiplier
            factor = self._buffers[buffer] if buffer in self._buffers else masked.factor  # noqa: SIM401 - another's
            return None if weight is None else masked(weight, factor)
        except (AttributeError, KeyError) as error:
            # On an AttributeError nn.Module would return the dense weight.
            raise RuntimeError(f"the masked parameter {attribute!r} cannot be read: {error!r}") from error

    return read


def _writer(attribute: str) -> Callable[[Any, Any], None]:
    def write(self: Any, value: Any) -> None:
        if not getattr(self, "_is_replica", False):
            raise RuntimeError(
                f"parameter {attribute!r} is masked by a Sparsifier and was taken away from its module; finalize first"
            )
        self.__dict__[attribute] = value

    return write


def _rebuild(
    base: Any, attributes: tuple[str, ...], forward: Callable[..., Tensor] | None, *arguments: Any
) -> nn.Module:
    """Make a module as pickle and copy do before they fill it."""
    made: Any = _masked_class(base, attributes, forward)
    return cast(nn.Module, made.__new__(made, *arguments))


def _look(module: nn.Module) -> None:
    """Look again at the masks of a module whose parameters or buffers have been replaced."""
    for attribute, masked in _masks(module).items():
        if not vars(masked):
            # A copy, of which nothing is filled yet.
            continue
        masked.look()
        weight = module._parameters.get(attribute)
        if weight is not None:
            masked.watch(weight)


def _masks(module: nn.Module) -> dict[str, MaskedWeight]:
    found: dict[str, MaskedWeight] = getattr(module, "_masked", {})
    return found if hasattr(type(module), "_unmasked") else {}


def unmasked_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, apart from its masks."""
    base: type[nn.Module] = getattr(type(module), "_unmasked", (type(module),))[0]
    return base


class Held(NamedTuple):
    """A masked parameter as its module holds it."""

    weight: nn.Parameter
    masked: MaskedWeight


def masked_parameter(owner: nn.Module, attribute: str) -> Held | None:
    """Return the dense weight and the mask of a masked parameter, as they are now; None if it is not masked."""
    masked, weight = _masks(owner).get(attribute), owner._parameters.get(attribute)
    return None if masked is None or weight is None else Held(weight, masked)


def owner_of(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    """Return the module that owns the parameter of a name, and its attribute there."""
    path, _, attribute = parameter.rpartition(".")
    return model.get_submodule(path), attribute


def check_names(model: nn.Module, parameters: Iterable[str]) -> None:
    """Refuse a model that already has an attribute with the name of a mask."""
    for parameter in parameters:
        owner, attribute = owner_of(model, parameter)
        if hasattr(owner, mask_name(attribute)):
            raise ValueError(
                f"the mask of parameter {parameter!r} is to be the buffer {mask_name(attribute)!r}, but its "
                f"{type(owner).__name__} has something of that name; exclude the parameter, or rename that"
            )


def attach(
    owner: nn.Module, attribute: str, masked: MaskedWeight, forward: Callable[..., Tensor] | None = None
) -> None:
    """Mask a parameter of a module, and replace the module's forward if one is given."""
    base, attributes, own = vars(type(owner)).get("_unmasked", (type(owner), (), None))
    vars(owner).setdefault("_masked", {})[attribute] = masked
    owner.__class__ = _masked_class(base, (*attributes, attribute), forward or own)
    _look(owner)


def is_outermost(owner: nn.Module) -> bool:
    """Return whether the masking class is the module's own, and none was put on top, as FSDP and parametrize do."""
    return "_unmasked" in vars(type(owner))


def write_zeros(owner: nn.Module, attribute: str) -> None:
    """Write the zeros into a masked parameter."""
    weight, masked = cast(Held, masked_parameter(owner, attribute))
    with torch.no_grad():
        # Adding zero turns the -0.0 of a negative weight into 0.0; DTensor of PyTorch 2.6 refuses a float.
        weight.mul_(masked.factor).add_(torch.zeros_like(weight))


def detach(owner: nn.Module, attribute: str) -> None:
    """Make a masked parameter a plain one again."""
    weight = cast(nn.Parameter, owner._parameters[attribute])
    hooks: dict[int, Any] = weight._backward_hooks or {}
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Decay)]:
        del hooks[key]
    masked = vars(owner)["_masked"].pop(attribute)
    if masked.home is owner:
        for buffer in masked.buffers:
            owner._buffers.pop(buffer, None)
    base, attributes, forward = cast(Any, type(owner))._unmasked
    rest = tuple(each for each in attributes if each != attribute)
    owner.__class__ = _masked_class(base, rest, forward) if rest else base
    if not rest:
        del vars(owner)["_masked"]


def mask_faults(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> dict[str, str]:
    """Say what is wrong with the masks that a state_dict has for a module's own parameters: key -> words."""
    found = {}
    for masked in _masks(module).values():
        key = f"{prefix}{masked.buffer}"
        mask = state_dict.get(key)
        if masked.home is module and isinstance(mask, Tensor) and not mask.is_meta and mask.shape == masked.mask.shape:
            fault = masked.fault(mask)
            if fault is not None:
                found[key] = f"{key}: {fault}"
    return found


def guards(module: nn.Module) -> list[int]:
    """Return the keys of a module's hooks that refuse a state_dict with faulty masks."""
    hooks: dict[int, Any] = module._load_state_dict_pre_hooks
    return [key for key, wrapped in hooks.items() if getattr(wrapped, "hook", None) is refuse_masks]


# A function, not a method: copies of the model have it, and must not copy a Sparsifier.
def refuse_masks(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse, before anything is loaded, a state_dict with a mask that the model's Sparsifier cannot have made."""
    for path, module in model.named_modules():
        for fault in mask_faults(module, state_dict, f"{prefix}{path}." if path else prefix).values():
            raise RuntimeError(
                f"the state_dict has a mask that the model's Sparsifier cannot have made: {fault}; nothing was loaded; "
                "make the Sparsifier for the pattern and direction that were saved, or leave out the masks, load with "
                "strict=False, and find masks of the new weights with the Sparsifier's refresh()"
            )


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
