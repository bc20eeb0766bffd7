"""Sparsifier: trains a model under N:M masks from the first step to the checkpoint."""

from __future__ import annotations

import math
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from masksolve._inputs import as_count, check_choice, check_direction, check_flag, check_number
from masksolve._kinds import each_reason_once
from masksolve._pattern import Pattern, PatternLike
from masksolve._patterns import PatternsLike, as_patterns, check_all_have_one
from masksolve._tiles import Direction
from masksolve.torch._dtensor import as_plain, is_sharded, like
from masksolve.torch._layers import (
    Layout,
    ParameterReport,
    Ragged,
    Site,
    as_globs,
    check_module,
    masked_attributes,
    select,
)
from masksolve.torch._solver.solution import MaskSolution
from masksolve.torch._solver.solve import (
    Importance,
    MaskFunction,
    Recipe,
    check_importance,
    checked_scores,
    described,
    kept_importance,
    mask_fault,
    solve_masks,
)
from masksolve.torch._training.distributed import check_not_fully_sharded, share_solves, solve_sharded, unwrapped
from masksolve.torch._training.finalize import finalize, remove_masks
from masksolve.torch._training.first_steps import FirstSteps
from masksolve.torch._training.hysteresis import steady
from masksolve.torch._training.loading import guard_loading, unguard_loading
from masksolve.torch._training.masking import (
    GRADIENTS,
    Gradient,
    Held,
    MaskedWeight,
    MaskFault,
    Shared,
    attach,
    check_names,
    check_weight,
    masked_parameter,
    masked_product,
    owner_of,
)
from masksolve.torch._training.prices import thresholds
from masksolve.torch._training.records import LayerRecord, RefreshRecord, count_changes
from masksolve.torch._training.schedule import RefreshEvery, Schedule, SparsitySchedule
from masksolve.torch._training.sparse_linear import PackableWeight, linear_forward, reason_unknown
from masksolve.torch._training.step_count import StepCount
from masksolve.torch._training.unbiased import as_keeping


