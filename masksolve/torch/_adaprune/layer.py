"""One layer of AdaPrune: from the moments of its inputs to its mask, its repaired parameters and its record."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Literal, get_args

import torch
from torch import Tensor

from masksolve._tiles import Direction
from masksolve.odds import group_odds, share_of_groups, share_of_tiles, tile_odds
from masksolve.torch._adaprune.calibration import Moments
from masksolve.torch._adaprune.curvature import Curvature
from masksolve.torch._adaprune.input_pool import InputPool
from masksolve.torch._adaprune.least_squares import absorb, adam, least_squares, output_energy
from masksolve.torch._adaprune.records import Conversion, PrunedLayer
from masksolve.torch._adaprune.scores import Score, one_step, scores_of
from masksolve.torch._adaprune.tasks import Task
from masksolve.torch._solver.solve import Importance, Recipe, checked_scores, kept_importance, solve_masks

Solver = Literal["lstsq", "adam", "absorb", "none"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)

_SAMPLED_TILES = 10_000


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """The options of `adaprune` that concern one layer; `memory` in bytes."""

    importance: Score | Importance
    masks: Mapping[str, Tensor] | None
    direction: Direction
    solver: Solver
    correct_bias: bool
    respect_zeros: bool
    alternations: int
    damping: float
    iterations: int
    min_tokens: int
    memory: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """The inputs of one source over the calibration batches; `pool` only where "adam" needs it."""

    moments: Moments
    pool: InputPool | None = None


@dataclass(frozen=True, eq=False)
class GroupInputs:
    """Inputs that the tasks of a group share: those of the sources of each of their weights, and H."""

    seen: Sequence[LayerInputs]
    damping: float
    min_tokens: int

    @property
    def tokens(self) -> Tensor:
        """The number of inputs that each matrix gets, on the CPU."""
        return torch.stack([each.moments.count for each in self.seen]).sum(0)

    @property
    def reached(self) -> Tensor:
        """Whether each matrix gets enough inputs to be repaired: (groups, 1, 1)."""
        found = self.tokens >= max(self.min_tokens, 1)
        return found.to(self.seen[0].moments.total.device).view(-1, 1, 1)

    @cached_property
    def curvature(self) -> Curvature:
        """H = X Xᵀ."""
        return Curvature(reduce(torch.add, (each.moments.gram() for each in self.seen)), self.damping)

    @cached_property
    def about_mean(self) -> Curvature:
        """H about the mean of the inputs of each source, but for matrices that are not repaired, nor their biases."""
        centred = reduce(torch.add, (each.moments.centred() for each in self.seen))
        return Curvature(torch.where(self.reached, centred, self.curvature.gram), self.damping)


@dataclass(frozen=True, kw_only=True)
class LayerRepair:
    """New values for a task's parameters, in its order, the mask of its weight, and the record.

    `energy` and `importance` are what its errors and its kept importance are shares of.
    """

    values: list[Tensor]
    mask: Tensor
    record: PrunedLayer
    energy: float
    importance: float


def repair_layer(task: Task, inputs: GroupInputs, options: LayerOptions, matrices: range | None = None) -> LayerRepair:
    """Find the mask of one weight and the values that go with it. Changes nothing.

    Parameters
    ----------
    task : Task
    inputs : GroupInputs
        Those of its sources, in their order.
    options : LayerOptions
    matrices : range, optional
        Of a stack of experts, those that the inputs are of; then the values are those of these matrices.

    Raises
    ------
    ValueError
        If X Xᵀ is not positive definite with this damping, or no mask is found.
    """
    try:
        return _mask_and_repair(_layer_of(task, inputs, options, matrices), options)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(
            f"parameter {task.name!r}: in float64 its inputs have no positive definite X Xᵀ with "
            f"damping={options.damping!r}; raise that (1e-2 is the default), or scale inputs beyond 1e150; "
            "nothing was changed"
        ) from error


def joined(parts: Sequence[LayerRepair], task: Task, direction: Direction) -> LayerRepair:
    """Return the repair of a stack of experts from those of its matrices, some at a time."""
    if len(parts) == 1:
        return parts[0]
    records = [part.record for part in parts]
    energy, importance = sum(part.energy for part in parts), sum(part.importance for part in parts)

    def error(errors: Sequence[float]) -> float:
        known = [(each, part.energy) for each, part in zip(errors, parts, strict=True) if part.energy > 0]
        return sum(each * size for each, size in known) / energy if known else max(errors)

    def alternation(number: int) -> float:
        # Those that stopped earlier have kept what they had.
        pairs = ((record.alternations, record.error_after) for record in records)
        return error([errors[number] if number < len(errors) else after for errors, after in pairs])

    kept = sum(part.record.kept_importance * part.importance for part in parts)
    mask = torch.cat([part.mask for part in parts])
    record = PrunedLayer(
        name=task.name,
        shape=tuple(task.weight.shape),
        pattern=task.pattern,
        kept_importance=kept / importance if importance > 0 else 1.0,
        tokens=tuple(count for record in records for count in record.tokens),
        error_before=error([record.error_before for record in records]),
        error_after=error([record.error_after for record in records]),
        alternations=tuple(map(alternation, range(max(len(record.alternations) for record in records)))),
        conversion=_conversion(task, task.weight.detach(), mask, direction),
        seconds=sum(record.seconds for record in records),
    )
    values = [torch.cat(each) for each in zip(*(part.values for part in parts), strict=True)]
    return LayerRepair(values=values, mask=mask, record=record, energy=energy, importance=importance)


def _mask_and_repair(layer: _Layer, options: LayerOptions) -> LayerRepair:
    start, task = time.perf_counter(), layer.task
    mask, scores = _first_mask(layer, options)
    before = _error(layer, torch.where(mask, layer.dense, 0.0), layer.inputs.curvature)
    weight, after = _repaired(layer, mask, options, None if layer.corrects else before)
    errors: list[float] = []
    while len(errors) < options.alternations:
        moved = one_step(layer.rows, _as_rows(layer, weight), layer.curvature.gram)
        again = _Masks(layer, options).of(_scores(layer, moved, options))
        if torch.equal(again, mask):
            break
        other, error = _repaired(layer, again, options)
        errors.append(error)
        if error >= after:
            break
        mask, weight, after = again, other, error
    record = PrunedLayer(
        name=task.name,
        shape=tuple(layer.dense.shape),
        pattern=task.pattern,
        kept_importance=kept_importance(scores, mask),
        tokens=tuple(layer.inputs.tokens.tolist()),
        error_before=before,
        error_after=after,
        alternations=tuple(errors),
        conversion=_conversion(task, layer.dense, mask, options.direction),
        seconds=time.perf_counter() - start,
    )
    return LayerRepair(
        values=[weight, *_biases(layer, weight)],
        mask=mask,
        record=record,
        energy=layer.energy,
        importance=float(scores.double().abs().sum()),
    )


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One weight as matrices (groups, outputs, inputs), float64, and the terms of the objective.

    `curvature` is about the mean where a bias is free to take that up (`corrects`); `energy` is ‖W X‖²; `chosen` says
    which matrices of a stack of experts these are.
    """

    task: Task
    inputs: GroupInputs
    dense: Tensor
    rows: Tensor
    curvature: Curvature
    corrects: bool
    energy: float
    chosen: slice

    @property
    def inputs_axis(self) -> int:
        """The axis of the weight that holds its inputs, or their channels."""
        return self.task.layout.matrix_axes(self.dense.ndim)[1]


