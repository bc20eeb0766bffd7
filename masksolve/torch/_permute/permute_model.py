"""permute_model: the channels between a model's layers in an order in which the best masks keep more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from masksolve._pattern import PatternLike, as_pattern
from masksolve._tiles import Direction
from masksolve.torch._dtensor import is_sharded
from masksolve.torch._layers import check_module, masked_attributes, thresholded_attributes
from masksolve.torch._outputs import evaluated, outputs_of
from masksolve.torch._permute.axes import axes_of
from masksolve.torch._permute.records import PermutedAxis, PermuteReport
from masksolve.torch._permute.search import AxisSearch, names_of, permute_axes
from masksolve.torch._solver.solve import Importance


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
    pattern = as_pattern(pattern)
    search = AxisSearch(pattern, direction, importance, escapes, time_limit, seed)
    names = _names(model)
    axes = axes_of(model)
    if not axes:
        raise ValueError(
            f"this {type(model).__name__} has no axis that is known to be free: no feed-forward or attention block of "
            "a known form, and no two layers in a row in an nn.Sequential"
        )
    with evaluated(model):
        found, deviation = permute_axes(axes, names, search, lambda: _outputs(model, inputs, keywords), model, on_axis)
    touched = {name for line in found if line.reason is None for name in line.weights}
    matrices = (name for name, parameter in model.named_parameters() if parameter.ndim > 1)
    return PermuteReport(
        pattern=pattern,
        axes=tuple(found),
        deviation=deviation,
        untouched=tuple(name for name in matrices if name not in touched),
    )


def _names(model: nn.Module) -> dict[int, str]:
    """Return the name of each tensor; refuse a model whose tensors cannot be reordered."""
    for module in model.modules():
        if masked := masked_attributes(module):
            raise ValueError(
                f"{masked[0]!r} of a {type(module).__name__} is masked by a Sparsifier; permute the model before, or "
                "finalize"
            )
        if masked := thresholded_attributes(module):
            raise ValueError(
                f"{masked[0]!r} of a {type(module).__name__} has trainable thresholds; permute the model before, or "
                "finalize its DynamicSparsifier"
            )
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_sharded(parameter) or parameter.is_meta:
            where = "sharded" if is_sharded(parameter) else "on the meta device"
            raise ValueError(f"parameter {name!r} is {where}; permute the whole model, with its values")
    return names_of(model)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> list[Tensor]:
    found = outputs_of(model(*inputs, **keywords))
    if not found:
        raise ValueError(f"this {type(model).__name__} returns no tensor of floats that could be compared")
    return found
