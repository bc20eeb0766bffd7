"""permute_model: the channels between a model's layers in an order in which the best masks keep more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from masksolve import permute
from masksolve._inputs import as_count, check_direction
from masksolve._pattern import Pattern, PatternLike, as_pattern
from masksolve._tiles import Direction
from masksolve._words import counted
from masksolve.torch._dtensor import is_sharded
from masksolve.torch._layers import check_module, masked_attributes
from masksolve.torch._permute.axes import Axis, Kind, Member, axes_of
from masksolve.torch._solver.solve import Importance, checked_scores


@dataclass(frozen=True, kw_only=True, repr=False)
class PermutedAxis:
    """One axis.

    Attributes
    ----------
    name : str
        That of the layer which takes it.
    kind : {"hidden", "value", "channels"}
        The hidden axis of a feed-forward block, the value channels of attention, or channels between two layers.
    length, groups : int
        Its lines, and how many groups of them are reordered each by itself.
    weights : tuple of str
        The parameters that it is an axis of.
    kept_before, kept_after : float
        The share of the importance of these that the best masks keep.
    seconds : float
    reason : str or None
        Why the axis was left as it was; None if it is reordered.
    """

    name: str
    kind: Kind
    length: int
    groups: int
    weights: tuple[str, ...]
    kept_before: float
    kept_after: float
    seconds: float
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dict."""
        return asdict(self)

    def __repr__(self) -> str:
        state = f"left: {self.reason}" if self.reason else f"kept {self.kept_before:.2%} -> {self.kept_after:.2%}"
        return f"PermutedAxis({self.name!r}, {self.kind}, {self.length}, {state})"


