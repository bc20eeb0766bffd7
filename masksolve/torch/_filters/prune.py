"""prune_filters: a model made smaller, by the channels that matter least to the layers that read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from masksolve._inputs import as_count, check_choice, check_number
from masksolve.torch._batches import as_batches
from masksolve.torch._filters.allocation import Allocation, C, search
from masksolve.torch._filters.bound import proven_error
from masksolve.torch._filters.channels import Group, Labels
from masksolve.torch._filters.checks import Globs, check_groups, check_model, reasons_to_stay
from masksolve.torch._filters.empty import drop_empty
from masksolve.torch._filters.records import ChannelGroup, FilteredLayer, FilterReport
from masksolve.torch._filters.runner import Runner
from masksolve.torch._filters.sampling import METHODS, Choice, Method, choose
from masksolve.torch._filters.scores import Scored, by_norm, by_sensitivity, parameters_of
from masksolve.torch._filters.sensitivity import PARTS, Part
from masksolve.torch._filters.surgery import Surgery
from masksolve.torch._filters.tracing import trace
from masksolve.torch._layers import as_globs
from masksolve.torch._outputs import evaluated

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
    check_model(model)
    check_choice(method, "method", METHODS)
    check_choice(sensitivity, "sensitivity", PARTS)
    for name, value in {"keep": keep, "delta": delta}.items():
        check_number(value, name)
        if not (0 < value <= 1):
            raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")
    options = _Options(method, sensitivity, float(keep), float(delta), as_count(seed, "seed", 0))
    globs = Globs(as_globs(include), as_globs(exclude))
    batches = as_batches(calibration)
    with torch.no_grad(), evaluated(model):
        return _Pruning(Runner(model, batches), options, globs).run()


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

    @property
    def is_proven(self) -> bool:
        return self.method == "pfp-random" and self.part == "share"


@dataclass(frozen=True, eq=False)
class _Attempt:
    """What became of one share that was asked for."""

    share: float
    at: float
    choices: Sequence[Choice]
    predicted: int
    size: int
    emptied: NDArray[np.bool_]


class _Pruning:
    """One call."""

    def __init__(self, runner: Runner, options: _Options, globs: Globs) -> None:
        self._runner, self._options = runner, options
        self._parameters = parameters_of(runner)
        self._target = options.keep * self._parameters
        self._channels = trace(runner.model, runner.batches[0], runner.outputs, globs.reason)
        check_groups(runner.model, self._channels, globs)
        self._surgery = Surgery(self._channels)
        # The layers' own labels change when they are cut.
        self._labels = {layer.name: (layer.outputs, layer.inputs) for layer in self._channels.layers}

    def run(self) -> FilterReport:
        """Prune the model."""
        try:
            return self._pruned()
        except BaseException:
            self._surgery.undo(0)
            raise

    def _pruned(self) -> FilterReport:
        surgery, runner = self._surgery, self._runner
        drop_empty(surgery, runner.show)
        emptied = surgery.gone
        runner.compare(runner.outputs, "without filters that are empty")
        scored = self._scored()
        self._check_budget(scored)
        mark = surgery.mark
        attempt = self._nearest(scored)
        surgery.undo(mark)
        surgery.scale(self._factors(scored, attempt.choices))
        expected = runner.run(0)
        surgery.undo(mark)
        self._apply(scored, attempt.choices)
        deviation = runner.compare(expected, "with these channels at zero")
        return self._report(scored, attempt, emptied | attempt.emptied, deviation)

    def _scored(self) -> Scored:
        channels, options = self._channels, self._options
        groups = [Group(each.layers, each.classes[~self._surgery.gone[each.classes]]) for each in channels.groups]
        if options.is_by_norm:
            return by_norm(channels, groups, self._runner, 1 if options.method == "l1" else 2)
        return by_sensitivity(channels, groups, self._runner, options.part)

    def _check_budget(self, scored: Scored) -> None:
        least = scored.size([1] * len(scored.groups))
        if least > self._target * (1 + _NEAR):
            raise ValueError(
                f"keep={self._options.keep} of {self._parameters:,} parameters cannot be met: with one channel of each "
                f"group {least:,} remain ({least / self._parameters:.2%}). Filters that stay: "
                f"{reasons_to_stay(self._channels)}"
            )

    def _nearest(self, scored: Scored) -> _Attempt:
        """Try shares until the size is near enough: draws, and filters that become empty, make it differ."""
        options, target, mark = self._options, self._target, self._surgery.mark
        allocation = scored.one_ratio() if options.is_by_norm else scored.one_error(options.delta)
        best = last = self._attempt(scored, allocation, options.keep, 0)
        # What is not drawn and leaves nothing empty is the nearest already.
        tries = _ATTEMPTS if best.size != best.predicted else 0
        low, high = 0.4 * options.keep, max(options.keep, 0.999)
        for number in range(1, tries + 1):
            if abs(best.size - target) < _NEAR * target:
                break
            low, high = (last.share, high) if last.size < target else (low, last.share)
            self._surgery.undo(mark)
            last = self._attempt(scored, allocation, (low + high) / 2, number)
            best = min(best, last, key=lambda each: abs(each.size - target))
        return best

    def _attempt(self, scored: Scored, allocation: Allocation, share: float, number: int) -> _Attempt:
        at, counts = search(scored.size, allocation, scored.most, share * self._parameters)
        rng = np.random.default_rng([self._options.seed, number])
        pairs = zip(scored.scores, counts, strict=True)
        choices = [choose(scores, count, self._options.method, rng) for scores, count in pairs]
        predicted = scored.size(counts)
        emptied = self._apply(scored, choices)
        return _Attempt(share, at, choices, predicted, parameters_of(self._runner), emptied)

    def _apply(self, scored: Scored, choices: Sequence[Choice]) -> NDArray[np.bool_]:
        """Cut what is not chosen, and what is empty then; return the latter."""
        factors = self._factors(scored, choices)
        self._surgery.scale(np.where(factors > 0, factors, 1))
        self._surgery.cut(factors == 0)
        before = self._surgery.gone
        drop_empty(self._surgery, self._runner.show)
        return self._surgery.gone & ~before

    def _factors(self, scored: Scored, choices: Sequence[Choice]) -> NDArray[np.float64]:
        """Return by what each class is multiplied; 1 for those that stay in any case."""
        found = np.ones(self._channels.classes)
        for group, choice in zip(scored.groups, choices, strict=True):
            found[group.classes] = choice.factors
        return found

    def _report(self, scored: Scored, attempt: _Attempt, emptied: NDArray[np.bool_], deviation: float) -> FilterReport:
        options, layers = self._options, self._channels.layers
        sizes = [layer.places * len(self._labels[layer.name][0]) for layer in layers]
        return FilterReport(
            method=options.method,
            asked=options.keep,
            kept=attempt.size / self._parameters,
            parameters_before=self._parameters,
            parameters_after=attempt.size,
            note=self._note(attempt),
            epsilon=None if options.is_by_norm else math.exp(attempt.at),
            points=self._runner.points,
            points_asked=math.ceil(C * math.log(8 * max(sizes) * sum(sizes) / options.delta)),
            deviation=deviation,
            layers=tuple(
                _layer(layer.name, *self._labels[layer.name], self._surgery.gone, layer.reason) for layer in layers
            ),
            groups=tuple(
                self._group(group, scored, place, attempt.choices[place], emptied)
                for place, group in enumerate(self._channels.groups)
            ),
            untouched=tuple(self._channels.others.items()),
        )

    def _note(self, attempt: _Attempt) -> str | None:
        if abs(attempt.size - self._target) < _NEAR * self._target:
            return None
        if all(choice.kept.all() for choice in attempt.choices):
            return "empty filters were more than what was to go"
        if any(choice.draws is not None for choice in attempt.choices):
            return "no draw came nearer"
        one = "ratio" if self._options.is_by_norm else "error"
        return f"whole channels allow none nearer at one {one} for all groups"

    def _group(
        self, group: Group, scored: Scored, place: int, choice: Choice, emptied: NDArray[np.bool_]
    ) -> ChannelGroup:
        scores = np.zeros(self._channels.classes)
        scores[scored.groups[place].classes] = scored.scores[place]
        error = None
        if self._options.is_proven and choice.draws is not None:
            failure = self._options.delta / scored.sums[place]
            error = proven_error(choice.draws, float(scored.scores[place].sum()), failure)
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