def _layer_of(task: Task, inputs: GroupInputs, options: LayerOptions, matrices: range | None) -> _Layer:
    chosen = slice(None) if matrices is None else slice(matrices.start, matrices.stop)
    dense = task.weight.detach()[chosen]
    rows = task.layout.operators(dense.double())
    corrects = options.correct_bias and len(task.biases) > 0
    return _Layer(
        task=task,
        inputs=inputs,
        dense=dense,
        rows=rows,
        curvature=inputs.about_mean if corrects else inputs.curvature,
        corrects=corrects,
        energy=output_energy(rows, inputs.curvature.gram),
        chosen=chosen,
    )


def _as_rows(layer: _Layer, weight: Tensor) -> Tensor:
    return layer.task.layout.operators(weight).to(layer.rows.dtype)


def _from_rows(layer: _Layer, rows: Tensor) -> Tensor:
    return layer.task.layout.weight_of(rows, layer.dense.shape)


def _first_mask(layer: _Layer, options: LayerOptions) -> tuple[Tensor, Tensor]:
    """Return the mask that was given or is best, and the scores that it is to keep most of, shaped like the weight."""
    scores = _scores(layer, layer.rows, options)
    if options.masks is None:
        return _Masks(layer, options).of(scores), scores
    # The solver would say so; without it, shares of such scores would be recorded.
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(
            f"importance of parameter {layer.task.name!r} holds NaN or infinities, which have no importance; nothing "
            "was changed"
        )
    mask = options.masks[layer.task.name][layer.chosen].to(layer.dense.device)
    return mask & (layer.dense != 0) if options.respect_zeros else mask, scores