@dataclass(frozen=True, kw_only=True, repr=False)
class PermuteReport:
    """The result of `permute_model`.

    Attributes
    ----------
    pattern : Pattern
    axes : tuple of PermutedAxis
    deviation : float
        The norm of the change of the outputs as a share of their norm: rounding.
    untouched : tuple of str
        Matrices of which no axis is known that may be reordered.
    """

    pattern: Pattern
    axes: tuple[PermutedAxis, ...]
    deviation: float
    untouched: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dict, the pattern as "N:M"."""
        return {**asdict(self), "pattern": str(self.pattern)}

    def __repr__(self) -> str:
        moved = [axis for axis in self.axes if axis.reason is None]
        gains = [axis.kept_after - axis.kept_before for axis in moved]
        mean = sum(gains) / len(gains) if gains else 0.0
        return (
            f"PermuteReport({self.pattern}, {len(moved)} of {counted(len(self.axes), 'order')} changed, mean "
            f"gain {100 * mean:.2f} points, outputs changed by {self.deviation:.1e})"
        )


def permute_model(
    model: nn.Module,
    pattern: PatternLike,
    *inputs: Any,
    direction: Direction = "both",
    importance: Importance | None = None,
    escapes: int = 0,
    time_limit: float | None = None,
    seed: int = 0,
    on_axis: Callable[[PermutedAxis], object] | None = None,
    **keywords: Any,
) -> PermuteReport:
    """Reorder channels inside a model so that the best N:M masks keep more, and prove that it computes the same.

    Before pruning: then `Sparsifier`, `adaprune` and the command find better masks. Reordered are the hidden axes of
    feed-forward blocks, gated ones too, the value channels within the heads of attention (those of a group of heads
    that share values together), and the channels between two convolutions or Linear layers with what norms them.
    Residual streams, queries and keys stay.

    Parameters
    ----------
    model : nn.Module
        Changed in place; after an error, or an interrupt, it is as it was.
    pattern : str, (int, int) or Pattern
        N **kept** of every M.
    *inputs, **keywords
        The arguments of one call of the model, on which outputs are compared: all tensors of what it returns, in
        tuples, lists and mappings.
    direction : {"both", "rows", "columns"}
        As for `Sparsifier`.
    importance : callable, optional
        Gets the name of a parameter and the parameter, and returns scores of its shape that masks are to keep most of.
        By default magnitudes.
    escapes, time_limit
        As for `masksolve.permute.search`, for each axis.
    seed : int
        The same seed gives the same order.
    on_axis : callable, optional
        Called after each axis, with what will be in the report.

    Returns
    -------
    PermuteReport

    Raises
    ------
    ValueError
        If the model has no such axis, is masked or sharded already, returns no tensors, or returns others when it is
        called again.
    NotInstalledError
        Without scipy: pip install 'masksolve[permute]'.

    Notes
    -----
    Blocks are recognised by the names of their layers. One that computes something else in another order, as with a
    norm between its layers, is put back as it was, with that reason in the report.

    Examples
    --------
    >>> import torch, masksolve.torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
    >>> report = masksolve.torch.permute_model(model, "2:4", torch.randn(8, 16))
    >>> axis, = report.axes
    >>> axis.kept_after > axis.kept_before + 0.02, report.deviation < 1e-5
    (True, True)
    """
    check_module(model)
    pattern, direction = as_pattern(pattern), check_direction(direction)
    as_count(seed, "seed", 0)
    names = _names(model)
    axes = axes_of(model)
    if not axes:
        raise ValueError(
            f"this {type(model).__name__} has no axis that is known to be free: no feed-forward or attention block of "
            "a known form, and no two layers in a row in an nn.Sequential"
        )
    with _evaluated(model):
        before = _outputs(model, inputs, keywords)
        allowed = _allowed(model)
        if not _deviation(before, _outputs(model, inputs, keywords)) <= allowed:
            raise ValueError(
                "the model returns something else when it is called again, or NaN, so that nothing can be compared; "
                "make it deterministic, or give other inputs"
            )
        found: list[PermutedAxis] = []
        orders: list[tuple[int, Axis, Tensor]] = []
        applied: list[tuple[Axis, Tensor]] = []
        try:
            for axis in axes:
                line, order = _search(axis, names, pattern, direction, importance, escapes, time_limit, seed)
                if order is not None:
                    _apply(axis, order, applied)
                    orders.append((len(found), axis, order))
                found.append(line)
                if on_axis is not None:
                    on_axis(line)
            deviation = _deviation(before, _outputs(model, inputs, keywords))
            if not deviation <= allowed:
                _undo(applied, len(applied))
                deviation = 0.0
                for place, axis, order in orders:
                    _apply(axis, order, applied)
                    changed = _deviation(before, _outputs(model, inputs, keywords))
                    if not changed <= allowed:
                        _undo(applied, 1)
                        reason = f"the model computes something else in another order (outputs change by {changed:.1e})"
                        found[place] = replace(found[place], reason=reason, kept_after=found[place].kept_before)
                    else:
                        deviation = changed
        except BaseException:
            # Nothing has been proven yet.
            _undo(applied, len(applied))
            raise
    touched = {name for line in found if line.reason is None for name in line.weights}
    matrices = (name for name, parameter in model.named_parameters() if parameter.ndim > 1)
    return PermuteReport(
        pattern=pattern,
        axes=tuple(found),
        deviation=deviation,
        untouched=tuple(name for name in matrices if name not in touched),
    )


def _apply(axis: Axis, order: Tensor, applied: list[tuple[Axis, Tensor]]) -> None:
    axis.reorder(order)
    applied.append((axis, order))


def _undo(applied: list[tuple[Axis, Tensor]], number: int) -> None:
    """Put the last axes back as they were."""
    for _ in range(number):
        axis, order = applied.pop()
        axis.reorder(torch.argsort(order))


def _names(model: nn.Module) -> dict[int, str]:
    """Return the name of each tensor; refuse a model whose tensors cannot be reordered."""
    for module in model.modules():
        if masked := masked_attributes(module):
            raise ValueError(
                f"{masked[0]!r} of a {type(module).__name__} is masked by a Sparsifier; permute the model before, or "
                "finalize"
            )
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_sharded(parameter) or parameter.is_meta:
            where = "sharded" if is_sharded(parameter) else "on the meta device"
            raise ValueError(f"parameter {name!r} is {where}; permute the whole model, with its values")
        # A tensor with several names is used in several places: None stands for all of them.
        names[id(parameter)] = "" if id(parameter) in names else name
    return names


def _search(
    axis: Axis,
    names: Mapping[int, str],
    pattern: Pattern,
    direction: Direction,
    importance: Importance | None,
    escapes: int,
    time_limit: float | None,
    seed: int,
) -> tuple[PermutedAxis, Tensor | None]:
    """Find the order of an axis, if it may be reordered."""
    start = time.perf_counter()
    weights = list(dict.fromkeys(names.get(id(each.tensor), "") for each in (*axis.makers, *axis.takers)))
    line = PermutedAxis(
        name=axis.name,
        kind=axis.kind,
        length=axis.length,
        groups=axis.groups,
        weights=tuple(name for name in weights if name),
        kept_before=1.0,
        kept_after=1.0,
        seconds=0.0,
    )
    size = axis.length // axis.groups
    if not all(weights):
        return replace(line, reason="a weight of it is used in several places"), None
    if size < 2 * pattern.m:
        return replace(line, reason=f"{size} lines are fewer than two stripes of {pattern.m}"), None
    if axis.groups > 1 and size % pattern.m:
        return replace(line, reason=f"heads of {size} channels are not whole stripes of {pattern.m}"), None
    # One-sided masks along inputs are better or worse by the order of what takes the axis, those along outputs by that
    # of what makes it; both lie along the first axis of the matrices below.
    members = [*(axis.makers if direction != "rows" else ()), *(axis.takers if direction != "columns" else ())]
    if any(not _is_aligned(member, pattern.m) for member in members):
        return replace(line, reason=f"its lines do not begin at a multiple of {pattern.m} in every weight"), None
    matrices = [matrix for member in members for matrix in _matrices(member, names, importance)]
    found = permute.search(
        matrices,
        pattern,
        axes="rows",
        groups=axis.groups,
        direction="both" if direction == "both" else "columns",
        escapes=escapes,
        time_limit=time_limit,
        threads=torch.get_num_threads(),
        rng=seed,
    )
    line = replace(
        line, kept_before=found.kept_before, kept_after=found.kept_after, seconds=time.perf_counter() - start
    )
    return line, torch.from_numpy(found.rows)


def _is_aligned(member: Member, m: int) -> bool:
    starts = member.index[: len(member.index) // m * m].view(-1, m)
    return bool((starts[:, 0] % m == 0).all()) and bool((starts == starts[:, :1] + torch.arange(m)).all())


def _matrices(member: Member, names: Mapping[int, str], importance: Importance | None) -> list[np.ndarray[Any, Any]]:
    values = member.tensor.detach()
    if importance is not None:
        assert isinstance(member.tensor, nn.Parameter)
        name = names[id(member.tensor)]
        values = checked_scores(importance(name, member.tensor), name, member.tensor)
    # NumPy has no bfloat16; float32 holds it exactly.
    whole = values.float() if values.dtype == torch.bfloat16 else values
    return [each.cpu().numpy() for each in member.matrices(whole)]


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Switch off what is random in training, within the context."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> list[Tensor]:
    found = [each.detach().double() for each in _tensors(model(*inputs, **keywords)) if each.is_floating_point()]
    if not found:
        raise ValueError(f"this {type(model).__name__} returns no tensor of floats that could be compared")
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each)


def _deviation(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest change of an output as a share of its norm."""
    shares = [float((new - old).norm() / old.norm().clamp(min=1e-300)) for old, new in zip(before, after, strict=True)]
    return max(shares)


def _allowed(model: nn.Module) -> float:
    """Return the change that is taken for rounding: half the digits of the parameters' coarsest dtype."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return float(max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5)
