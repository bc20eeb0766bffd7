"""Orders of a module's axes: sought, applied, and put back where the module then computes something else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from masksolve import permute
from masksolve._inputs import as_count, check_direction, check_seconds
from masksolve._pattern import Pattern
from masksolve._tiles import Direction
from masksolve.torch._outputs import relative_change, rounding
from masksolve.torch._permute.axes import Axis, Member
from masksolve.torch._permute.records import PermutedAxis
from masksolve.torch._solver.solve import Importance, checked_scores


@dataclass(frozen=True)
class AxisSearch:
    """What orders are sought for, and how long; as for `permute_model`."""

    pattern: Pattern
    direction: Direction = "both"
    importance: Importance | None = None
    escapes: int = 0
    time_limit: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        permute.require_scipy()
        check_direction(self.direction)
        as_count(self.escapes, "escapes", 0)
        check_seconds(self.time_limit, "time_limit")
        as_count(self.seed, "seed", 0)


def permute_axes(
    axes: Sequence[Axis],
    names: Mapping[int, str],
    search: AxisSearch,
    outputs: Callable[[], list[Tensor]],
    module: nn.Module,
    on_axis: Callable[[PermutedAxis], object] | None = None,
) -> tuple[list[PermutedAxis], float]:
    """Reorder axes of a module, as long as its outputs stay the same; return what was done, and how much they change.

    `names` are those of the tensors by their ids, "" for one that is used in several places.
    """
    before = outputs()
    allowed = rounding(module)
    if not relative_change(before, outputs()) <= allowed:
        raise ValueError(
            "the model returns something else when it is called again, or NaN, so that nothing can be compared; make "
            "it deterministic, or give other inputs"
        )
    found: list[PermutedAxis] = []
    orders: list[tuple[int, Axis, Tensor]] = []
    applied: list[tuple[Axis, Tensor]] = []
    try:
        for axis in axes:
            line, order = _search(axis, names, search)
            if order is not None:
                _apply(axis, order, applied)
                orders.append((len(found), axis, order))
            found.append(line)
            if on_axis is not None:
                on_axis(line)
        deviation = relative_change(before, outputs())
        if not deviation <= allowed:
            _undo(applied, len(applied))
            deviation = 0.0
            for place, axis, order in orders:
                _apply(axis, order, applied)
                changed = relative_change(before, outputs())
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
    return found, deviation


def _apply(axis: Axis, order: Tensor, applied: list[tuple[Axis, Tensor]]) -> None:
    axis.reorder(order)
    applied.append((axis, order))


def _undo(applied: list[tuple[Axis, Tensor]], number: int) -> None:
    """Put the last axes back as they were."""
    for _ in range(number):
        axis, order = applied.pop()
        axis.reorder(torch.argsort(order))


def names_of(model: nn.Module) -> dict[int, str]:
    """Return the name of each parameter by its id, "" for one that is used in several places."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = "" if id(parameter) in names else name
    return names


def _search(axis: Axis, names: Mapping[int, str], search: AxisSearch) -> tuple[PermutedAxis, Tensor | None]:
    """Find the order of an axis, if it may be reordered."""
    start, pattern, direction = time.perf_counter(), search.pattern, search.direction
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
    matrices = [matrix for member in members for matrix in _matrices(member, names, search.importance)]
    found = permute.search(
        matrices,
        pattern,
        axes="rows",
        groups=axis.groups,
        direction="both" if direction == "both" else "columns",
        escapes=search.escapes,
        time_limit=search.time_limit,
        threads=torch.get_num_threads(),
        rng=search.seed,
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
    dtype = torch.float32 if values.dtype == torch.bfloat16 else values.dtype
    return [each.to("cpu", dtype).numpy() for each in member.matrices(values)]
