"""Sparsifier: keeps the weights of a model transposable N:M sparse from the first training step to the checkpoint."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from masksolve._inputs import nearest
from masksolve._pattern import Pattern
from masksolve.torch._distributed import (
    as_plain,
    check_not_fully_sharded,
    is_sharded,
    like,
    share_solves,
    solve_sharded,
    unwrapped,
)
from masksolve.torch._layers import Layout, ParameterReport, Ragged, Site, as_globs, select
from masksolve.torch._masking import (
    GRADIENTS,
    Gradient,
    MaskedWeight,
    MaskFault,
    attach,
    check_weight,
    masked_parameter,
)
from masksolve.torch._records import LayerRecord, RefreshRecord, count_changes, kept_share
from masksolve.torch._removal import remove_masks
from masksolve.torch._schedule import RefreshEvery, Schedule
from masksolve.torch._semi_structured import PackableWeight, replace_forward
from masksolve.torch._solve import MaskFunction, Masks, Recipe, Solution, as_pattern, mask_fault, solve_masks

# The name of a parameter and the parameter -> scores of its shape.
Importance = Callable[[str, nn.Parameter], Tensor]


class Sparsifier:
    """Trains a PyTorch model under transposable N:M masks that are exact at every refresh.

    Every weight of a Linear, a convolution and a MultiheadAttention that holds a whole m x m tile gets a mask: at once,
    and anew from the dense weights every `refresh_every` optimizer steps. Embeddings, weights that are tied to one, the
    routers of mixtures of experts and PEFT's adapters stay dense unless they are included; `report` says why. A
    convolution is masked at each kernel position. The dense weights stay the Parameters that the optimizer knows. Exact
    masks are found on the device where the weights lie.

    Parameters
    ----------
    model : nn.Module
        Changed in place, by `torch.nn.utils.parametrize`. Wrapped in DistributedDataParallel, its processes share the
        solves and all of them have to construct, `step` and `refresh` together; wrapped later, each solves for itself,
        and after `finalize` the wrapper has to be made anew. FSDP: before `fully_shard`.
    pattern : str or Pattern
        N **kept** of every M, such as "4:8": 1:4 keeps 1 of every 4 and zeroes 3.
    include, exclude : str or sequence of str, optional
        Globs of parameter names, as `model.named_parameters()` has them. With `include`, any parameter of two or more
        dimensions whose name matches, and no other; one of more than two, of an unknown module, is a stack of matrices
        (..., R, C).
    ragged : {"allow", "skip"}
        What to do with matrices whose sides are no multiples of m: mask them, with at most n in partial groups, or not.
    refresh_every : int, callable or None
        Steps between refreshes; None keeps the first masks; a callable gets the number of the step that was done,
        1 for the first, and says whether to refresh.
    until : int, optional
        The step with which a final dense phase begins: nothing is masked from then on.
    gradient : {"ste", "sr-ste", "masked"}
        What the dense weights get for the gradient g of the masked ones: g; g + decay * (1 - mask) * weight; mask * g.
        What an optimizer does on its own, such as weight decay, reaches pruned weights under all three.
    decay : float
        For "sr-ste". The term is added at every backward. The attribute `decay` can be set at any time: divide it by
        the number of accumulated backwards, and multiply it by the scale of a GradScaler.
    importance : callable, optional
        Gets the name and the Parameter (with its `.grad`, if there is one) and returns scores of its shape, not
        negative, to keep most of instead of abs(weight). Where processes share the solves, only one of them calls it.
    method : str or callable
        As for `masksolve.solve_matrix`. A callable, for experiments, gets scores (..., R, C) and the Pattern and
        returns a boolean mask, of any structure.
    saturated : bool
        True: exactly n in every whole group. False: at most n, which can keep more.
    accelerate : bool
        Compute the products of Linear layers on sparse tensor cores, forward and backward, where `acceleration_reason`
        speaks not against it: on an NVIDIA GPU, under 2:4 masks, in float16 or bfloat16. Everywhere else, such as on a
        CPU, they are the masked dense products.

    Raises
    ------
    ValueError, TypeError
        For whatever cannot be done, with what was given and what is allowed; the model is left as it was.

    Notes
    -----
    `model.parameters()` lists a module's masked weights after its other parameters. So make an EMA after the Sparsifier
    (`AveragedModel` with use_buffers=False, the default), and an optimizer whose state is to be saved always before it,
    or always after it.

    DistributedDataParallel broadcasts the masks, a byte a weight, with the other buffers at every forward of a model
    that has others; where these need not be synchronised, broadcast_buffers=False spares that.

    Masks that a `model.load_state_dict` brings have to be of the pattern, or dense ones if there is an `until`: it
    raises otherwise, and the masks stay.

    Source of the masks and of refreshing them every 40 steps: Hubara et al. 2021 (arXiv 2102.08124); of "sr-ste": Zhou
    et al. 2021 (arXiv 2102.04010).

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> sparsifier = Sparsifier(model, "4:8", refresh_every=10)
    >>> for line in sparsifier.report:
    ...     print(line.name, line.reason or "sparse")
    0.weight sparse
    0.bias 1-D: not a matrix
    2.weight 3x32 holds no whole 8x8 tile
    2.bias 1-D: not a matrix
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(1, 16)).sum().backward()
    ...     optimizer.step()
    ...     record = sparsifier.step()
    >>> record.step
    20
    >>> sparsifier.finalize()
    >>> int((model[0].weight != 0).sum()), list(model.state_dict())
    (256, ['0.weight', '0.bias', '2.weight', '2.bias'])
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: str | Pattern,
        *,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        ragged: Ragged = "allow",
        refresh_every: RefreshEvery = 40,
        until: int | None = None,
        gradient: Gradient = "ste",
        decay: float = 2e-4,
        importance: Importance | None = None,
        method: str | MaskFunction = "exact",
        saturated: bool = True,
        accelerate: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        _check_choice("ragged", ragged, ("allow", "skip"))
        _check_choice("gradient", gradient, GRADIENTS)
        self._recipe = Recipe(as_pattern(pattern), method, saturated)
        self._schedule = Schedule(refresh_every, until)
        if importance is not None and not callable(importance):
            raise TypeError(f"importance must be a callable of a name and a Parameter, or None, got {importance!r}")
        self._importance = importance
        self._model, self._group = unwrapped(model)
        check_not_fully_sharded(self._model)
        self._sites, self._report = select(
            self._model, self._recipe.pattern, as_globs(include), as_globs(exclude), ragged
        )
        self._step = 0
        self._is_dense = False
        self._is_final = False
        self._potentials: dict[str, Tensor] = {}
        self._decay = _checked_decay(decay)
        self._last_end: float | None = None

        start = time.perf_counter()
        parameters = {site.name: self._model.get_parameter(site.name) for site in self._sites}
        solutions = self._solve(parameters)
        for site in self._sites:
            weight = parameters[site.name]
            # In the weight's memory format, so that their product is in it too.
            mask = torch.empty_like(weight, dtype=torch.bool).copy_(like(solutions[site.name].mask, weight))
            kind = PackableWeight if accelerate else MaskedWeight
            masked = kind(mask, gradient, decay / len(site.names), self._fault_of(site.layout))
            for name in site.names:
                attach(*self._place(name), masked)
                if accelerate:
                    replace_forward(self._place(name)[0])
        self._finish_refresh(solutions, start, {site.name: 0 for site in self._sites})
        self._has_trained = False
        self._hooks = self._watch_for_gradients()

    @property
    def pattern(self) -> Pattern:
        """The pattern, N kept of every M."""
        return self._recipe.pattern

    @property
    def report(self) -> tuple[ParameterReport, ...]:
        """Every parameter of the model as it was: sparse, or skipped with the reason."""
        return self._report

    @property
    def steps(self) -> int:
        """Optimizer steps done, as counted by `step`."""
        return self._step

    @property
    def last_refresh(self) -> RefreshRecord:
        """What the last refresh did to every layer."""
        return self._last_refresh

    @property
    def decay(self) -> float:
        """How strongly "sr-ste" pulls pruned weights to zero. Setting it recompiles nothing."""
        return self._decay

    @decay.setter
    def decay(self, value: float) -> None:
        self._decay = _checked_decay(value)
        for site in self._sites:
            self._masked(site.name)[1].decay.fill_(value / len(site.names))

    def step(self) -> RefreshRecord | None:
        """Count an optimizer step, and refresh the masks if it is time to. Call it after every `optimizer.step()`.

        Returns
        -------
        RefreshRecord or None
            What the refresh did, if there was one.

        Raises
        ------
        RuntimeError
            Before any backward, and after `finalize`.
        ValueError
            As for `refresh`.
        """
        self._check_attached()
        if self._step == 0:
            self._check_trained()
        self._step += 1
        if self._schedule.is_dense_at(self._step):
            self._become_dense()
            return None
        return self.refresh() if self._schedule.refreshes_at(self._step) else None

    def refresh(self) -> RefreshRecord:
        """Find the masks of the current dense weights.

        Raises
        ------
        ValueError
            For weights or scores that are NaN or infinite, and parameters whose shape has changed or that are on the
            meta device; the message names the parameter, and all masks stay as they were.
        RuntimeError
            After `finalize` and in the final dense phase.
        """
        self._check_attached()
        if self._is_dense:
            raise RuntimeError(
                f"the final dense phase began at step {self._schedule.until}: there is no mask to refresh"
            )
        start = time.perf_counter()
        held = {site.name: self._masked(site.name) for site in self._sites}
        solutions = self._solve({name: weight for name, (weight, _) in held.items()})
        changed = {}
        for name, (_, masked) in held.items():
            mask = like(solutions[name].mask, masked.mask)
            changed[name] = count_changes(mask, masked.mask)
            _put(mask, masked)
        return self._finish_refresh(solutions, start, changed)

    def finalize(self) -> None:
        """Write the zeros into the weights and remove every trace of the masks.

        The model has its own classes, parameters and `state_dict` keys again, in their order. Nothing more can be done
        with this object.

        Raises
        ------
        RuntimeError
            If it was done before, a parameter carries a parametrization that was registered after the mask, is
            sharded by FSDP, or has a mask that is not of this pattern. The model is left as it was.
        """
        self._check_attached()
        for site in self._sites:
            self._masked(site.name)
        remove_masks([(name, *self._place(name)) for site in self._sites for name in site.names])
        self._unhook()
        self._is_final = True

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on training with the same masks: they, and the number of steps."""
        self._check_attached()
        return {
            "pattern": str(self.pattern),
            "step": self._step,
            "masks": {site.name: self._masked(site.name)[1].mask for site in self._sites},
            "potentials": {
                name: found for name, found in self._potentials.items() if not is_sharded(self._masked(name)[0])
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the masks and the number of steps of a `state_dict`.

        Raises
        ------
        ValueError
            If it is one of another pattern or of other parameters, or holds masks that are not of this pattern;
            nothing has changed then.
        """
        self._check_attached()
        missing = sorted({"pattern", "step", "masks", "potentials"} - set(state))
        if missing:
            raise ValueError(f"this is no state_dict of a Sparsifier: it has no {', '.join(missing)}")
        if state["pattern"] != str(self.pattern):
            raise ValueError(
                f"the state_dict has masks of pattern {state['pattern']}, this Sparsifier is for {self.pattern}; make "
                f"one for {state['pattern']}"
            )
        held = {site.name: self._masked(site.name)[1] for site in self._sites}
        masks = state["masks"]
        for name in sorted(held.keys() ^ masks.keys()):
            where = "the model" if name in held else "the state_dict"
            raise ValueError(f"only {where} has a mask for {name!r}; make the Sparsifier as it was when saved")
        for name, masked in held.items():
            if masks[name].shape != masked.mask.shape or masks[name].dtype != torch.bool:
                raise ValueError(
                    f"the state_dict has a {masks[name].dtype} mask of shape {tuple(masks[name].shape)} for {name!r}; "
                    f"it needs torch.bool of shape {tuple(masked.mask.shape)}"
                )
            if (fault := masked.fault(masks[name])) is not None:
                raise ValueError(f"the state_dict has another mask for {name!r} than {self.pattern} makes: {fault}")
        # Those of a shard are of no use to another, and never saved.
        potentials = {
            name: found
            for name, found in state["potentials"].items()
            if name in held and not is_sharded(self._masked(name)[0])
        }
        placed = {name: like(masks[name], masked.mask) for name, masked in held.items()}
        for name, masked in held.items():
            _put(placed[name], masked)
        self._potentials = potentials
        self._step = state["step"]
        self._is_dense = False
        if self._schedule.is_dense_at(self._step):
            self._become_dense()

    def _solve(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Solution]:
        sites = {site.name: site for site in self._sites}

        def solve(name: str) -> Solution:
            return self._solve_one(sites[name], parameters[name])

        def blank(name: str) -> Tensor:
            return torch.empty(parameters[name].shape, dtype=torch.bool, device=parameters[name].device)

        if self._group is None:
            return {name: solve(name) for name in sites}
        sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        return share_solves(sizes, solve, blank, self._group)

    def _solve_one(self, site: Site, parameter: nn.Parameter) -> Solution:
        scores: Tensor = parameter.detach()
        if self._importance is not None:
            scores = _checked_scores(self._importance(site.name, parameter), site.name, parameter)
        warm = self._potentials.get(site.name)

        def solve(part: Tensor) -> Masks:
            found = solve_masks(site.layout.matrices(part), self._recipe, warm)
            return found._replace(masks=site.layout.weight(found.masks))

        try:
            found = solve_sharded(scores, site.layout, self.pattern.m, solve) if is_sharded(scores) else solve(scores)
        except ValueError as error:
            raise ValueError(f"parameter {site.name!r}: {_not_finite(scores) or error}; no mask was changed") from error
        return Solution(*found, kept_share(scores, found.masks))

    def _finish_refresh(
        self, solutions: Mapping[str, Solution], start: float, changed: Mapping[str, int]
    ) -> RefreshRecord:
        self._potentials = {
            name: solution.potentials for name, solution in solutions.items() if solution.potentials is not None
        }
        layers = tuple(
            LayerRecord(
                name, solution.kept_importance, changed[name], changed[name] / solution.mask.numel(), solution.repaired
            )
            for name, solution in solutions.items()
        )
        now = time.perf_counter()
        since = now - self._last_end if self._last_end is not None else math.nan
        self._last_end = now
        self._last_refresh = RefreshRecord(self._step, now - start, (now - start) / since, layers)
        return self._last_refresh

    def _fault_of(self, layout: Layout) -> MaskFault:
        # A closure and not a method: copies of the model shall not copy this object.
        recipe, ends_dense = self._recipe, self._schedule.until is not None

        def fault(mask: Tensor) -> str | None:
            whole = as_plain(mask)
            return None if ends_dense and bool(whole.all()) else mask_fault(layout.matrices(whole), recipe)

        return fault

    def _become_dense(self) -> None:
        if not self._is_dense:
            for site in self._sites:
                masked = self._masked(site.name)[1]
                _put(torch.ones_like(masked.mask), masked)
            self._potentials = {}
            self._is_dense = True

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """The module that owns a parameter now, and its attribute. Never kept: modules and parameters are replaced."""
        path, _, attribute = name.rpartition(".")
        try:
            return self._model.get_submodule(path), attribute
        except AttributeError:
            raise RuntimeError(f"the model has no module {path!r} any more; finalize before taking it apart") from None

    def _masked(self, name: str) -> tuple[nn.Parameter, MaskedWeight]:
        """The dense weight and the mask of a parameter, as they are now."""
        found = masked_parameter(*self._place(name))
        if found is None:
            raise RuntimeError(
                f"parameter {name!r} is not masked any more: its module was replaced, or the parametrization removed; "
                "make a new Sparsifier"
            )
        check_weight(name, *found)
        return found

    def _check_attached(self) -> None:
        if self._is_final:
            raise RuntimeError("this Sparsifier is finalized: the model is a plain one again; make a new Sparsifier")

    def _watch_for_gradients(self) -> list[RemovableHandle]:
        # Python's collector does not see a cycle through PyTorch's hooks: one that held this object would keep it, the
        # model and the process group of DDP, with its threads, for ever.
        this = weakref.ref(self)

        def note(parameter: Tensor) -> None:
            if (sparsifier := this()) is not None:
                sparsifier._has_trained = True

        # All of them, as the first batch may pass by every masked one.
        return [
            parameter.register_post_accumulate_grad_hook(note)
            for parameter in self._model.parameters()
            if parameter.requires_grad and not is_lazy(parameter)
        ]

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _check_trained(self) -> None:
        """Refuse a step before any backward. Gradients may be gone already, and FSDP sets them behind every hook."""
        parameters = list(self._model.parameters())
        trained = self._has_trained or any(p.grad is not None or is_sharded(p) for p in parameters)
        if not trained and any(p.requires_grad for p in parameters):
            raise RuntimeError(
                "step() was called before any backward; call it after optimizer.step(), once for every optimizer step"
            )
        self._unhook()