def _scores(layer: _Layer, rows: Tensor, options: LayerOptions) -> Tensor:
    if callable(options.importance):
        name, weight = layer.task.name, layer.task.weight
        return checked_scores(options.importance(name, weight), name, weight)[layer.chosen]
    norms = layer.inputs.curvature.gram.diagonal(dim1=1, dim2=2).sqrt()
    # Without inputs every weight would count for nothing.
    norms = torch.where(layer.inputs.tokens.to(norms.device).unsqueeze(1) > 0, norms, 1.0)
    masks, layout, axis = _Masks(layer, options), layer.task.layout, layer.inputs_axis
    # Inputs of a convolution, in the order of its kernel, are as many times its channels.
    kernel = rows.shape[2] // layer.dense.shape[axis]

    def project(scores: Tensor, first: int) -> Tensor:
        shape = list(layer.dense.shape)
        shape[axis] = scores.shape[2] // kernel
        return layout.operators(masks.of(layout.weight_of(scores, shape), first // kernel))

    width = kernel * layer.task.pattern.m
    return _from_rows(layer, scores_of(options.importance, rows, norms, layer.curvature, width, project))


class _Masks:
    """Masks of one weight for one set of scores after another, each found from the potentials of the last."""

    def __init__(self, layer: _Layer, options: LayerOptions) -> None:
        self._layer, self._respects_zeros = layer, options.respect_zeros
        self._recipe = Recipe(
            pattern=layer.task.pattern,
            method="exact",
            saturated=not options.respect_zeros,
            direction=options.direction,
        )
        self._potentials: dict[int, Tensor | None] = {}

    def of(self, scores: Tensor, first: int = 0) -> Tensor:
        """Return the mask that keeps most of the scores, shaped like the weight of all input channels from one on."""
        layer, layout = self._layer, self._layer.task.site.layout
        axis = layer.inputs_axis
        nonzero = layer.dense.narrow(axis, first, scores.shape[axis]) != 0
        if self._respects_zeros:
            scores = torch.where(nonzero, scores, 0.0)
        try:
            found = solve_masks(layout.matrices(scores), self._recipe, self._potentials.get(first))
        except ValueError as error:
            raise ValueError(f"parameter {layer.task.name!r}: {error}; nothing was changed") from error
        self._potentials[first] = found.potentials
        mask = layout.weight(found.masks)
        return mask & nonzero if self._respects_zeros else mask


def _repaired(
    layer: _Layer, mask: Tensor, options: LayerOptions, unrepaired: float | None = None
) -> tuple[Tensor, float]:
    """Return the repaired weight under a mask, in its own dtype, and its error.

    `unrepaired` is the error of the mask alone, if it is known.
    """
    layout, dense = layer.task.layout, layer.dense
    alone = torch.where(mask, dense, 0.0)
    if unrepaired is None:
        unrepaired = _error(layer, alone, layer.curvature)
    # A pruned router may send no input to a layer that the dense one used.
    reached = layer.inputs.reached
    if options.solver == "none" or not bool(reached.any()):
        return alone, unrepaired
    if options.solver == "lstsq":
        rows = least_squares(layer.rows, _as_rows(layer, mask).bool(), layer.curvature)
        found = _from_rows(layer, rows)
    else:
        found = layout.weight(absorb(layout.matrices(dense), layout.matrices(mask), layer.task.pattern.m))
        if options.solver == "adam":
            pools = [(source, each.pool) for source, each in zip(layer.task.sources, layer.inputs.seen, strict=True)]
            # Adam needs gradients even if the caller has switched them off.
            with torch.inference_mode(False):
                found = adam(
                    [(source, pool) for source, pool in pools if pool],
                    found,
                    mask,
                    train_bias=layer.corrects,
                    iterations=options.iterations,
                    generator=torch.Generator().manual_seed(options.seed),
                )
    rows = torch.where(reached, _as_rows(layer, found), _as_rows(layer, alone))
    found = torch.where(mask, _from_rows(layer, rows).to(dense.dtype), 0.0)
    # Rounding, overflow or steps of Adam that lead away must not make it worse than no repair.
    error = _error(layer, found, layer.curvature)
    if error <= unrepaired or options.solver == "absorb":
        return found, error
    return alone, unrepaired


def _error(layer: _Layer, weight: Tensor, curvature: Curvature) -> float:
    error = output_energy(layer.rows - _as_rows(layer, weight), curvature.gram)
    return error / layer.energy if layer.energy > 0 else math.inf if error > 0 else 0.0


def _biases(layer: _Layer, weight: Tensor) -> list[Tensor]:
    """Return the biases that keep the mean output; none where they are to stay."""
    if not layer.corrects:
        return []
    lost = torch.where(layer.inputs.reached, layer.rows - _as_rows(layer, weight), 0.0)
    shifts = [lost @ each.moments.mean().unsqueeze(2) for each in layer.inputs.seen]
    return [
        (bias.double() + shift.reshape(bias.shape)).to(bias.dtype)
        for bias, shift in zip((each.detach()[layer.chosen] for each in layer.task.biases), shifts, strict=True)
    ]


def _conversion(task: Task, dense: Tensor, mask: Tensor, direction: Direction) -> Conversion | None:
    nonzero = dense != 0
    sparsity = 1 - float(nonzero.double().mean())
    if sparsity == 0:
        return None
    n, m = task.pattern.n, task.pattern.m
    matrices = task.site.layout.matrices(nonzero).cpu().numpy()
    if direction == "both":
        fitting = share_of_tiles(matrices, n, m)
        odds = tile_odds(sparsity, n, m, samples=_SAMPLED_TILES, rng=0).value
    else:
        fitting = share_of_groups(matrices, n, m, direction=direction)
        odds = group_odds(sparsity, n, m)
    return Conversion(sparsity=sparsity, fitting=fitting, odds=odds, touched=int((nonzero & ~mask).sum()))
