"""The decay of SR-STE by the flip rate of masks, found in a few short runs of the training itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from masksolve._inputs import as_count, check_number
from masksolve._patterns import PatternsLike
from masksolve._words import counted
from masksolve.torch._training.records import RefreshRecord
from masksolve.torch._training.sparsifier import Sparsifier

DECAYS = (2e-7, 6e-7, 2e-6, 6e-6, 2e-5, 6e-5, 2e-4, 6e-4, 2e-3, 6e-3, 2e-2)


class Stepper(Protocol):
    """What `attach` returns."""

    def step(self) -> object:
        """Count an optimizer step. Call it after every `optimizer.step()`."""


@dataclass(frozen=True)
class DecaySearch:
    """What `find_decay` has found.

    Attributes
    ----------
    decay : float
    flip_rates : dict of float to float
        By each decay that was tried, the mean share of masked weights that a refresh prunes or brings back.
    dense_flip_rate : float
        That of the masks which dense training would have.
    """

    decay: float
    flip_rates: dict[float, float]
    dense_flip_rate: float


def find_decay(
    train: Callable[[Callable[[nn.Module], Stepper]], object],
    pattern: PatternsLike,
    *,
    decays: Sequence[float] = DECAYS,
    lowest: float = 0.6,
    highest: float = 0.95,
    refresh_every: int = 40,
    **options: Any,
) -> DecaySearch:
    """Find the decay of "sr-ste" that calms masks as much as it should.

    With a good decay, the early flip rate is .6 to .95 of that of dense training: Hu et al. 2024 (arXiv 2404.01847). It
    falls as the decay grows, so that the search halves a list of decays: one run dense, and some log2 of its length.

    Parameters
    ----------
    train : callable
        Makes the model and the optimizer afresh, calls the `attach` that it gets with the model once, and runs the
        first steps of training with a call of `step()` of what that returned after each. From the same seed each time;
        some ten refreshes, while the rate of learning rises and after.
    pattern, **options
        As for `Sparsifier`; not `gradient`, `decay`, `masks`, `until`, `sparsity_schedule`.
    decays : sequence of float
        In increasing order.
    lowest, highest : float
        The flip rate that is sought, as a share of that of dense training.
    refresh_every : int
        Steps between refreshes.

    Raises
    ------
    ValueError
        If no decay of the list has such a flip rate, dense training flips nothing, or `train` does not do as told.

    Examples
    --------
    >>> import torch
    >>> def train(attach):
    ...     torch.manual_seed(0)
    ...     model = torch.nn.Linear(16, 16)
    ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ...     sparsifier = attach(model)
    ...     for _ in range(40):
    ...         optimizer.zero_grad()
    ...         model(torch.randn(8, 16)).square().mean().backward()
    ...         optimizer.step()
    ...         sparsifier.step()
    >>> found = find_decay(train, "2:4", decays=(0.05, 0.1, 0.14, 0.2, 0.3), refresh_every=2)
    >>> 0.6 <= found.flip_rates[found.decay] / found.dense_flip_rate <= 0.95
    True
    """
    for name in ("gradient", "decay", "masks", "until", "sparsity_schedule"):
        if name in options:
            raise TypeError(f"find_decay decides on {name} itself, got {options[name]!r}; leave it out")
    decays = _checked_decays(decays)
    for name, value in (("lowest", lowest), ("highest", highest)):
        check_number(value, name)
    if not 0 <= lowest < highest:
        raise ValueError(f"flip rates are sought from lowest to highest, got {lowest!r} and {highest!r}")
    options["refresh_every"] = as_count(refresh_every, "refresh_every", 1)

    def attach_dense(model: nn.Module) -> _Flips:
        own = copy.deepcopy(model)
        return _DenseFlips(Sparsifier(own, pattern, **options), own, model)

    def attach_decayed(model: nn.Module) -> _Flips:
        return _Flips(Sparsifier(model, pattern, gradient="sr-ste", decay=decay, **options))

    dense = _run(train, attach_dense)
    if dense == 0:
        raise ValueError("dense training changes no mask in these steps; train longer, or at a higher rate")
    flip_rates: dict[float, float] = {}
    low, high = 0, len(decays)
    while low < high:
        middle = (low + high) // 2
        decay = decays[middle]
        flip_rates[decay] = _run(train, attach_decayed)
        if flip_rates[decay] > highest * dense:
            low = middle + 1
        elif flip_rates[decay] < lowest * dense:
            high = middle
        else:
            return DecaySearch(decay, flip_rates, dense)
    tried = ", ".join(f"{decay:g} {rate / dense:.3g}" for decay, rate in sorted(flip_rates.items()))
    raise ValueError(
        f"no decay of the list has a flip rate of {lowest:g} to {highest:g} times the dense one, but {tried}; give "
        "decays between these, or beyond"
    )


def _checked_decays(decays: Sequence[float]) -> list[float]:
    found = list(decays)
    for decay in found:
        check_number(decay, "each of decays")
    if not found or any(not 0 < decay < math.inf for decay in found) or found != sorted(set(found)):
        raise ValueError(f"decays must be positive, finite, and in increasing order, got {decays!r}")
    return found


def _run(train: Callable[[Callable[[nn.Module], Stepper]], object], attach: Callable[[nn.Module], _Flips]) -> float:
    """Train once; return the mean flip rate."""
    made: list[_Flips] = []

    def attach_once(model: nn.Module) -> _Flips:
        if made:
            raise ValueError("train attached twice; it makes one model, and calls attach with it once")
        made.append(attach(model))
        return made[0]

    train(attach_once)
    if not made:
        raise ValueError("train did not call attach; it is to call it with the model, before the first step")
    return made[0].rate()


class _Flips:
    """Sums up the flips of a Sparsifier's refreshes."""

    def __init__(self, sparsifier: Sparsifier) -> None:
        self._sparsifier = sparsifier
        self._weights = sum(math.prod(line.shape) for line in sparsifier.report if line.sparse and not line.reason)
        self._steps = self._refreshes = self._flips = 0

    def step(self) -> None:
        """Count an optimizer step."""
        self._steps += 1
        record = self._refresh()
        if record is not None:
            self._refreshes += 1
            self._flips += sum(layer.sad for layer in record.layers)

    def _refresh(self) -> RefreshRecord | None:
        return self._sparsifier.step()

    def rate(self) -> float:
        """Return the mean share of weights that flip at a refresh."""
        if self._refreshes == 0:
            raise ValueError(
                f"train called step() {counted(self._steps, 'time')}, and the first refresh comes after "
                f"{self._sparsifier.refresh_every}; train for more steps, or lower refresh_every"
            )
        return self._flips / self._refreshes / self._weights


class _DenseFlips(_Flips):
    """Those of masks that nothing is trained under: they are found for a copy of the model."""

    def __init__(self, sparsifier: Sparsifier, own: nn.Module, model: nn.Module) -> None:
        super().__init__(sparsifier)
        self._copy, self._model = own, model

    def _refresh(self) -> RefreshRecord | None:
        every = self._sparsifier.refresh_every
        assert isinstance(every, int)
        if self._steps % every:
            return None
        with torch.no_grad():
            for own, trained in zip(self._copy.parameters(), self._model.parameters(), strict=True):
                own.copy_(trained)
                # A callable importance may ask for it.
                own.grad = trained.grad
        return self._sparsifier.refresh()