class Sparsifier:
    """Training of a PyTorch model under N:M masks that are exact at every refresh.

    Every weight of a Linear, a convolution, a MultiheadAttention, an RNN, LSTM or GRU, and of a Conv1D or experts of
    transformers, that holds a whole m x m tile (one-sided: a whole group) gets a mask, which is found again from the
    dense weights every `refresh_every` optimizer steps. Embeddings, weights that are tied to one, the routers of
    mixtures of experts and PEFT's adapters stay dense unless they are included; `report` says why. A convolution is
    masked at each kernel position, each expert by itself. The dense weights stay the Parameters that the optimizer
    knows. Exact masks are found on the device where the weights lie.

    Parameters
    ----------
    model : nn.Module
        Changed in place: the modules get classes of their own, whose masked weights are properties. Its parameters
        stay where they are, under their names, in their order. Wrapped in DistributedDataParallel, its processes share
        the solves and all of them have to construct, `step` and `refresh` together; wrapped later, each solves for
        itself. FSDP: before `fully_shard`.
    pattern : str, (int, int), Pattern or mapping
        N **kept** of every M, such as "4:8" or (4, 8): 1:4 keeps 1 of every 4 and zeroes 3. A mapping has one for the
        parameters that each glob matches, the first that does: {"*.attention.*": "2:4", "*": "4:8"}.
    direction : {"both", "rows", "columns"}
        "both": transposable. One-sided: "rows", N of every M consecutive inputs of an output, which makes the forward
        product sparse, for weights (out, in); "columns", N of every M outputs of an input, the backward one.
    include, exclude : str or sequence of str, optional
        Globs of parameter names, as `model.named_parameters()` has them; a glob also matches names of which it is a
        part between dots, as "q_proj" is of "layers.0.q_proj.weight". With `include`, any parameter of two or more
        dimensions whose name matches, and no other; one of more than two, of an unknown module, is a stack of matrices
        (..., R, C).
    ragged : {"allow", "skip"}
        Whether to mask matrices whose sides are not multiples of m, with at most n kept in partial groups.
    refresh_every : int, callable or None
        Steps between refreshes; None keeps the first masks; a callable gets the number of the step just done, 1 for
        the first, and returns whether to refresh. The default is the paper's, of long trainings; in our studies, of
        few or large steps, 1 trained better.
    until : int, optional
        The step that begins a final dense phase: from then on nothing is masked.
    sparsity_schedule : callable, optional
        Gets the step of a refresh, 0 for the first masks, and returns the share of the pattern's zeros that masks have
        from then on, 0 (dense) to 1, rounded down to whole zeros: on the way to "4:8", first 8:8, then 7:8, 6:8, 5:8.
        `cubic_schedule` makes one. A last refresh before it returns 1 leaves masks on the way; `finalize` warns then.
    hysteresis : float
        How much more a new mask has to keep than the one before, as a share, for a tile (one-sided: a group) to change
        it: .01 is one percent. 0: every refresh makes all masks the best.
    masks : mapping of str to Tensor of bool, optional
        Masks to train under as they are, True = kept: one of every parameter that is to be sparse, by its name, NumPy
        arrays too. They have to fit pattern and direction; say refresh_every=None. `masksolve.checkpoint.read_masks`
        has those of a file.
    gradient : {"ste", "sr-ste", "masked", "soft"}
        The gradient of the dense weights, for the gradient g of the masked ones: g; g + decay * (1 - mask) * weight;
        mask * g; g. Under all, what an optimizer adds itself, such as weight decay, reaches pruned weights. "soft" also
        shrinks what is kept by the prices of the exact mask, times a scale that is chosen once, so that it follows the
        weights continuously, to zero where the mask changes. It is meant for refresh_every=1, and needs exact,
        saturated, transposable masks of magnitudes on whole tiles, without an `until`.
    decay : float
        For "sr-ste". The term is added once to a gradient, however many backwards accumulate it. Under a GradScaler,
        multiply it by the scale; the callbacks of `masksolve.torch.integrations` do.
    importance : {"magnitude"} or callable
        What masks keep most of: abs(weight), or the scores that a callable returns for the name and the Parameter (with
        its `.grad`, if there is one): of its shape, not negative. Where processes share the solves, only one of them
        calls it.
    method : str or callable
        As for `masksolve.solve_matrix`. A callable, for experiments, gets scores (..., R, C) and the Pattern and
        returns a boolean mask, of any structure; leave `direction` alone then.
    saturated : bool
        True: exactly n in every whole group. False: at most n, which can keep more.
    accelerate : bool
        Run `nn.Linear` on sparse tensor cores in both passes where device, dtype and shape allow it: on an NVIDIA GPU,
        under transposable 2:4 masks, in float16 or bfloat16. Other products are the masked dense ones;
        `acceleration_reason(layer)` says why a layer falls back.
    gradient_sparsity : str, (int, int) or Pattern, optional
        Thin the gradients that reach each masked `nn.Linear` to N:M along their tokens, for the product with its inputs
        that gives the weight's gradient: then all three products of a step are sparse. The estimate is unbiased, of
        the least variance (`minimum_variance_unbiased`), and drawn from PyTorch's generator of the device, as dropout
        is: seed processes differently. The gradient of the inputs and of the bias is exact. Of any N and M; packed for
        sparse tensor cores if `accelerate` and at most 2 of 4 are kept. `report` says which layers do it.

    Raises
    ------
    ValueError, TypeError
        For whatever cannot be done, saying what was given and what is allowed; the model is left as it was.
    RuntimeError
        Under `torch.inference_mode()`.

    Notes
    -----
    The attributes `decay`, `refresh_every`, `until` and `hysteresis` can be set at any time; all others are fixed.

    `module.weight` gives the masked weight. What changes it in place (`module.weight.clamp_()`, `module.weight.data`,
    `torch.nn.init`) changes the dense one, to which the mask then applies.

    The masks and the number of steps are buffers of the model, so that its `state_dict` resumes training; with this
    object's, bit for bit. An average of the model (`AveragedModel`) needs use_buffers=False, the default.

    DistributedDataParallel broadcasts the masks, a byte per weight, with the other buffers at every forward of a model
    that has others; where these need not be synchronised, broadcast_buffers=False spares that.

    Masks that `model.load_state_dict` brings have to fit pattern and direction, or be dense if there is an `until`;
    otherwise it raises, and the masks stay.

    Source of the masks and of refreshing them every 40 steps: Hubara et al. 2021 (arXiv 2102.08124); of "sr-ste": Zhou
    et al. 2021 (arXiv 2102.04010); of "soft", for one-sided masks: Hu et al. 2024 (arXiv 2409.09099); of
    `gradient_sparsity`: Chmiel et al. 2023 (arXiv 2203.10991).

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
    ...     model(torch.ones(1, 16)).sum().backward()
    ...     optimizer.step()
    ...     record = sparsifier.step()
    ...     optimizer.zero_grad()
    >>> record.step
    20
    >>> sparsifier.finalize()
    >>> int((model[0].weight != 0).sum()), list(model.state_dict())
    (256, ['0.weight', '0.bias', '2.weight', '2.bias'])
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: PatternsLike,
        *,
        direction: Direction = "both",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        ragged: Ragged = "allow",
        refresh_every: RefreshEvery = 40,
        until: int | None = None,
        sparsity_schedule: SparsitySchedule | None = None,
        hysteresis: float = 0.0,
        masks: Mapping[str, Any] | None = None,
        gradient: Gradient = "ste",
        decay: float = 2e-4,
        importance: Literal["magnitude"] | Importance = "magnitude",
        method: str | MaskFunction = "exact",
        saturated: bool = True,
        accelerate: bool = False,
        gradient_sparsity: PatternLike | None = None,
    ) -> None:
        check_module(model)
        if torch.is_inference_mode_enabled():
            raise RuntimeError("a Sparsifier made under torch.inference_mode() could not train; make it outside")
        check_choice(ragged, "ragged", ("allow", "skip"))
        check_choice(gradient, "gradient", GRADIENTS)
        self._is_soft, self._is_sr_ste = gradient == "soft", gradient == "sr-ste"
        if self._is_soft:
            _check_soft(
                importance=importance,
                method=method,
                direction=direction,
                saturated=saturated,
                until=until,
                sparsity_schedule=sparsity_schedule,
                hysteresis=hysteresis,
                masks=masks,
            )
        check_flag(accelerate, "accelerate")
        thin = None if gradient_sparsity is None else as_keeping(gradient_sparsity, "gradient_sparsity")
        self._patterns, self._direction = as_patterns(pattern), check_direction(direction)
        self._recipes = {
            each: Recipe(pattern=each, method=method, saturated=saturated, direction=self._direction)
            for _, each in self._patterns.by_glob
        }
        self._schedule = Schedule(refresh_every, until, sparsity_schedule)
        self._hysteresis = _checked_hysteresis(hysteresis, method)
        if masks is not None and refresh_every is not None:
            raise ValueError(
                f"masks= are trained under as they are, and refresh_every={refresh_every!r} would replace them; give "
                "refresh_every=None (it can be set later), or leave out masks"
            )
        if not callable(importance):
            check_importance(importance, ("magnitude",))
        self._importance = importance
        self._model, self._group = unwrapped(model)
        check_not_fully_sharded(self._model)
        self._sites, self._report = select(
            self._model,
            self._patterns,
            include=as_globs(include),
            exclude=as_globs(exclude),
            ragged=ragged,
            direction=self.direction,
        )
        check_all_have_one([site.name for site in self._sites if site.pattern is None])
        check_names(self._model, (name for site in self._sites for name in site.names))
        if self._is_soft:
            _check_whole_tiles(self._model, self._sites)
        if thin is not None:
            self._report = _with_gradients(self._model, self._report, thin)
        self._gradient_sparsity = thin
        self._is_final = False
        self._potentials: dict[str, Tensor] = {}
        self._decay, self._shared = _checked_decay(decay), Shared()
        self._last_end: float | None = None

        start = time.perf_counter()
        parameters = {site.name: self._model.get_parameter(site.name) for site in self._sites}
        solutions = self._solve(parameters, 0) if masks is None else self._given(masks, parameters)
        self._owners: dict[str, weakref.ref[nn.Module]] = {}
        # Where they were found last.
        self._paths: dict[str, str] = {}
        for site in self._sites:
            weight = parameters[site.name]
            # In the weight's memory format, so that their product is in it too.
            mask = torch.empty_like(weight, dtype=torch.bool).copy_(like(solutions[site.name].masks, weight))
            kind = PackableWeight if accelerate else MaskedWeight
            owners = [owner_of(self._model, name) for name in site.names]
            masked = kind(
                *owners[0],
                mask=mask,
                gradient=gradient,
                decay=decay,
                shared=self._shared,
                fault=self._fault_of(site),
                thin=thin,
            )
            for name, (owner, attribute) in zip(site.names, owners, strict=True):
                attach(owner, attribute, masked, linear_forward(owner) if accelerate or thin is not None else None)
                self._owners[name], self._paths[name] = weakref.ref(owner), name.rpartition(".")[0]
            if self._is_soft:
                _soften(site, weight, masked, rescale=True)
        guard_loading(self._model)
        self._steps = StepCount(self._held(self._sites[0].name).masked)
        # The masks that were filled with True, by their identity and version then.
        self._filled: dict[str, tuple[int, int]] = {}
        self._finish_refresh(solutions, start, {site.name: 0 for site in self._sites})
        self._first_steps: FirstSteps | None = FirstSteps(self._model)
        # Those that "sr-ste" cannot pull yet, as they are frozen.
        self._frozen = {site.name for site in self._sites if self._is_sr_ste}
        self._watch_frozen()

    @property
    def pattern(self) -> Pattern | dict[str, Pattern]:
        """The pattern, N kept of every M, or those of several globs."""
        return self._patterns.given

    @property
    def direction(self) -> Direction:
        """The direction of the groups of M, "both", "rows" or "columns"."""
        return self._direction

    @property
    def gradient_sparsity(self) -> Pattern | None:
        """What gradients are thinned to for those of the weights, or None."""
        return self._gradient_sparsity

    @property
    def report(self) -> tuple[ParameterReport, ...]:
        """A line for every parameter of the model, which is sparse, or skipped with the reason."""
        return self._report

    @property
    def steps(self) -> int:
        """Optimizer steps done, as counted by `step`."""
        return self._steps.value

    @property
    def last_refresh(self) -> RefreshRecord:
        """The record of the last refresh, or of the first masks; `load_state_dict` leaves it as it is."""
        return self._last_refresh

    @property
    def decay(self) -> float:
        """The strength with which "sr-ste" pulls pruned weights to zero. Setting it recompiles nothing."""
        return self._decay

    @decay.setter
    def decay(self, value: float) -> None:
        self._decay = _checked_decay(value)
        for site in self._sites:
            self._held(site.name).masked.decay = value

    @property
    def refresh_every(self) -> RefreshEvery:
        """The schedule of refreshes, steps between them, None, or a callable of the step. Can be set."""
        return self._schedule.refresh_every

    @refresh_every.setter
    def refresh_every(self, value: RefreshEvery) -> None:
        self._schedule = replace(self._schedule, refresh_every=value)

    @property
    def until(self) -> int | None:
        """The step that begins the final dense phase, or None. Can be set; to end that phase finds masks at once."""
        return self._schedule.until

    @until.setter
    def until(self, value: int | None) -> None:
        if self._is_soft and value is not None:
            raise ValueError(_no_soft("until", value))
        was_dense = self._schedule.is_dense_at(self.steps)
        self._schedule = replace(self._schedule, until=value)
        for site in self._sites:
            # `until` decides whether dense masks may be loaded.
            self._held(site.name).masked.fault = self._fault_of(site)
        if was_dense and not self._schedule.is_dense_at(self.steps):
            self.refresh()

    @property
    def hysteresis(self) -> float:
        """The share by which a tile's new mask has to keep more than the one before. Can be set."""
        return self._hysteresis

    @hysteresis.setter
    def hysteresis(self, value: float) -> None:
        if self._is_soft and value != 0:
            raise ValueError(_no_soft("hysteresis", value))
        self._hysteresis = _checked_hysteresis(value, next(iter(self._recipes.values())).method)

    def __setattr__(self, name: str, value: object) -> None:
        is_settable = name.startswith("_") or getattr(getattr(type(self), name, None), "fset", None) is not None
        # Classes derived from this one may have attributes of their own.
        if type(self) is Sparsifier and not is_settable:
            settable = ", ".join(key for key, each in vars(Sparsifier).items() if getattr(each, "fset", None))
            raise AttributeError(
                f"a Sparsifier has no attribute {name!r} that can be set to {value!r}, as {settable} can; for another "
                "pattern, direction, gradient or importance, finalize and make a new one"
            )
        super().__setattr__(name, value)

    def step(self) -> RefreshRecord | None:
        """Count an optimizer step, and refresh the masks if they are due. Call it after every `optimizer.step()`.

        Returns
        -------
        RefreshRecord or None
            The record of the refresh, if there was one.

        Raises
        ------
        RuntimeError
            After `finalize`; and if nothing in the model has been used yet, so that no optimizer step can have come
            before.
        ValueError
            As for `refresh`.

        Warns
        -----
        UserWarning
            If a masked parameter got a gradient, but the first optimizer step that changes any other leaves it
            unchanged, and no optimizer that stepped has it.
        """
        self._check_attached()
        self._check_first_steps()
        self._watch_frozen()
        self._shared.scale = 1.0
        step = self.steps + 1
        self._steps.value = step
        if self._schedule.is_dense_at(step):
            self._become_dense()
            return None
        return self.refresh() if self._schedule.refreshes_at(step) else None

    def refresh(self) -> RefreshRecord:
        """Find the masks of the current dense weights, whatever `refresh_every` says.

        Raises
        ------
        ValueError
            For weights or scores that are NaN or infinite, and parameters whose shape has changed or that are on the
            meta device; the message names the parameter, and all masks stay as they were.
        RuntimeError
            After `finalize` and in the final dense phase.
        """
        return self._refresh()

    def _refresh(self, *, anew: bool = False) -> RefreshRecord:
        """Find masks; `anew`: as the first ones are found, whatever there was."""
        self._check_attached()
        if self._schedule.is_dense_at(self.steps):
            raise RuntimeError(
                f"the final dense phase began at step {self._schedule.until}: no mask is left to refresh"
            )
        start = time.perf_counter()
        held = {site.name: self._held(site.name) for site in self._sites}
        self._check_copies()
        if self._is_soft and (sharded := [name for name, (weight, _) in held.items() if is_sharded(weight)]):
            raise ValueError(f"gradient='soft' needs whole weights, and {_some_of(sharded)} is sharded; choose another")
        weights = {name: weight for name, (weight, _) in held.items()}
        before = None if anew else {name: masked.mask for name, (_, masked) in held.items()}
        solutions = self._solve(weights, self.steps, before)
        changed = {}
        for name, (weight, masked) in held.items():
            # It may have been replaced while it was frozen.
            masked.watch(weight)
            mask = like(solutions[name].masks, masked.mask)
            changed[name] = count_changes(mask, masked.mask)
            masked.set_mask(mask)
        if self._is_soft:
            for site in self._sites:
                _soften(site, *held[site.name], rescale=anew)
        return self._finish_refresh(solutions, start, changed)

    def finalize(self, model: nn.Module | None = None) -> None:
        """Write the zeros into the weights and remove every trace of the masks.

        The model has its own classes and `state_dict` keys again, and so have copies of masked modules that are part of
        it. Nothing more can be done with this object.

        Parameters
        ----------
        model : nn.Module, optional
            A copy of the model to finalize in its place, such as an EMA or a `copy.deepcopy`: all of its masks, whoever
            made them. This object and its own model go on.

        Raises
        ------
        ValueError
            If nothing in the copy is masked, it is a part of the own model, or a parameter has changed its shape or is
            on the meta device.
        RuntimeError
            If it was done before, a parameter is sharded by FSDP, its module was given another class since, or its
            mask is not of this pattern. The model is left as it was.

        Warns
        -----
        UserWarning
            If masks have not reached the pattern, as the last refresh came before the end of `sparsity_schedule`.
        """
        self._check_attached()
        unfinished = self._unfinished()
        if model is not None and not any(each is self._model for each in check_module(model).modules()):
            own = set(self._model.modules())
            if any(each in own and masked_attributes(each) for each in model.modules()):
                raise ValueError(
                    f"this {type(model).__name__} shares masked modules with the Sparsifier's own model; finalize() "
                    "does all of that, and a copy is made with copy.deepcopy"
                )
            finalize(model)
        else:
            for site in self._sites:
                self._held(site.name)
            places = [(name, *self._place(name)) for site in self._sites for name in site.names]
            remove_masks([*places, *self._copies()])
            self._end()
        if unfinished is not None:
            warnings.warn(
                f"finalized before sparsity_schedule was at its end: {unfinished}; let it return 1 from the last "
                "refresh on",
                stacklevel=2,
            )

    def state_dict(self, *, pruned: bool = False) -> dict[str, Any]:
        """Return what `load_state_dict` needs to resume: the masks, their potentials, and the number of steps.

        Parameters
        ----------
        pruned : bool
            Whether to add the dense weights that are pruned now, one after the other, for a model that is saved without
            them: see `sparse_state_dict`. With gradient="soft", which changes all of them, all dense weights.
        """
        self._check_attached()
        check_flag(pruned, "pruned")
        held = {site.name: self._held(site.name) for site in self._sites}
        if pruned and (sharded := [name for name, (weight, _) in held.items() if is_sharded(weight)]):
            raise ValueError(f"pruned=True takes whole weights, and {_some_of(sharded)} is sharded; leave it out")
        values = {
            name: weight.detach()[masked.absent(masked.mask)] for name, (weight, masked) in held.items() if pruned
        }
        return {
            **({"pruned": values} if pruned else {}),
            **({"soft": {name: masked.softening for name, (_, masked) in held.items()}} if self._is_soft else {}),
            "pattern": str(self._patterns),
            "direction": self.direction,
            "step": self.steps,
            "masks": {name: masked.mask for name, (_, masked) in held.items()},
            "potentials": {
                name: found for name, found in self._potentials.items() if not is_sharded(held[name].weight)
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the masks and the number of steps of a `state_dict`, and the pruned weights if it has them.

        Load the weights of the model before.

        Raises
        ------
        ValueError, TypeError
            For one of another pattern, direction or set of parameters, for masks that break the pattern, for pruned
            weights beside a model whose own are others, and for what is not a `state_dict` of a Sparsifier; nothing has
            changed then.
        """
        self._check_attached()
        keys = ("pattern", "direction", "step", "masks", "potentials", *(("soft",) if self._is_soft else ()))
        if not isinstance(state, Mapping):
            raise TypeError(f"the state_dict of a Sparsifier is a mapping of {', '.join(keys)}, got {state!r}")
        missing = sorted(set(keys) - set(state))
        if missing:
            raise ValueError(f"this is not the state_dict of a Sparsifier: it lacks {', '.join(missing)}")
        step = as_count(state["step"], "the step of the state_dict", 0)
        for key in ("masks", "potentials", "pruned"):
            if not _are_tensors(state.get(key, {})):
                raise TypeError(f"{key} of the state_dict must map names to tensors, got {state[key]!r}")
        if state["pattern"] != str(self._patterns):
            raise ValueError(
                f"the state_dict has masks of pattern {state['pattern']}, this Sparsifier is for {self._patterns}; "
                f"make one for {state['pattern']}"
            )
        if state["direction"] != self.direction:
            raise ValueError(
                f"the state_dict has masks of direction {state['direction']!r}, this Sparsifier is for "
                f"{self.direction!r}; make one with direction={state['direction']!r}"
            )
        held = {site.name: self._held(site.name).masked for site in self._sites}
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
                raise ValueError(f"the state_dict has a mask for {name!r} that {self._patterns} cannot make: {fault}")
        # Those of a shard are useless to another one, and never saved.
        potentials = {
            name: found
            for name, found in state["potentials"].items()
            if name in held and not is_sharded(self._held(name).weight)
        }
        placed = {name: like(masks[name], masked.mask) for name, masked in held.items()}
        soft = {name: _softening(name, masked, state["soft"]) for name, masked in held.items() if self._is_soft}
        dense = {}
        for name in held if "pruned" in state else ():
            weight, masked = self._held(name)
            factor = soft[name]["factor"] if self._is_soft else placed[name]
            pruned = state["pruned"].get(name)
            dense[name] = _with_pruned(name, weight.detach(), masked.absent(placed[name]), factor, pruned)
        with torch.no_grad():
            for name, values in dense.items():
                self._held(name).weight.copy_(values)
        for name, masked in held.items():
            masked.set_mask(placed[name])
            for key, buffer in masked.softening.items():
                buffer.copy_(soft[name][key])
        self._potentials = potentials
        self._steps.value = step
        if self._schedule.is_dense_at(self.steps):
            self._become_dense()

    def _given(self, masks: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> dict[str, MaskSolution]:
        """Return masks that exist, as if they had been found."""
        if not isinstance(masks, Mapping):
            raise TypeError(f"masks must be a mapping of names to bool tensors, got {described(masks)}")
        names = {name: site for site in self._sites for name in site.names}
        if unknown := [name for name in masks if name not in names]:
            lines = {line.name: line.reason for line in self._report}
            reason = f"stays dense ({lines[unknown[0]]})" if unknown[0] in lines else "is no parameter of the model"
            raise ValueError(
                f"masks has one for {unknown[0]!r}, which {reason}; leave it out, or include the parameter"
            )
        given = {site.name: [name for name in site.names if name in masks] for site in self._sites}
        if missing := [name for name, found in given.items() if not found]:
            raise ValueError(f"masks has none for {_some_of(missing)}; add it, or exclude the parameter")
        found = {}
        for site in self._sites:
            weight = parameters[site.name]
            mask, *others = (_given_mask(name, masks[name], weight) for name in given[site.name])
            if any(not torch.equal(mask, other) for other in others):
                shared = " and ".join(map(repr, given[site.name]))
                raise ValueError(f"masks has different ones for {shared}, which are one parameter; give one of them")
            if (fault := self._fault_of(site)(mask)) is not None:
                raise ValueError(f"masks has one for {site.name!r} that is not {site.pattern}: {fault}")
            mask = like(mask, weight)
            found[site.name] = MaskSolution(
                masks=mask, kept_importance=kept_importance(self._scores(site.name, weight), mask)
            )
        return found

    def _solve(
        self, parameters: Mapping[str, nn.Parameter], step: int, before: Mapping[str, Tensor] | None = None
    ) -> dict[str, MaskSolution]:
        """Find the masks of a step, which replace those of before."""
        sites = {site.name: site for site in self._sites}
        if self._hysteresis == 0:
            before = None

        def solve(name: str) -> MaskSolution:
            return self._solve_one(sites[name], parameters[name], step, None if before is None else before[name])

        def blank(name: str) -> Tensor:
            return torch.empty(parameters[name].shape, dtype=torch.bool, device=parameters[name].device)

        if self._group is None:
            return {name: solve(name) for name in sites}
        sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        return share_solves(sizes, solve, blank, self._group)

    def _scores(self, name: str, parameter: nn.Parameter) -> Tensor:
        if callable(self._importance):
            return checked_scores(self._importance(name, parameter), name, parameter)
        return parameter.detach()

    def _solve_one(self, site: Site, parameter: nn.Parameter, step: int, before: Tensor | None) -> MaskSolution:
        scores = self._scores(site.name, parameter)
        warm, recipe = self._potentials.get(site.name), self._recipe_of(site, step)

        def solve(part: Tensor, before: Tensor | None) -> MaskSolution:
            matrices = site.layout.matrices(part)
            found = solve_masks(matrices, recipe, warm)
            masks = found.masks
            if before is not None:
                masks = steady(matrices, masks, site.layout.matrices(before), recipe, self._hysteresis)
            return replace(found, masks=site.layout.weight(masks))

        try:
            found = (
                solve_sharded(scores, before, site.layout, recipe.tile_shape, solve)
                if is_sharded(scores)
                else solve(scores, before)
            )
        except ValueError as error:
            raise ValueError(f"parameter {site.name!r}: {_not_finite(scores) or error}; no mask was changed") from error
        return replace(found, kept_importance=kept_importance(scores, found.masks))

    def _finish_refresh(
        self, solutions: Mapping[str, MaskSolution], start: float, changed: Mapping[str, int]
    ) -> RefreshRecord:
        self._potentials = {
            name: solution.potentials for name, solution in solutions.items() if solution.potentials is not None
        }
        patterns = {site.name: self._recipe_of(site, self.steps).pattern for site in self._sites}
        layers = tuple(
            _layer_record(name, patterns[name], solution, changed[name]) for name, solution in solutions.items()
        )
        now = time.perf_counter()
        since = now - self._last_end if self._last_end is not None else math.nan
        self._last_end = now
        self._last_refresh = RefreshRecord(
            step=self.steps, seconds=now - start, share=(now - start) / since, layers=layers
        )
        return self._last_refresh

    def _recipe_of(self, site: Site, step: int) -> Recipe:
        """Return the recipe of the masks of a step."""
        assert site.pattern is not None
        recipe = self._recipes[site.pattern]
        return replace(recipe, pattern=self._schedule.pattern_at(step, site.pattern))

    def _fault_of(self, site: Site) -> MaskFault:
        assert site.pattern is not None
        recipe = self._recipes[site.pattern]
        recipes = [replace(recipe, pattern=pattern) for pattern in self._schedule.patterns(site.pattern)]
        return _Judge(site.layout, recipes, self._schedule.until is not None)

    def _unfinished(self) -> str | None:
        """Say which mask the sparsity schedule has left on the way to its pattern, and how."""
        if self._schedule.sparsity is None or self._schedule.is_dense_at(self.steps):
            return None
        for site in self._sites:
            assert site.pattern is not None
            judge = _Judge(site.layout, [self._recipes[site.pattern]], allows_dense=False)
            if (fault := judge(self._held(site.name).masked.mask)) is not None:
                return f"{site.name!r} is not {site.pattern}: {fault}"
        return None

    def _become_dense(self) -> None:
        held = {site.name: self._held(site.name).masked for site in self._sites}
        # Only once, unless something has written to a mask since: it may have been loaded.
        changed = [name for name in held if self._filled.get(name) != _moment(held[name].mask)]
        if changed:
            self._check_copies()
        for name in changed:
            held[name].set_mask(torch.ones_like(held[name].mask))
            self._filled[name] = _moment(held[name].mask)
        self._potentials = {}

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """Return the module that owns a parameter now, and its attribute. Never kept: both may be replaced."""
        _, _, attribute = name.rpartition(".")
        known = self._owners[name]()
        if known is not None and masked_parameter(known, attribute) is not None and self._is_here(known, name):
            return known, attribute
        # It may be a copy, of that module or made together with this object; but names shift where a module is removed
        # from a list, and then it is that of another name.
        path = self._paths[name]
        named = _submodule(self._model, path)
        is_other = any(owner() is named and self._paths[each] != path for each, owner in self._owners.items())
        found = None if named is None or is_other else masked_parameter(named, attribute)
        if named is not None and found is not None:
            self._owners[name] = weakref.ref(named)
            found.masked.shared, found.masked.is_copy = self._shared, False
            return named, attribute
        raise RuntimeError(
            f"parameter {name!r} is not masked any more: its module was removed, replaced or given another class; make "
            "a new Sparsifier"
        )

    def _is_here(self, module: nn.Module, name: str) -> bool:
        """Return whether the module of a parameter is a part of the model, wherever it is."""
        if _submodule(self._model, self._paths[name]) is module:
            return True
        # Adapters such as PEFT's wrap a layer, which then has another name.
        path = next((path for path, each in self._model.named_modules() if each is module), None)
        if path is not None:
            self._paths[name] = path
        return path is not None

    def _held(self, name: str) -> Held:
        """Return the dense weight and the mask of a parameter, as they are now."""
        found = masked_parameter(*self._place(name))
        assert found is not None
        check_weight(name, *found)
        return found

    def _check_attached(self) -> None:
        if self._is_final:
            raise RuntimeError("this Sparsifier is finalized: the model is a plain one again; make a new Sparsifier")

    def _check_first_steps(self) -> None:
        if self._first_steps is None:
            return
        held = {site.name: self._held(site.name) for site in self._sites}
        is_used = any(masked.is_read for _, masked in held.values()) or self._first_steps.may_have_begun()
        if self.steps == 0 and not is_used:
            raise RuntimeError(
                "step() was called before any backward; call it after optimizer.step(), once for every optimizer step"
            )
        if self._schedule.refresh_every is not None:
            self._check_copies()
        untrained = self._first_steps.untrained({name: weight for name, (weight, _) in held.items()})
        if untrained is None:
            return
        self._forget_first_steps()
        if untrained:
            warnings.warn(
                f"the optimizer step changed other parameters, but not {_some_of(untrained)}, which got gradients: "
                "give these to the optimizer too, or freeze them with requires_grad_(False)",
                stacklevel=3,
            )

    def _scale_decay(self, scaler: torch.amp.GradScaler | None) -> None:
        """Scale the decay with the loss, until the next `step`."""
        if scaler is not None and self._is_sr_ste:
            self._shared.scale = scaler.get_scale()

    def _watch_frozen(self) -> None:
        """Let "sr-ste" pull what has been unfrozen: compiled code does not show that a weight is read."""
        for name in list(self._frozen):
            weight, masked = self._held(name)
            if weight.requires_grad:
                masked.watch(weight)
                self._frozen.remove(name)

    def _withdraw(self) -> None:
        """Make the model a plain one again with its dense weights, as if there had been no Sparsifier."""
        remove_masks([*self._masked(lambda shared: shared is self._shared), *self._copies()], write=False)
        self._end()

    def _end(self) -> None:
        for module in self._model.modules():
            unguard_loading(module)
        self._forget_first_steps()
        self._is_final = True

    def _copies(self) -> list[tuple[str, nn.Module, str]]:
        """Return what is masked in copies of masked modules that are a part of the model: name, module, attribute."""
        return self._masked(lambda shared: shared.is_copy_of(self._shared))

    def _masked(self, is_wanted: Callable[[Shared], bool]) -> list[tuple[str, nn.Module, str]]:
        found = []
        for path, module in self._model.named_modules():
            for attribute in masked_attributes(module):
                held = masked_parameter(module, attribute)
                if held is not None and is_wanted(held.masked.shared):
                    found.append((f"{path}.{attribute}" if path else attribute, module, attribute))
        return found

    def _check_copies(self) -> None:
        """Refuse to change masks while a copy of a masked module trains under one that nothing changes."""
        for name, module, attribute in self._copies():
            held = masked_parameter(module, attribute)
            if held is not None and held.weight.requires_grad:
                raise RuntimeError(
                    f"{name!r} is in a copy of a masked module, whose mask this Sparsifier does not refresh; make the "
                    "Sparsifier after whatever copies modules (PEFT with modules_to_save), freeze the copy, or make it "
                    "a plain module with masksolve.torch.finalize"
                )

    def _forget_first_steps(self) -> None:
        if self._first_steps is not None:
            self._first_steps.forget()
            self._first_steps = None


@dataclass(frozen=True)
class _Judge:
    """Judges masks of one weight. Not a method of a Sparsifier: copies of the model must not copy that."""

    layout: Layout
    recipes: Sequence[Recipe]
    allows_dense: bool

    def __call__(self, mask: Tensor) -> str | None:
        whole = as_plain(mask)
        if self.allows_dense and bool(whole.all()):
            return None
        first, *others = self.recipes
        matrices = self.layout.matrices(whole)
        fault = mask_fault(matrices, first)
        return None if fault is None or any(mask_fault(matrices, recipe) is None for recipe in others) else fault


def _moment(mask: Tensor) -> tuple[int, int]:
    return id(mask), mask._version


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _no_soft(option: str, value: object) -> str:
    return (
        "gradient='soft' shrinks weights by the prices of exact, saturated, transposable masks of their magnitudes, as "
        f"long as there are masks; it does not go with {option}={value!r}"
    )


def _check_soft(**options: object) -> None:
    needed = {"importance": "magnitude", "method": "exact", "direction": "both", "saturated": True, "hysteresis": 0}
    for option, value in options.items():
        if value != needed.get(option):
            raise ValueError(_no_soft(option, value))


def _check_whole_tiles(model: nn.Module, sites: Sequence[Site]) -> None:
    for site in sites:
        assert site.pattern is not None
        rows, columns = site.layout.matrix_shape(model.get_parameter(site.name).shape)
        if rows % site.pattern.m or columns % site.pattern.m:
            raise ValueError(
                f"gradient='soft' needs whole tiles, and {site.name!r} is {rows}x{columns}, not a multiple of "
                f"{site.pattern.m} both ways; exclude it, or pass ragged='skip'"
            )


def _soften(site: Site, weight: nn.Parameter, masked: MaskedWeight, *, rescale: bool = False) -> None:
    """Shrink a masked weight by the prices of its mask, which is that of the weight as it is now."""
    assert site.pattern is not None
    matrices, masks = site.layout.matrices(weight.detach()), site.layout.matrices(masked.mask)
    masked.set_thresholds(weight, site.layout.weight(thresholds(matrices, masks, site.pattern)), rescale=rescale)


def _with_gradients(model: nn.Module, report: Sequence[ParameterReport], thin: Pattern) -> tuple[ParameterReport, ...]:
    """Say of each sparse parameter whether its gradient comes from thinned ones; refuse a model where none does."""
    reasons = {line.name: reason_unknown(owner_of(model, line.name)[0]) for line in report if line.sparse}
    if all(reason is not None for reason in reasons.values()):
        raise ValueError(
            f"gradient_sparsity={str(thin)!r} has nothing to thin in this {type(model).__name__} "
            f"({each_reason_once([(name, reason or '') for name, reason in reasons.items()])}); leave it out"
        )
    said = {name: str(thin) if reason is None else f"dense: {reason}" for name, reason in reasons.items()}
    return tuple(replace(line, gradient_sparsity=said.get(line.name)) for line in report)


def _layer_record(name: str, pattern: Pattern, solution: MaskSolution, changed: int) -> LayerRecord:
    assert solution.kept_importance is not None
    return LayerRecord(
        name=name,
        pattern=pattern,
        kept_importance=solution.kept_importance,
        sad=changed,
        flip_rate=changed / solution.masks.numel(),
        solved_on_cpu=solution.solved_on_cpu,
    )


def _softening(name: str, masked: MaskedWeight, saved: Any) -> dict[str, Tensor]:
    """Return what `MaskedWeight.softening` has to be, as it was saved."""
    found = saved.get(name, {}) if isinstance(saved, Mapping) else {}
    for key, buffer in masked.softening.items():
        if not isinstance(found.get(key), Tensor) or found[key].shape != buffer.shape:
            raise ValueError(
                f"the state_dict has no {key} of shape {tuple(buffer.shape)} for {name!r}, which gradient='soft' "
                "needs; make the Sparsifier as it was when saved"
            )
    return {key: found[key].to(buffer) for key, buffer in masked.softening.items()}


def _with_pruned(name: str, weight: Tensor, absent: Tensor, factor: Tensor, pruned: Tensor | None) -> Tensor:
    """Return the dense weight, whose absent entries are given, for the masked one that was saved with them."""
    held = weight[absent]
    if pruned is None or pruned.shape != held.shape:
        found = "none" if pruned is None else tuple(pruned.shape)
        raise ValueError(f"the state_dict has pruned weights {found} for {name!r}; its mask prunes {tuple(held.shape)}")
    pruned = pruned.to(held)
    dense = weight.masked_scatter(absent, pruned)
    # They may have been loaded already, with the model's own state_dict.
    if not bool(((held == masked_product(dense, factor)[absent]) | (held == pruned)).all()):
        raise ValueError(
            f"the pruned weights of the state_dict do not belong to the weights of {name!r}, which are not zero where "
            "its mask prunes; load the model that was saved with it, and before it"
        )
    return dense


def _given_mask(name: str, given: object, weight: Tensor) -> Tensor:
    # A copy of an array: PyTorch warns of those that cannot be written to.
    is_array = isinstance(given, np.ndarray) and given.dtype == bool
    mask = torch.from_numpy(np.array(given, order="C")) if is_array else given
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(f"masks has {described(mask)} for {name!r}; it takes bools of shape {tuple(weight.shape)}")
    return mask.to(weight.device)


def _are_tensors(given: object) -> bool:
    return isinstance(given, Mapping) and all(isinstance(each, Tensor) for each in given.values())


def _some_of(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _checked_decay(decay: float) -> float:
    check_number(decay, "decay")
    if not 0 <= decay < math.inf:
        raise ValueError(f"decay must be finite and not negative, got {decay!r}; SR-STE uses 2e-4")
    return decay


def _checked_hysteresis(hysteresis: float, method: str | MaskFunction) -> float:
    check_number(hysteresis, "hysteresis")
    if not 0 <= hysteresis < math.inf:
        raise ValueError(
            f"hysteresis must be finite and not negative, got {hysteresis!r}; .01 asks one percent more of a new mask"
        )
    if hysteresis > 0 and callable(method):
        raise ValueError(
            f"hysteresis={hysteresis!r} compares masks tile by tile, and a callable method makes masks of any "
            "structure; leave it out"
        )
    return hysteresis


def _not_finite(scores: Tensor) -> str | None:
    """Name the first score that is NaN or infinite."""
    if is_sharded(scores):
        return None
    bad = torch.nonzero(~torch.isfinite(scores))
    if len(bad) == 0:
        return None
    index = tuple(bad[0].tolist())
    return f"[{', '.join(map(str, index))}] is {float(scores[index])}; NaN and infinities have no importance"
