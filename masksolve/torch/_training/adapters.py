"""Adapters of low rank for fine-tuning sparse models: they are merged without losing a zero.

The Parameter that is adapted keeps its place and its name, as a masked one does, and is frozen; the adapter's two are
Parameters beside it. The module gets a subclass of its class in which the weight's name is a property: whoever reads
it gets the sum.
"""

from __future__ import annotations

import copyreg
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parallel import DistributedDataParallel

from masksolve._inputs import as_count, check_number
from masksolve._patterns import as_patterns
from masksolve.torch._dtensor import is_sharded
from masksolve.torch._layers import (
    Layout,
    adapted_attributes,
    as_globs,
    check_module,
    is_recurrent,
    is_stack_of_experts,
    layout_of,
    select,
)
from masksolve.torch._training.masked_read import DETACHED, share_memory
from masksolve.torch._training.masking import owner_of

_TENSOR: Any = Tensor
_DISABLED = torch._C.DisableTorchFunctionSubclass
_FROZEN = "_frozen_for_adapters"
_FSDP = "torch.distributed.fsdp."


@dataclass(frozen=True, kw_only=True, repr=False)
class AdapterReport:
    """One parameter of a model: adapted, or not and why. A tied one has a line for every name.

    Attributes
    ----------
    name : str
    shape : tuple of int
        () for parameters that are not initialised yet.
    adapted : bool
        Whether it has an adapter.
    reason : str or None
        Why it has none, or to which name it is tied; None for all others.
    zeros : float or None
        The share of its entries that are zero and stay so; None without an adapter.
    """

    name: str
    shape: tuple[int, ...]
    adapted: bool
    reason: str | None = None
    zeros: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dict."""
        return asdict(self)

    def __repr__(self) -> str:
        state = f"adapted, {self.zeros:.1%} zeros" if self.adapted else "frozen"
        shape = "x".join(map(str, self.shape)) or "no shape"
        return f"AdapterReport({self.name!r}, {shape}, {state}{f': {self.reason}' if self.reason else ''})"


def add_adapters(
    model: nn.Module,
    rank: int,
    *,
    scale: float = 1.0,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> tuple[AdapterReport, ...]:
    """Freeze a model, and add to its weights adapters that can be merged without losing a zero.

    A weight W computes as W + scale * B A where W is not zero, and as 0 where it is: LoRA under the zeros that are
    there (MaskLoRA). So a model that is N:M sparse is fine-tuned as the sparse model that `merge_adapters` makes of it.
    Which weights these are follows the rule of `Sparsifier`: those of Linear, convolution and attention layers and of
    transformers' Conv1D; embeddings, routers and the like only if they are included. A weight without zeros gets an
    ordinary LoRA.

    Every other parameter is frozen until `merge_adapters`; set `requires_grad` of those that are to be trained too. For
    a weight `NAME.weight` the Parameters `NAME.weight_lora_a` (rank, inputs), random, and `NAME.weight_lora_b`
    (outputs, rank), zero, are added, and are in the `state_dict`; with a leading axis where a weight holds several
    matrices (grouped convolutions, queries, keys and values). They are float32 where the weight has 16 bits. There is
    no dropout. Make the optimizer, DistributedDataParallel and `fully_shard` after.

    Parameters
    ----------
    model : nn.Module
        Changed in place. A weight under a Sparsifier's mask has to be finalized first.
    rank : int
        Columns of B and rows of A, at least 1.
    scale : float
        What PEFT calls lora_alpha / r. It is a buffer, `NAME.weight_lora_scale`, which a `state_dict` brings too.
    include, exclude : str or sequence of str, optional
        Globs of parameter names, as for `Sparsifier`.

    Returns
    -------
    tuple of AdapterReport
        A line for every parameter.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, nothing can be adapted, or the model has adapters already. It is left as it was.

    Examples
    --------
    >>> import torch, masksolve.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> masksolve.torch.Sparsifier(model, "2:4").finalize()
    >>> masksolve.torch.add_adapters(model, rank=2)[0]
    AdapterReport('0.weight', 8x8, adapted, 50.0% zeros)
    >>> [name for name, each in model.named_parameters() if each.requires_grad]
    ['0.weight_lora_a', '0.weight_lora_b', '2.weight_lora_a', '2.weight_lora_b']
    >>> optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=0.01)
    >>> for _ in range(3):
    ...     (model(torch.ones(1, 8)) - 1).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> adapted = model(torch.ones(1, 8))
    >>> masksolve.torch.merge_adapters(model)
    >>> torch.equal(model(torch.ones(1, 8)), adapted), int((model[0].weight != 0).sum()), list(model.state_dict())
    (True, 32, ['0.weight', '0.bias', '2.weight', '2.bias'])
    """
    rank = as_count(rank, "rank", 1)
    check_number(scale, "scale")
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"scale must be finite and not 0, got {scale!r}; 1.0 and 2.0 are usual")
    for name, module in check_module(model).named_modules():
        if adapted_attributes(module):
            raise ValueError(f"{name or 'this model'} has adapters already; merge them first")
        if isinstance(module, DistributedDataParallel):
            # It shares the gradients of the parameters that it was made with.
            raise ValueError(
                "DistributedDataParallel would not see adapters that come later; add them first, then wrap"
            )
    sites, lines = select(
        model,
        as_patterns("1:1"),
        include=as_globs(include),
        exclude=as_globs(exclude),
        unfit=_unfit(model),
        verb="adapt",
    )
    places = [[owner_of(model, name) for name in site.names] for site in sites]
    _check_names((site.name, *own[0]) for site, own in zip(sites, places, strict=True))
    zeros: dict[str, float] = {}
    adapters = []
    for site, own in zip(sites, places, strict=True):
        weight = model.get_parameter(site.name)
        zeros.update(dict.fromkeys(site.names, 1 - int(torch.count_nonzero(weight)) / weight.numel()))
        adapters.append((_Adapter(*own[0]), _new(weight, layout_of(*own[0]), rank)))
    # Nothing fails from here on.
    vars(model)[_FROZEN] = tuple(name for name, each in model.named_parameters() if each.requires_grad)
    model.requires_grad_(False)
    for own, (adapter, values) in zip(places, adapters, strict=True):
        a, b, buffer = adapter.names
        adapter.home.register_parameter(a, values[0])
        adapter.home.register_parameter(b, values[1])
        adapter.home.register_buffer(buffer, torch.tensor(scale, dtype=values[0].dtype, device=values[0].device))
        for owner, attribute in own:
            vars(owner).setdefault("_adapted", {})[attribute] = adapter
            base, attributes = vars(type(owner)).get("_unadapted", (type(owner), ()))
            owner.__class__ = _adapted_class(base, (*attributes, attribute))
    return tuple(
        AdapterReport(
            name=line.name, shape=line.shape, adapted=line.sparse, reason=line.reason, zeros=zeros.get(line.name)
        )
        for line in lines
    )


def merge_adapters(model: nn.Module) -> None:
    """Add the adapters of a model to its weights, and remove every trace of them.

    The merged weights are those that the adapted model computed with, to the bit, and every zero stays zero. What
    `add_adapters` has frozen is trainable again.

    Parameters
    ----------
    model : nn.Module
        Changed in place; a copy of an adapted model, such as an EMA, can be merged too.

    Raises
    ------
    ValueError
        If nothing in the model is adapted.
    RuntimeError
        If a merged weight would not be finite, a weight is sharded, or a module was given another class since. The
        model is left as it was.

    Examples
    --------
    >>> import torch, masksolve.torch
    >>> model = torch.nn.Linear(4, 4)
    >>> _ = masksolve.torch.add_adapters(model, rank=1)
    >>> masksolve.torch.merge_adapters(model)
    >>> [name for name, each in model.named_parameters() if each.requires_grad]
    ['weight', 'bias']
    """
    places = [
        (f"{path}.{attribute}" if path else attribute, module, attribute)
        for path, module in check_module(model).named_modules()
        for attribute in adapted_attributes(module)
    ]
    if not places:
        raise ValueError(f"this {type(model).__name__} has no adapters; there is nothing to merge")
    for name, owner, attribute in places:
        if is_sharded(owner._parameters[attribute]):
            raise RuntimeError(
                f"parameter {name!r} is sharded by fully_shard, which holds on to it; gather the state dict with "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict and full_state_dict=True, load it into "
                "an unsharded model that has adapters, and merge those"
            )
        if "_unadapted" not in vars(type(owner)):
            raise RuntimeError(
                f"the module of parameter {name!r} was given the class {type(owner).__name__} after its adapter was "
                "added, as torch.nn.utils.parametrize does; undo that first"
            )
        weight = cast(nn.Parameter, owner._parameters[attribute])
        with torch.no_grad():
            merged = cast(Tensor, vars(owner)["_adapted"][attribute].merged(weight))
            if not torch.isfinite(merged).all() and torch.isfinite(weight).all():
                raise RuntimeError(
                    f"parameter {name!r} would not be finite with its adapter; it has diverged: load an earlier "
                    "state_dict"
                )
    # Tied weights have one adapter under several names.
    done: set[int] = set()
    for _, owner, attribute in places:
        adapter = cast(_Adapter, vars(owner)["_adapted"][attribute])
        weight = cast(nn.Parameter, owner._parameters[attribute])
        if id(weight) not in done:
            done.add(id(weight))
            with torch.no_grad():
                weight.copy_(adapter.merged(weight))
    for _, owner, attribute in places:
        adapter = vars(owner)["_adapted"].pop(attribute)
        if adapter.home is owner:
            for own in adapter.names:
                delattr(owner, own)
        if not vars(owner)["_adapted"]:
            del vars(owner)["_adapted"]
            owner.__class__ = cast(Any, type(owner))._unadapted[0]
    # The model may be wrapped by now.
    for module in model.modules():
        trained = set(vars(module).pop(_FROZEN, ()))
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if name in trained:
                parameter.requires_grad_(True)


def adapter_names(attribute: str) -> tuple[str, str, str]:
    """Return the names of the Parameters A and B, and of the buffer with the scale, of the adapter of a parameter."""
    return f"{attribute}_lora_a", f"{attribute}_lora_b", f"{attribute}_lora_scale"


def _unfit(model: nn.Module) -> dict[str, str]:
    """Return the parameters that cannot be adapted even if they are included, and why."""
    found = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if is_stack_of_experts(module, attribute):
                reason = "a stack of experts: each expert that runs would compute the sums of all of them"
            elif is_recurrent(module, attribute):
                reason = "of a recurrent layer, which keeps its weights elsewhere too and would not see an adapter"
            elif isinstance(module, _ConvTransposeNd):
                reason = "of a transposed convolution, for which there are no adapters"
            elif is_sharded(parameter):
                reason = "a shard: add adapters before the model is sharded"
            else:
                continue
            found[f"{path}.{attribute}" if path else attribute] = reason
    return found


def _check_names(owners: Iterable[tuple[str, nn.Module, str]]) -> None:
    """Refuse a model that already has an attribute with the name of an adapter's parameter."""
    for name, owner, attribute in owners:
        for own in adapter_names(attribute):
            if hasattr(owner, own):
                raise ValueError(
                    f"the adapter of parameter {name!r} is to have the name {own!r}, but its {type(owner).__name__} "
                    "has something of that name; exclude the parameter, or rename that"
                )


