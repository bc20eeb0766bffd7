"""prune_filters: a model made smaller, by the channels that matter least to the layers that read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from masksolve._globs import matches, none_of
from masksolve._inputs import as_count, check_choice, check_number
from masksolve._kinds import each_reason_once
from masksolve.torch._batches import as_batches, call, does_not_run
from masksolve.torch._dtensor import is_sharded
from masksolve.torch._filters.allocation import (
    Allocation,
    C,
    OneError,
    OneRatio,
    log_factor,
    probabilities_of,
    search,
)
from masksolve.torch._filters.bound import proven_error
from masksolve.torch._filters.channels import ChannelMap, Group, Labels
from masksolve.torch._filters.empty import drop_empty
from masksolve.torch._filters.records import ChannelGroup, FilteredLayer, FilterReport
from masksolve.torch._filters.sampling import METHODS, Choice, Method, choose, ranked
from masksolve.torch._filters.sensitivity import PARTS, Part, Sensitivity, largest_of_readers
from masksolve.torch._filters.surgery import Surgery
from masksolve.torch._filters.tracing import trace
from masksolve.torch._layers import adapted_attributes, as_globs, check_module, masked_attributes
from masksolve.torch._outputs import evaluated, outputs_of, relative_change, rounding

# How far from what was asked the result may be, as a share of it, and how often another share is tried.
_NEAR = 0.005
_ATTEMPTS = 50


def prune_filters(
    model: nn.Module,
    calibration: Iterable[Any],
    keep: float,
    *,
    method: Method = "pfp",
    sensitivity: Part = "element",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    delta: float = 1e-16,
    seed: int = 0,
) -> FilterReport:
    """Cut whole filters out of a model, so that it is smaller and dense, by Provable Filter Pruning or by norms.

    A channel is cut from every layer that makes it, norms it and reads it. Channels that are added up are cut together.
    Which belong together is found by tracing the model with torch.fx.

    Parameters
    ----------
    model : nn.Module
        Changed in place; after an error, or an interrupt, it is as it was. Modules and parameters stay the same
        objects, of other shapes: make a new optimizer.
    calibration : iterable
        Batches of inputs without labels, each a tensor, a sequence of positional arguments or a mapping of keyword
        arguments. A few hundred points are enough; norms need one.
    keep : float
        The share of all parameters that remains, above 0 and at most 1. The nearest that whole channels allow is taken.
    method : {"pfp", "pfp-random", "pfp-top", "l1", "l2"}
        "pfp" keeps the channels of largest sensitivity in each group, and as many of them as an error ε asks for, which
        is the same for all groups. "pfp-random" draws them by their sensitivities instead, and multiplies each by how
        often it was drawn over how often that was expected, so that what is computed from them has the right mean;
        "pfp-top" does so for the less probable ones alone. "l1" and "l2" keep the same ratio of every group, the
        filters of largest norm.
    sensitivity : {"element", "share"}
        What is taken for a channel's part in an output: its largest term, as the authors' code does, or the sum of all
        its terms, on which the bound in docs/proof.md rests. They differ where a channel is read at several places.
    include, exclude : str or iterable of str, optional
        Globs of the names of weights whose filters may be cut, such as "features.*", and of those that may not.
    delta : float
        The probability with which an error may be larger.
    seed : int
        The same seed gives the same draws.

    Returns
    -------
    FilterReport

    Raises
    ------
    ValueError
        If the model cannot be traced, has no filters that can be cut, is masked or sharded, cannot be made so small, or
        returns something else when it is called again; or if a batch does not run through it.

    Notes
    -----
    Liebenwein, Baykal, Lang, Feldman, Rus, "Provable Filter Pruning for Efficient Neural Networks", ICLR 2020,
    arXiv:1911.07412. docs/filters.md says what is guaranteed.

    Examples
    --------
    >>> import torch
    >>> from masksolve.torch.filters import prune_filters
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(20, 300), torch.nn.ReLU(), torch.nn.Linear(300, 10))
    >>> prune_filters(model, [torch.randn(64, 20)], keep=0.5)
    FilterReport(pfp, 4,660 of 9,310 parameters (50.05%, asked 50.00%), 150 of 300 channels in 1 group)
    >>> model[0], model[2]
    (Linear(in_features=20, out_features=150, bias=True), Linear(in_features=150, out_features=10, bias=True))
    """
    _check(model)
    check_choice(method, "method", METHODS)
    check_choice(sensitivity, "sensitivity", PARTS)
    for name, value in {"keep": keep, "delta": delta}.items():
        check_number(value, name)
        if not (0 < value <= 1):
            raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")
    options = _Options(method, sensitivity, keep, delta, as_count(seed, "seed", 0))
    globs = _Globs(as_globs(include), as_globs(exclude))
    batches = as_batches(calibration)
    with torch.no_grad(), evaluated(model):
        return _Pruning(model, batches, options, globs).run()


@dataclass(frozen=True)
class _Options:
    method: Method
    part: Part
    keep: float
    delta: float
    seed: int

    @property
    def is_by_norm(self) -> bool:
        return self.method in ("l1", "l2")


@dataclass(frozen=True)
class _Globs:
    include: Sequence[str] | None
    exclude: Sequence[str] | None

    def reason(self, name: str) -> str | None:
        """Return why the filters of a weight are left, if they are."""
        excluding = next((glob for glob in self.exclude or () if matches(name, [glob])), None)
        if excluding is not None:
            return f"excluded by {excluding!r}"
        return "not included" if self.include is not None and not matches(name, self.include) else None

    def check(self, names: Sequence[str]) -> None:
        """Refuse globs that match no weight."""
        for option, globs in (("include", self.include), ("exclude", self.exclude)):
            for glob in globs or ():
                if not any(matches(name, [glob]) for name in names):
                    raise ValueError(f"{option} {glob!r} matches {none_of(names, 'weight')}")


@dataclass(frozen=True, eq=False)
class _Attempt:
    """What became of one share that was asked for."""

    share: float
    at: float
    choices: Sequence[Choice]
    predicted: int
    size: int
    emptied: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _Scored:
    """The groups, without what is empty, and of each the scores of its channels and the sums that gave them."""

    groups: Sequence[Group]
    scores: Sequence[NDArray[np.float64]]
    sums: Sequence[int]
    parameters: int


class _Pruning:
    """One call."""

    def __init__(self, model: nn.Module, batches: list[Any], options: _Options, globs: _Globs) -> None:
        self._model, self._batches, self._options = model, batches, options
        self._parameters = _count(model)
        self._outputs = self._run(0)
        if not relative_change(self._outputs, self._run(0)) <= rounding(model):
            raise ValueError(
                f"this {type(model).__name__} returns something else when it is called again, or NaN, so that nothing "
                "can be compared; make it deterministic, or give other inputs"
            )
        self._channels = trace(model, batches[0], self._outputs, globs.reason)
        _check_groups(model, self._channels, globs)
        self._surgery = Surgery(self._channels)
        self._labels = {layer.name: (layer.outputs, layer.inputs) for layer in self._channels.layers}

    def run(self) -> FilterReport:
        """Prune the model."""
        try:
            return self._pruned()
        except BaseException:
            self._surgery.undo(0)
            raise

    def _pruned(self) -> FilterReport:
        surgery, target = self._surgery, self._options.keep * self._parameters
        drop_empty(surgery, self._show)
        first = surgery.gone
        self._compare(self._outputs, "without filters that are empty")
        scored = self._scored()
        allocation = self._allocation(scored)
        self._check_budget(scored, target)
        mark = surgery.mark
        attempt = self._nearest(scored, allocation, target)
        surgery.undo(mark)
        surgery.scale(self._factors(scored, attempt.choices))
        reference = self._run(0)
        surgery.undo(mark)
        self._apply(scored, attempt.choices)
        deviation = self._compare(reference, "with these channels at zero")
        return self._report(scored, attempt, first | attempt.emptied, deviation)

    def _scored(self) -> _Scored:
        """Score all channels that are left."""
        channels = self._channels
        groups = [Group(each.layers, each.classes[~self._surgery.gone[each.classes]]) for each in channels.groups]
        if self._options.is_by_norm:
            scores, sums = _norms(channels, 1 if self._options.method == "l1" else 2), [0] * len(groups)
        else:
            free = channels.free
            seen = {
                layer.module: Sensitivity(layer, self._options.part)
                for layer in channels.layers
                if free[layer.inputs].any()
            }
            for index in range(len(self._batches)):
                self._run(index, {module: each.add for module, each in seen.items()})
            scores = largest_of_readers(list(seen.values()), channels.classes)
            sums = [sum(seen[layer.module].sums for layer in channels.readers(group)) for group in groups]
        return _Scored(groups, [scores[group.classes] for group in groups], sums, _count(self._model))

    def _allocation(self, scored: _Scored) -> Allocation:
        if self._options.is_by_norm:
            return OneRatio([len(each) for each in scored.scores])
        weights = []
        for group, scores in zip(scored.groups, scored.scores, strict=True):
            readers = self._channels.readers(group)
            places = sum(layer.places for layer in readers)
            kernel = max((_columns(layer.inputs, group) * layer.kernel for layer in readers), default=1)
            # A channel of no sensitivity at all still comes back if all are to be kept.
            total = max(float(scores.sum()), np.finfo(np.float64).tiny)
            weights.append(total * log_factor(places, kernel, self._options.delta))
        return OneError([probabilities_of(each) for each in scored.scores], weights)

    def _check_budget(self, scored: _Scored, target: float) -> None:
        least = self._size(scored, [1] * len(scored.groups))
        if least > target * (1 + _NEAR):
            stay = [(layer.name, layer.reason) for layer in self._channels.layers if layer.reason is not None]
            raise ValueError(
                f"keep={self._options.keep} of {self._parameters:,} parameters cannot be met: with one channel of each "
                f"group {least:,} remain ({least / self._parameters:.2%}). Filters that stay: "
                f"{each_reason_once([*stay, *self._channels.others.items()])}"
            )

    def _nearest(self, scored: _Scored, allocation: Allocation, target: float) -> _Attempt:
        """Try shares until the size is near enough: draws, and filters that become empty, make it differ."""
        mark = self._surgery.mark
        best = last = self._attempt(scored, allocation, self._options.keep, 0)
        # What is not drawn and leaves nothing empty is the nearest already.
        tries = _ATTEMPTS if best.size != best.predicted else 0
        low, high = 0.4 * self._options.keep, max(self._options.keep, 0.999)
        for number in range(1, tries + 1):
            if abs(best.size - target) < _NEAR * target:
                break
            low, high = (last.share, high) if last.size < target else (low, last.share)
            self._surgery.undo(mark)
            last = self._attempt(scored, allocation, (low + high) / 2, number)
            best = min(best, last, key=lambda each: abs(each.size - target))
        return best

    def _attempt(self, scored: _Scored, allocation: Allocation, share: float, number: int) -> _Attempt:
        def size(counts: Sequence[int]) -> int:
            return self._size(scored, counts)

        most = [len(scores) for scores in scored.scores]
        at, counts = search(size, allocation, most, share * self._parameters)
        rng = np.random.default_rng([self._options.seed, number])
        pairs = zip(scored.scores, counts, strict=True)
        choices = [choose(scores, count, self._options.method, rng) for scores, count in pairs]
        predicted = size(counts)
        emptied = self._apply(scored, choices)
        return _Attempt(share, at, choices, predicted, _count(self._model), emptied)

    def _apply(self, scored: _Scored, choices: Sequence[Choice]) -> NDArray[np.bool_]:
        """Cut what is not chosen, and what is empty then; return the latter."""
        factors = self._factors(scored, choices)
        self._surgery.scale(np.where(factors > 0, factors, 1))
        self._surgery.cut(factors == 0)
        before = self._surgery.gone
        drop_empty(self._surgery, self._show)
        return self._surgery.gone & ~before

    def _factors(self, scored: _Scored, choices: Sequence[Choice]) -> NDArray[np.float64]:
        """Return by what each class is multiplied; 1 for those that stay in any case."""
        found = np.ones(self._channels.classes)
        for group, choice in zip(scored.groups, choices, strict=True):
            found[group.classes] = choice.factors
        return found

    def _size(self, scored: _Scored, counts: Sequence[int]) -> int:
        """Return the number of parameters with so many of the best channels of each group."""
        cut = np.zeros(self._channels.classes, dtype=bool)
        for group, scores, count in zip(scored.groups, scored.scores, counts, strict=True):
            cut[group.classes[ranked(scores)[count:]]] = True
        return self._channels.parameters_without(cut, scored.parameters)

    def _report(self, scored: _Scored, attempt: _Attempt, emptied: NDArray[np.bool_], deviation: float) -> FilterReport:
        options, gone, target = self._options, self._surgery.gone, self._options.keep * self._parameters
        near = abs(attempt.size - target) < _NEAR * target
        is_drawn = any(choice.draws is not None for choice in attempt.choices)
        one = "ratio" if options.is_by_norm else "error"
        note = "no draw came nearer" if is_drawn else f"whole channels allow none nearer at one {one} for all groups"
        sizes = [layer.places * len(self._labels[layer.name][0]) for layer in self._channels.layers]
        return FilterReport(
            method=options.method,
            asked=float(options.keep),
            kept=attempt.size / self._parameters,
            parameters_before=self._parameters,
            parameters_after=attempt.size,
            note=None if near else note,
            epsilon=None if options.is_by_norm else math.exp(attempt.at),
            points=sum(_points(batch) for batch in self._batches),
            points_asked=math.ceil(C * math.log(8 * max(sizes) * sum(sizes) / options.delta)),
            deviation=deviation,
            layers=tuple(
                _layer(layer.name, *self._labels[layer.name], gone, layer.reason) for layer in self._channels.layers
            ),
            groups=tuple(
                self._group(group, scored, place, attempt.choices[place], emptied)
                for place, group in enumerate(self._channels.groups)
            ),
            untouched=tuple(self._channels.others.items()),
        )

    def _group(
        self, group: Group, scored: _Scored, place: int, choice: Choice, emptied: NDArray[np.bool_]
    ) -> ChannelGroup:
        scores = np.zeros(self._channels.classes)
        scores[scored.groups[place].classes] = scored.scores[place]
        is_proven = self._options.method == "pfp-random" and self._options.part == "share" and choice.draws is not None
        error = None
        if is_proven and choice.draws is not None:
            total, failure = float(scored.scores[place].sum()), self._options.delta / scored.sums[place]
            error = proven_error(choice.draws, total, failure)
        return ChannelGroup(
            layers=group.layers,
            readers=tuple(layer.name for layer in self._channels.readers(group)),
            channels=len(group.classes),
            kept=int(np.count_nonzero(~self._surgery.gone[group.classes])),
            emptied=int(np.count_nonzero(emptied[group.classes])),
            scores=tuple(scores[group.classes].tolist()),
            draws=choice.draws,
            proven_error=error,
        )

    def _show(self, watchers: Mapping[nn.Module, Callable[[Tensor], object]]) -> object:
        return self._run(0, watchers)

    def _run(self, index: int, watchers: Mapping[nn.Module, Callable[[Tensor], object]] | None = None) -> list[Tensor]:
        """Return what the model returns for a batch, and show watchers the inputs of modules."""
        batch, errors = self._batches[index], []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            try:
                (watchers or {})[module](args[0] if args else next(iter(kwargs.values())))
            except Exception as error:
                # Not the fault of the model.
                errors.append(error)
                raise

        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in watchers or ()]
        try:
            found = outputs_of(call(self._model, batch))
        except Exception as error:
            if errors:
                raise
            raise does_not_run(self._model, index, batch, error) from error
        finally:
            for handle in handles:
                handle.remove()
        if not found:
            raise ValueError(f"this {type(self._model).__name__} returns no tensor of floats that could be compared")
        return found

    def _compare(self, expected: Sequence[Tensor], words: str) -> float:
        """Return how far the model is from what it has to return."""
        found = relative_change(expected, self._run(0))
        if not found <= rounding(self._model):
            raise ValueError(
                f"this {type(self._model).__name__} computes something else than the larger one {words} (outputs "
                f"differ by {found:.1e}), so its graph does not say all of its channels; exclude the layers concerned. "
                "Nothing was changed"
            )
        return found


def _check(model: nn.Module) -> None:
    """Refuse a model whose weights cannot be cut."""
    check_module(model)
    for name, module in model.named_modules():
        if masked := masked_attributes(module):
            raise ValueError(f"{masked[0]!r} of {name!r} is masked by a Sparsifier; prune filters before, or finalize")
        if adapted := adapted_attributes(module):
            raise ValueError(f"{adapted[0]!r} of {name!r} has an adapter; merge_adapters first")
    for name, parameter in model.named_parameters():
        if is_sharded(parameter) or parameter.is_meta:
            where = "sharded" if is_sharded(parameter) else "on the meta device"
            raise ValueError(f"parameter {name!r} is {where}; prune the whole model, with its values")
    if not any(isinstance(module, (nn.Linear, _ConvNd)) for module in model.modules()):
        raise ValueError(f"no filters of this {type(model).__name__} can be cut: it has no Linear and no convolution")


def _check_groups(model: nn.Module, channels: ChannelMap, globs: _Globs) -> None:
    """Refuse a model of which nothing can be cut, and globs that match nothing."""
    reasons = [(layer.name, layer.reason) for layer in channels.layers if layer.reason is not None]
    names = [*(layer.name for layer in channels.layers), *channels.others]
    globs.check([f"{name}.weight" if name else "weight" for name in names])
    if not channels.groups:
        found = each_reason_once([(name or "itself", reason) for name, reason in (*reasons, *channels.others.items())])
        raise ValueError(f"no filters of this {type(model).__name__} can be cut ({found})")


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _points(batch: Any) -> int:
    """Return how many inputs a batch holds."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    return next((len(each) for each in values if isinstance(each, Tensor) and each.ndim), 0)


def _columns(inputs: Labels, group: Group) -> int:
    """Return at how many positions a layer reads each channel of a group."""
    return math.ceil(np.count_nonzero(np.isin(inputs, group.classes)) / max(1, len(group.classes)))


def _norms(channels: ChannelMap, power: int) -> NDArray[np.float64]:
    """Return the norm of each class: that of all filters that make it, as one vector."""
    found = np.zeros(channels.classes)
    for layer in channels.layers:
        filters = layer.weight.detach().double().flatten(1).abs().pow(power).sum(1)
        np.add.at(found, layer.outputs, filters.cpu().numpy())
    return found ** (1 / power)


def _layer(name: str, outputs: Labels, inputs: Labels, gone: NDArray[np.bool_], reason: str | None) -> FilteredLayer:
    kept_outputs, kept_inputs = (tuple(np.flatnonzero(~gone[each]).tolist()) for each in (outputs, inputs))
    return FilteredLayer(
        name=name,
        outputs_before=len(outputs),
        outputs_after=len(kept_outputs),
        inputs_before=len(inputs),
        inputs_after=len(kept_inputs),
        kept_outputs=kept_outputs,
        kept_inputs=kept_inputs,
        reason=reason,
    )
