"""DynamicSparsifier: finds a sparse model while it trains, by a trainable threshold for each output."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DistributedDataParallel

from masksolve._inputs import as_count, check_number
from masksolve._patterns import as_patterns
from masksolve.torch._dtensor import is_sharded
from masksolve.torch._dynamic.records import DensityReport, LayerDensity
from masksolve.torch._dynamic.thresholds import Thresholds, attach, detach, held, is_outermost, thresholds_name
from masksolve.torch._layers import (
    as_globs,
    check_module,
    is_recurrent,
    masked_attributes,
    select,
    thresholded_attributes,
)
from masksolve.torch._training.masking import owner_of


class DynamicSparsifier:
    """Dynamic sparse training: a model without a pattern, whose layers find their densities while they train.

    Every output (neuron, filter, row of a gate) of a Linear, a convolution or a recurrent layer gets a threshold, which
    starts at 0 and is trained with the weights. What is not larger than it in magnitude counts as zero, and comes back
    when it is again. `penalty()`, added to the loss, rewards large thresholds. `finalize` leaves a plain model with
    zeros, which `patterns_from_zeros` and `adaprune` make N:M.

    Parameters
    ----------
    model : nn.Module
        Changed in place: the modules get classes of their own, whose masked weights are properties. Its parameters keep
        their names and their order; for a weight `NAME.weight` of shape (outputs, ...) the Parameter
        `NAME.weight_thresholds` of shape (outputs,) is added, float32 where the weight has 16 bits. Make the optimizer
        and DistributedDataParallel after.
    alpha : float
        The weight of the penalty: larger, sparser. The authors' code has 5e-4 for LeNets on MNIST, 1e-4 for LSTMs and
        5e-6 for VGG and wide residual networks on CIFAR-10.
    include, exclude : str or sequence of str, optional
        Globs of parameter names, as for `Sparsifier`.
    guard : float or None
        The density at or below which a layer's thresholds all start at 0 again, at the beginning of a forward in
        training; None: never. As in the authors' code, recurrent layers have no guard.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, there is nothing to put under thresholds, a parameter is sharded, or the model has
        masks or thresholds already. It is left as it was.

    Notes
    -----
    With thresholds t, Q = abs(W) - t and the mask M = Q > 0, the layer computes with W * M. For the gradient G of that,
    W gets G * (M + abs(W) * H(Q)), and t of a row minus the sum of G * W * H(Q) over it. H estimates the derivative of
    the step: 2 - 4 abs(Q) up to 0.4, then 0.4, and 0 beyond 1. So a pruned weight learns while Q > -1.

    In the authors' code thresholds are in the optimizer's one group of parameters, so that weight decay pulls them to 0
    too; `thresholds()` has them for a group of their own.

    `module.weight` gives the masked weight. What changes it in place (`module.weight.clamp_()`, `torch.nn.init`)
    changes the dense one. Weights and thresholds are in the model's `state_dict`, and nothing else is needed to resume:
    make the DynamicSparsifier of the new model, then load.

    Source: Liu et al., ICLR 2020, arXiv 2005.06870, and its code.

    Examples
    --------
    >>> import torch
    >>> from masksolve.torch.dynamic import DynamicSparsifier
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    >>> dynamic = DynamicSparsifier(model, alpha=0.01)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> for step in range(1, 101):
    ...     x = torch.randn(32, 16)
    ...     loss = (model(x) - x[:, :4]).square().mean() + dynamic.penalty()
    ...     loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     if step % 50 == 0:
    ...         record = dynamic.record(step)
    >>> record.density < dynamic.records[0].density < 1
    True
    >>> dynamic.finalize()
    >>> list(model.state_dict()), int((model[0].weight != 0).sum()) == record.layers[0].kept
    (['0.weight', '0.bias', '2.weight', '2.bias'], True)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        guard: float | None = 0.01,
    ) -> None:
        _check_free(check_module(model))
        self.alpha = alpha
        if guard is not None:
            check_number(guard, "guard")
            if not 0 <= guard < 1:
                raise ValueError(f"guard is a density, at least 0 and below 1, or None, got {guard!r}")
        sites, report = select(
            model,
            as_patterns("1:1"),
            include=as_globs(include),
            exclude=as_globs(exclude),
            unfit=_unfit(model),
            verb="threshold",
        )
        _check_names(model, [site.name for site in sites])
        self._model = model
        self._is_final = False
        self._skipped = tuple(line for line in report if not line.sparse)
        self._names = tuple(site.name for site in sites)
        self._records: list[DensityReport] = []
        for site in sites:
            places = [owner_of(model, name) for name in site.names]
            home, attribute = places[0]
            weight = model.get_parameter(site.name)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            values = nn.Parameter(torch.zeros(len(weight), dtype=dtype, device=weight.device))
            thresholds = Thresholds(home, attribute, None if is_recurrent(home, attribute) else guard)
            home.register_parameter(thresholds.name, values)
            for owner, each in places:
                attach(owner, each, thresholds)

    @property
    def alpha(self) -> float:
        """The weight of the penalty. Can be set at any time."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        check_number(value, "alpha")
        if not 0 <= value < math.inf:
            raise ValueError(f"alpha must be finite and not negative, got {value!r}; 5e-4 and 5e-6 are usual")
        self._alpha = float(value)

    @property
    def records(self) -> tuple[DensityReport, ...]:
        """What `record` has returned so far."""
        return tuple(self._records)

    def penalty(self) -> Tensor:
        """Return alpha times the sum of exp(-t) over all thresholds t, to be added to the loss of every backward.

        Returns
        -------
        Tensor, shape ()
            On the device of the first thresholds.

        Raises
        ------
        RuntimeError
            After `finalize`.
        """
        sums = [torch.exp(-values).sum() for values in self.thresholds().values()]
        return self._alpha * torch.stack([each.to(sums[0]) for each in sums]).sum()

    def thresholds(self) -> dict[str, nn.Parameter]:
        """Return the thresholds by the names of their weights, for a group of the optimizer without weight decay.

        Raises
        ------
        RuntimeError
            After `finalize`, or where a layer was removed or replaced.

        Examples
        --------
        >>> import torch
        >>> layer = torch.nn.Linear(8, 4)
        >>> thresholds = DynamicSparsifier(layer, alpha=5e-4).thresholds()
        >>> {name: values.shape for name, values in thresholds.items()}
        {'weight': torch.Size([4])}
        >>> optimizer = torch.optim.SGD(
        ...     [
        ...         {"params": [layer.bias, dict(layer.named_parameters())["weight"]]},
        ...         {"params": list(thresholds.values()), "weight_decay": 0},
        ...     ],
        ...     lr=0.1,
        ...     weight_decay=1e-4,
        ... )
        """
        return {name: thresholds.values for name, (_, thresholds) in self._held().items()}

    def report(self) -> DensityReport:
        """Return how much each layer keeps now, and why other parameters stay dense.

        Raises
        ------
        RuntimeError
            As for `thresholds`.
        """
        return self._report(None)

    def record(self, step: int) -> DensityReport:
        """Append to `records` what each layer keeps at a step, and return it.

        Raises
        ------
        TypeError, ValueError
            If the step is not a whole number, or negative.
        RuntimeError
            As for `thresholds`.
        """
        self._records.append(self._report(as_count(step, "step", 0)))
        return self._records[-1]

    def finalize(self, model: nn.Module | None = None) -> None:
        """Write the zeros into the weights and remove the thresholds.

        The model has its own classes and `state_dict` keys again. The records stay; nothing else can be done with this
        object.

        Parameters
        ----------
        model : nn.Module, optional
            A copy of the model to finalize in its place, such as an EMA or a `copy.deepcopy`. This object and its own
            model go on.

        Raises
        ------
        ValueError
            If nothing in the copy has thresholds, or it is a part of the own model.
        RuntimeError
            If it was done before, a parameter is sharded, or its module was given another class since. The model is
            left as it was.
        """
        own = self._held()
        if model is None or any(each is self._model for each in check_module(model).modules()):
            _finalize(self._model)
            self._is_final = True
            return
        states = {id(thresholds) for _, thresholds in own.values()}
        if any(id(held(owner, attribute)[1]) in states for _, owner, attribute in _places(model)):
            raise ValueError(
                f"this {type(model).__name__} shares weights with the DynamicSparsifier's own model; finalize() does "
                "all of that, and a copy is made with copy.deepcopy"
            )
        _finalize(model)

    def _report(self, step: int | None) -> DensityReport:
        layers = []
        for name, (weight, thresholds) in self._held().items():
            kept = int(thresholds.kept(weight).sum())
            layers.append(LayerDensity(name=name, shape=tuple(weight.shape), kept=kept, density=kept / weight.numel()))
        return DensityReport(step=step, layers=tuple(layers), skipped=self._skipped)

    def _held(self) -> dict[str, tuple[nn.Parameter, Thresholds]]:
        """Return the dense weights and their thresholds, as they are now."""
        if self._is_final:
            raise RuntimeError(
                "this DynamicSparsifier is finalized: the model is a plain one again; make a new DynamicSparsifier"
            )
        found = {}
        for name in self._names:
            try:
                found[name] = held(*owner_of(self._model, name))
            except (AttributeError, KeyError):
                raise RuntimeError(
                    f"parameter {name!r} has no thresholds any more: its module was removed, replaced or given another "
                    "class; make a new DynamicSparsifier"
                ) from None
        return found


def _places(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Return the name of each weight under thresholds, its module and its name there."""
    return [
        (f"{path}.{attribute}" if path else attribute, module, attribute)
        for path, module in model.named_modules()
        for attribute in thresholded_attributes(module)
    ]