class _Adapter:
    """The adapter of one parameter, however many names that has; a copy of the model has a copy."""

    def __init__(self, home: nn.Module, attribute: str) -> None:
        self.home = home
        self.names = adapter_names(attribute)
        self.layout = layout_of(home, attribute)

    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight with the adapter, of the same shape and dtype."""
        a, b, scale = self.names
        own: list[Any] = [self.home._parameters[a], self.home._parameters[b], self.home._buffers[scale]]
        operators = cast(Tensor, _MaskedSum.apply(self.layout.operators(weight), *own))  # type: ignore[no-untyped-call]
        return self.layout.weight_of(operators, weight.shape)

    def __call__(self, weight: Tensor) -> Tensor:
        """Return what reading the weight gives."""
        value = self.merged(weight)
        # Apart: compilers of PyTorch before 2.8 stop at the second question.
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return value
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return value
        # What stands in for a tensor while PyTorch before 2.8 exports a model cannot be of another class.
        return value.as_subclass(AdaptedRead) if type(value) is Tensor else value


def _new(weight: Tensor, layout: Layout, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Make A, random as the weight of a Linear is, and B, zero."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    groups, outputs, inputs = layout.operators(weight).shape
    lead = () if groups == 1 else (groups,)
    bound = 1 / math.sqrt(inputs)
    a = torch.empty(*lead, rank, inputs, dtype=dtype, device=weight.device).uniform_(-bound, bound)
    return nn.Parameter(a), nn.Parameter(torch.zeros(*lead, outputs, rank, dtype=dtype, device=weight.device))


class _MaskedSum(torch.autograd.Function):
    """W + scale * B A where W is not zero; for backward it keeps what is there anyway, and no mask and no product."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        # The merged weight does not know of autocast either.
        with torch.autocast(weight.device.type, enabled=False):
            product = (b @ a).view(weight.shape)
        # Not times the mask, which an infinite product makes NaN, and +0.0 would change the sign of -0.0.
        return torch.where(weight != 0, (weight + scale * product).to(weight.dtype), weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        weight, a, b, scale = ctx.saved_tensors
        kept = torch.where(weight != 0, grad, torch.zeros_like(grad))
        with torch.autocast(weight.device.type, enabled=False):
            product = (scale * kept.to(a.dtype)).view(*b.shape[:-1], a.shape[-1])
            # The weight's own, should somebody train it too, keeps the zeros as well.
            return kept if ctx.needs_input_grad[0] else None, b.mT @ product, product @ a.mT, None


@cache
def _adapted_class(base: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    """Make the subclass of a module's class in which some parameters are read with their adapters.

    One for all modules of a class, so that what torch.compile makes of one of them serves the others.
    """

    class Adapted(base):  # type: ignore[misc, valid-type]
        _unadapted = (base, attributes)
        _adapted_attributes = attributes

        def __delattr__(self, name: str) -> None:
            # torch.nn.utils.parametrize deletes first, and would take the sum for the weight.
            if name in attributes:
                raise RuntimeError(
                    f"{name!r} of this {base.__name__} has an adapter: it can be neither deleted nor parametrized; "
                    "merge_adapters first"
                )
            super().__delattr__(name)

        def __reduce_ex__(self, protocol: Any) -> Any:
            rebuild, arguments, *rest = super().__reduce_ex__(protocol)
            if rebuild is not copyreg.__newobj__ or arguments[0] is not Adapted:  # type: ignore[attr-defined]
                return rebuild, arguments, *rest
            return _rebuild, (base, attributes, *arguments[1:]), *rest

        def __prepare_scriptable__(self) -> None:
            raise RuntimeError(
                f"torch.jit.script cannot compile this {base.__name__} while its {' and '.join(attributes)} has an "
                "adapter; merge_adapters first"
            )

    for attribute in attributes:
        setattr(Adapted, attribute, property(_reader(attribute), _writer(attribute)))
    Adapted.__name__, Adapted.__qualname__ = f"Adapted{base.__name__}", f"Adapted{base.__qualname__}"
    # Tracers recognise the layers of torch.nn by it.
    Adapted.__module__ = base.__module__
    Adapted.__doc__ = base.__doc__
    return Adapted


def _reader(attribute: str) -> Callable[[Any], Tensor | None]:
    def read(self: Any) -> Tensor | None:
        try:
            weight: Tensor | None = self._parameters[attribute]
            # FSDP looks for its own shards by their names, and would take a sum for a weight that was replaced.
            if weight is None or (is_sharded(weight) and sys._getframe(1).f_globals["__name__"].startswith(_FSDP)):
                return weight
            return cast(Tensor, self._adapted[attribute](weight))
        except (AttributeError, KeyError) as error:
            # On an AttributeError nn.Module would return the weight without its adapter.
            raise RuntimeError(f"the adapted parameter {attribute!r} cannot be read: {error!r}") from error

    return read


def _writer(attribute: str) -> Callable[[Any, Any], None]:
    def write(self: Any, value: Any) -> None:
        if getattr(self, "_is_replica", False):
            raise RuntimeError("DataParallel replicates no adapters; use DistributedDataParallel, or merge_adapters")
        raise RuntimeError(
            f"parameter {attribute!r} has an adapter and was taken away from its module; merge_adapters first"
        )

    return write


def _rebuild(base: Any, attributes: tuple[str, ...], *arguments: Any) -> nn.Module:
    """Make a module as pickle and copy do before they fill it."""
    made: Any = _adapted_class(base, attributes)
    return cast(nn.Module, made.__new__(made, *arguments))


class AdaptedRead(Tensor):
    """The values of an adapted weight, or a view of them: made again at each read, so that a change would be lost."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute with the values, and refuse to change them."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        target = args[0] if args else next(iter(kwargs.values()), None)
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace")
        changed = [target] if in_place or func == _TENSOR.data.__set__ else [kwargs.get("out")]
        if any(isinstance(each, AdaptedRead) for each in changed):
            raise RuntimeError(
                "this is the sum of a weight and its adapter, made again at each read, and a change of it would be "
                "lost; change the Parameters (`dict(model.named_parameters())[...]`), or merge_adapters first"
            )
        with _DISABLED():
            result = func(*args, **kwargs)
            is_view = isinstance(result, Tensor) and result._is_view()
            if func in DETACHED or (is_view and share_memory(result, target)):
                return result.as_subclass(AdaptedRead)
            return result
