"""Repair of a masked layer: the kept weights that bring its output closest to the dense layer's.

The objective is ‖W X − (S∘W′) X‖² over the calibration inputs X, under a mask S (Hubara et al. 2021, arXiv 2102.08124,
section on AdaPrune). It depends on X through H = X Xᵀ alone; with a bias, which takes up the mean, H is about the mean.
Matrices are (groups, outputs, inputs), float64: one group but for grouped convolutions, projections that are stacked in
one weight, and experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import cast

import torch
from torch import Tensor

from masksolve._threads import run_pieces
from masksolve.torch._adaprune.calibration import CHUNK
from masksolve.torch._adaprune.conjugate_gradients import conjugate_gradients
from masksolve.torch._adaprune.curvature import Curvature
from masksolve.torch._adaprune.input_pool import InputPool
from masksolve.torch._adaprune.source import Source

# The paper's: cached activations per step, and the learning rates of weights and biases.
_BATCH = 50
_WEIGHT_RATE, _BIAS_RATE = 1e-3, 1e-2
# Conjugate gradients take about 25 steps of 4 (inputs)² operations a row, at five times the speed of a factor's
# (kept inputs)³ / 3.
_FACTORS = 60
# Bytes of normal equations that stay in a core's cache while they are gathered and factored.
_CACHED = 1 << 20
# Each refinement gains about six digits; where more of them are needed, float64 is as fast.
_REFINEMENTS = 6
_PRECISION = 1e-12


def output_energy(difference: Tensor, gram: Tensor) -> float:
    """Return ‖D X‖² of a difference D of weights; nan where they are not finite."""
    return float((difference @ gram).mul_(difference).sum().clamp(min=0))


def least_squares(weight: Tensor, mask: Tensor, curvature: Curvature) -> Tensor:
    """Solve the least squares of every output on its own kept inputs.

    Minimises ‖W X − (S∘W′) X‖² + d ‖W − W′‖², where d is the damping. As it is anchored at W, the damping never makes
    the first term larger than it is without repair. Rows that keep few inputs are solved in closed form, in float64;
    where that is slower, by conjugate gradients, whose sum of both terms is within `EXCESS` of the least.

    Parameters
    ----------
    weight : Tensor of float64, shape (groups, outputs, inputs)
    mask : Tensor of bool, of the same shape
    curvature : Curvature

    Returns
    -------
    Tensor, shaped like the weight, zero where the mask is False
    """
    pruned = torch.where(mask, 0.0, weight)
    repaired = torch.where(mask, weight, 0.0)
    systems = curvature.system
    inverses = _inverses(mask, curvature)
    for group in range(len(weight)):
        system, inverse, lost, kept = systems[group], inverses[group], pruned[group], mask[group]
        right = lost @ curvature.gram[group]
        found = torch.zeros_like(right)
        is_solved = torch.zeros_like(kept[:, 0])
        if inverse is not None:
            error = (right * lost).sum(1) + curvature.amounts[group] * lost.square().sum(1)
            for rows in torch.arange(len(kept), device=kept.device).split(max(1, CHUNK // (8 * len(system)))):
                found[rows], is_solved[rows] = conjugate_gradients(
                    system, inverse, right[rows], kept[rows], error[rows]
                )
        if not bool(is_solved.all()):
            found[~is_solved] = _solve_rows(system, right[~is_solved], kept[~is_solved])
        repaired[group] += found
    return repaired


def _inverses(mask: Tensor, curvature: Curvature) -> Sequence[Tensor | None]:
    """Return the inverse for each group where conjugate gradients are faster than factors, and possible."""
    width, inputs = int(mask.sum(2).max()), mask.shape[2]
    if width**3 > _FACTORS * inputs**2:
        # What a row keeps may be positive definite even so.
        with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            return list(curvature.inverse)
    return [None] * len(mask)


def _solve_rows(system: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    """Solve A x = b for each row of the mask, on the entries it keeps: (outputs, inputs), zero elsewhere."""
    found = torch.zeros_like(right)
    counts = mask.sum(1)
    width = int(counts.max())
    if width == 0:
        return found
    # Rows that keep fewer are filled up with equations x = 0.
    kept = torch.sort((~mask).to(torch.uint8), dim=1, stable=True).indices[:, :width]
    filled = torch.arange(width, device=mask.device) >= counts.unsqueeze(1)
    wanted = right.gather(1, kept).masked_fill(filled, 0.0)
    # A unit diagonal fits float32, whatever the inputs' sizes.
    scale = system.diagonal().rsqrt()
    rough = (scale.unsqueeze(1) * system * scale).float()
    is_solved = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    on_cpu = system.device.type == "cpu"
    few = max(1, (_CACHED if on_cpu else CHUNK) // (8 * width * width))
    pieces = torch.arange(len(mask), device=mask.device).split(max(few, CHUNK // (8 * width * width)))
    solved: list[tuple[Tensor, Tensor, Tensor]] = []

    def solve(rows: Tensor) -> None:
        parts = zip(kept[rows].split(few), filled[rows].split(few), strict=True)
        # Symmetric; transposed, it has LAPACK's order and is copied faster.
        factors, failed = zip(*(torch.linalg.cholesky_ex(_parts(rough, *part).mT) for part in parts), strict=True)
        solution, is_refined = _refined(system, factors, scale, wanted[rows], kept[rows], filled[rows])
        solved.append((rows, solution, is_refined & (torch.cat(failed) == 0)))

    with _one_thread_each() as threads:
        run_pieces(solve, pieces, threads if on_cpu else 1)
    # Written here, as other threads must not write to tensors made in inference mode.
    for rows, solution, succeeded in solved:
        found[rows] = torch.zeros_like(right[rows]).scatter_(1, kept[rows], solution)
        is_solved[rows] = succeeded
    for rows in (~is_solved).nonzero().flatten().split(few):
        factor = torch.linalg.cholesky(_parts(system, kept[rows], filled[rows]))
        solution = torch.cholesky_solve(wanted[rows].unsqueeze(2), factor).squeeze(2)
        found[rows] = torch.zeros_like(right[rows]).scatter_(1, kept[rows], solution)
    return found


@contextmanager
def _one_thread_each() -> Iterator[int]:
    """Make torch use one core in each thread of Python; yield how many it used before.

    Two threads that factor a small matrix each take half the time of two that share the work on it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _parts(system: Tensor, columns: Tensor, fill: Tensor) -> Tensor:
    """Return the rows and columns of a matrix that each row of `columns` lists, the identity where `fill`."""
    if system.device.type == "cpu":
        # Seven times as fast as an index of both axes.
        parts = system.new_empty(*columns.shape, columns.shape[1])
        for part, chosen in zip(parts, columns, strict=True):
            torch.index_select(system.index_select(0, chosen), 1, chosen, out=part)
    else:
        parts = system[columns.unsqueeze(2), columns.unsqueeze(1)]
    if bool(fill.any()):
        parts.masked_fill_(fill.unsqueeze(2) | fill.unsqueeze(1), 0.0)
        parts.diagonal(dim1=1, dim2=2).masked_fill_(fill, 1.0)
    return parts