def _finalize(model: nn.Module) -> None:
    places = _places(model)
    if not places:
        raise ValueError(f"no parameter of this {type(model).__name__} has thresholds; there is nothing to finalize")
    for name, owner, attribute in places:
        if is_sharded(held(owner, attribute)[0]):
            raise RuntimeError(
                f"parameter {name!r} is sharded by fully_shard, which holds on to it; gather the state dict, load it "
                "into an unsharded model that has a DynamicSparsifier, and finalize that"
            )
        if not is_outermost(owner):
            raise RuntimeError(
                f"the module of parameter {name!r} was given the class {type(owner).__name__} after its thresholds "
                "were added, as torch.nn.utils.parametrize does; undo that first"
            )
    # All of them first: names of one weight share thresholds, which go with the first.
    with torch.no_grad():
        for _, owner, attribute in places:
            weight, thresholds = held(owner, attribute)
            # Adding zero turns the -0.0 of a negative weight into 0.0.
            weight.mul_(thresholds.kept(weight)).add_(0)
    for owner in {id(owner): owner for _, owner, _ in places}.values():
        detach(owner)


def _check_free(model: nn.Module) -> None:
    """Refuse a model that cannot get thresholds: one that is masked, sharded or wrapped already."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, DistributedDataParallel):
            # It shares the gradients of the parameters that it was made with.
            raise ValueError(
                "DistributedDataParallel would not see thresholds that come later; make the DynamicSparsifier first, "
                "then wrap"
            )
        for attribute in masked_attributes(module):
            raise ValueError(f"parameter {prefix + attribute!r} is masked by a Sparsifier; finalize it first")
        for attribute in thresholded_attributes(module):
            raise ValueError(
                f"parameter {prefix + attribute!r} has trainable thresholds already; finalize its DynamicSparsifier "
                "first"
            )
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ValueError(
                f"parameter {name!r} is sharded; dynamic sparse training needs whole weights: use "
                "DistributedDataParallel"
            )


def _check_names(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse a model that already has an attribute with the name of thresholds."""
    for name in names:
        owner, attribute = owner_of(model, name)
        if hasattr(owner, own := thresholds_name(attribute)):
            raise ValueError(
                f"the thresholds of parameter {name!r} are to have the name {own!r}, but its {type(owner).__name__} "
                "has something of that name; exclude the parameter, or rename that"
            )


def _unfit(model: nn.Module) -> dict[str, str]:
    """Return the parameters that get no thresholds even if they are included, and why."""
    found = {}
    for path, module in model.named_modules():
        for attribute in module._parameters:
            if not _has_outputs_first(module, attribute):
                name = f"{path}.{attribute}" if path else attribute
                # The output projection of an attention, which never calls that layer.
                is_attention = isinstance(module, NonDynamicallyQuantizableLinear)
                kind = "MultiheadAttention" if is_attention else type(module).__name__
                found[name] = f"part of {kind}; only Linear, convolution and recurrent layers get thresholds"
    return found


def _has_outputs_first(owner: nn.Module, attribute: str) -> bool:
    """Return whether the first axis of a parameter is that of its layer's outputs, and the layer is called."""
    if isinstance(owner, (_ConvTransposeNd, NonDynamicallyQuantizableLinear)):
        return False
    is_weight = attribute == "weight" and isinstance(owner, (nn.Linear, _ConvNd))
    return is_weight or is_recurrent(owner, attribute)