def _put(mask: Tensor, masked: MaskedWeight) -> None:
    masked.mask.copy_(mask)
    if isinstance(masked, PackableWeight):
        masked.look()


def _check_choice(option: str, given: object, allowed: Sequence[str]) -> None:
    if given not in allowed:
        raise ValueError(f"unknown {option} {given!r}{nearest(given, allowed)}")


def _checked_decay(decay: float) -> float:
    if not 0 <= decay < math.inf:
        raise ValueError(f"decay must be finite and not negative, got {decay!r}; SR-STE uses 2e-4")
    return decay


def _checked_scores(scores: Tensor, name: str, parameter: nn.Parameter) -> Tensor:
    if not isinstance(scores, Tensor) or scores.shape != parameter.shape or not scores.is_floating_point():
        given = f"{scores.dtype} of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else repr(scores)
        raise ValueError(
            f"importance returned {given} for parameter {name!r}; return floats of shape {tuple(parameter.shape)}"
        )
    if bool(as_plain((scores < 0).any())):
        raise ValueError(f"importance returned negative scores for parameter {name!r}; return their absolute values")
    return scores.detach()


def _not_finite(scores: Tensor) -> str | None:
    """The first score that is NaN or infinite, in words."""
    if is_sharded(scores):
        return None
    bad = torch.nonzero(~torch.isfinite(scores))
    if len(bad) == 0:
        return None
    index = tuple(bad[0].tolist())
    return f"[{', '.join(map(str, index))}] is {float(scores[index])}; NaN and infinities have no importance"