def _refined(
    system: Tensor, factors: Sequence[Tensor], scale: Tensor, wanted: Tensor, columns: Tensor, fill: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve to float64's precision with float32 factors: their error is solved for in turn, until it is rounding.

    Factors take most of the time of a repair, and half as long in float32. Also return which solutions converged.
    """
    scales = scale[columns]
    found, residual = torch.zeros_like(wanted), wanted
    for _ in range(_REFINEMENTS):
        scaled = residual * scales
        size = scaled.abs().amax(1, keepdim=True)
        shrunk = torch.where(size > 0, scaled / size, 0.0).float().unsqueeze(2)
        steps = []
        for factor, part in zip(factors, shrunk.split(len(factors[0])), strict=True):
            half = torch.linalg.solve_triangular(factor, part, upper=False)
            steps.append(torch.linalg.solve_triangular(factor.mT, half, upper=True))
        step = torch.cat(steps).squeeze(2) * size * scales
        found = found + step
        is_refined = step.norm(dim=1) <= _PRECISION * found.norm(dim=1)
        if bool(is_refined.all()):
            break
        full = torch.zeros(len(columns), len(system), dtype=system.dtype, device=system.device)
        product = full.scatter_(1, columns, found) @ system
        residual = (wanted - product.gather(1, columns)).masked_fill(fill, 0.0)
    return found, is_refined


def absorb(weight: Tensor, mask: Tensor, m: int) -> Tensor:
    """Add the mean of the weights that a group of m loses to each that it keeps.

    Parameters
    ----------
    weight, mask : Tensor, shape (..., R, C)
        Groups are m consecutive entries of a row.
    m : int
    """
    columns = weight.shape[-1]
    group = torch.arange(columns, device=weight.device) // m
    groups = int(group[-1]) + 1
    shape = (*weight.shape[:-1], groups)
    index = group.expand(weight.shape)
    lost = weight.new_zeros(shape).scatter_add_(-1, index, torch.where(mask, 0.0, weight))
    number = weight.new_zeros(shape).scatter_add_(-1, index, (~mask).to(weight.dtype))
    mean = (lost / number.clamp(min=1)).gather(-1, index)
    return torch.where(mask, weight + mean, 0.0)


def adam(
    pools: Sequence[tuple[Source, InputPool]],
    start: Tensor,
    mask: Tensor,
    *,
    train_bias: bool,
    iterations: int,
    generator: torch.Generator,
) -> Tensor:
    """Repair as the paper does: Adam on minibatches of cached inputs, the mask applied after every step.

    Parameters
    ----------
    pools : sequence of (Source, InputPool)
        Those that share the weight, still as they were, and the inputs of each.
    start, mask : Tensor, shaped like the weight
    train_bias : bool
        Whether the biases are trained along with the weight.
    iterations : int
        The paper's are 1000.
    generator : torch.Generator
        On the CPU; draws the minibatches.

    Returns
    -------
    Tensor of float32 or float64, shaped like the weight
    """
    dtype = torch.promote_types(torch.float32, pools[0][1].dtype)
    weight = start.to(dtype, copy=True).requires_grad_()
    biases = {}
    for source, _ in pools if train_bias else ():
        biases[source] = cast(Tensor, source.bias).detach().to(dtype, copy=True).requires_grad_()
    rates = [{"params": [weight], "lr": _WEIGHT_RATE}, {"params": list(biases.values()), "lr": _BIAS_RATE}]
    # Fused, as otherwise the update takes a third of the time.
    optimizer = torch.optim.Adam([each for each in rates if each["params"]], fused=True)
    total = sum(len(pool) for _, pool in pools)
    for _ in range(iterations):
        chosen = torch.randint(total, (_BATCH,), generator=generator)
        loss, outputs = weight.new_zeros(()), 0
        with torch.enable_grad():
            offset = 0
            for source, pool in pools:
                mine = chosen[(chosen >= offset) & (chosen < offset + len(pool))] - offset
                offset += len(pool)
                dense = source.weight.detach().to(dtype)
                bias = None if source.bias is None else source.bias.detach().to(dtype)
                for taken, groups in pool.take(mine):
                    x = taken.to(weight.device, dtype)
                    with torch.no_grad():
                        target = source.output(dense, bias, x, groups)
                    error = source.output(weight, biases.get(source, bias), x, groups) - target
                    loss = loss + error.square().sum()
                    outputs += error.numel()
            (loss / outputs).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            weight.mul_(mask)
    return weight.detach()
