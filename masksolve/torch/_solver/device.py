"""Exact masks where the weights lie: on a GPU by the Triton kernel, elsewhere in batched PyTorch operations.

Whatever the device, every tile is proven there, or handed to the CPU's solver, which proves it.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from masksolve._errors import UnusableWeightError
from masksolve._inputs import check_values
from masksolve._methods import load_method
from masksolve._pattern import Pattern
from masksolve._tiles import Direction, Margins, Region, potentials_shape, regions
from masksolve.torch._solver import batched
from masksolve.torch._solver.direct_4x4 import halves, is_direct
from masksolve.torch._solver.fixed_point import stages_for
from masksolve.torch._solver.solution import MaskSolution

_logger = logging.getLogger("masksolve")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Weights sorted at a time, as each takes a dozen bytes.
_SORTED = 1 << 24
# The release of PyTorch 2.8, the first that compiles the kernel: older ones have no tuples, or no tl.gather.
_OLDEST_TRITON = (3, 4)


def solve_on_device(
    weights: Tensor,
    pattern: Pattern,
    *,
    saturated: bool = True,
    direction: Direction = "both",
    potentials: Tensor | None = None,
) -> MaskSolution:
    """Find the masks that keep the largest sum of abs(weights), proven optimal, where the weights lie.

    Parameters
    ----------
    weights : Tensor, shape (..., R, C)
        float16, bfloat16, float32 or float64; any R, C >= 1, any strides.
    pattern : Pattern
        N **kept** of every M.
    saturated : bool
        True: exactly N ones in every whole group. False: at most N, which can keep more.
    direction : {"both", "rows", "columns"}
        "both": transposable. "rows": one-sided, N of every M consecutive entries of a row. "columns": of a column.
    potentials : Tensor, shape (..., R // m, C // m, m), optional
        A warm start, as an earlier call returned it. Any numbers will do; they never change how much is kept. Unused
        where whole tiles are solved directly, and for one-sided masks.

    Returns
    -------
    MaskSolution
        Its potentials are float32; None for one-sided masks, and where whole tiles are solved directly: those of 4x4
        under `saturated=True`.

    Raises
    ------
    TypeError
        For weights of another dtype.
    ValueError
        For a wrong shape, and for NaN or infinite weights, naming the first by position.

    References
    ----------
    Hubara et al., NeurIPS 2021, arXiv 2102.08124, for the problem; `direct_4x4` and `fixed_point` say why the
    masks are optimal.

    Examples
    --------
    >>> import torch
    >>> from masksolve import Pattern
    >>> solve_on_device(torch.tensor([[3.0, 1.0, 5.0], [1.0, 2.0, 7.0]]), Pattern(1, 2)).masks.int()
    tensor([[1, 0, 0],
            [0, 1, 1]], dtype=torch.int32)
    """
    _check(weights, pattern, potentials)
    weights = weights.detach()
    rows, columns = weights.shape[-2:]
    shape = potentials_shape(weights.shape, pattern.m)
    margins = Margins(pattern.n, saturated, saturated)
    if direction != "both" or is_direct((pattern.m, pattern.m), margins, weights):
        found = None
    else:
        found = torch.zeros(shape, dtype=torch.float32, device=weights.device)
    if pattern.zeros == 0 or pattern.kept == 0:
        if not weights.isfinite().all():
            _refuse_values(weights)
        masks = torch.full(weights.shape, pattern.zeros == 0, device=weights.device)
        return MaskSolution(masks=masks, potentials=found)

    masks = torch.empty(weights.shape, dtype=torch.bool, device=weights.device)
    if direction != "both":
        if not weights.isfinite().all():
            _refuse_values(weights)
        for region in regions(rows, columns, pattern, direction, saturated):
            _fill_groups(_tiles(weights, region), _tiles(masks, region), pattern.n)
        return MaskSolution(masks=masks)
    if found is not None and potentials is not None:
        found.copy_(potentials)
    solved_on_cpu = 0
    try:
        for region in regions(rows, columns, pattern, "both", saturated):
            is_whole = region.tile_shape == (pattern.m, pattern.m)
            solved_on_cpu += _solve_region(
                _tiles(weights, region),
                _tiles(masks, region),
                None if found is None or not is_whole else found.view(-1, pattern.m),
                region.margins,
                warm=potentials is not None,
            )
    except UnusableWeightError:
        _refuse_values(weights)
        raise
    if solved_on_cpu:
        _logger.debug("%d tiles of %s weights solved on the CPU", solved_on_cpu, tuple(weights.shape))
    return MaskSolution(masks=masks, potentials=found, solved_on_cpu=solved_on_cpu)


def _fill_groups(groups: Tensor, masks: Tensor, kept: int) -> None:
    """Fill masks (b, p, q, h, w) of one-sided groups, of which h or w is 1: their `kept` largest entries."""
    at_once = max(1, _SORTED // groups[:, 0].numel())
    for part, mask in zip(groups.split(at_once, dim=1), masks.split(at_once, dim=1), strict=True):
        # Stable, so that of equal entries the first is kept, on every device.
        order = part.abs().flatten(3).argsort(dim=3, descending=True, stable=True)
        ones = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
        mask.copy_(ones.scatter_(3, order[..., :kept], True).view(mask.shape))


def _solve_region(
    tiles: Tensor,
    masks: Tensor,
    potentials: Tensor | None,
    margins: Margins,
    *,
    warm: bool,
) -> int:
    """Fill masks and potentials of tiles (b, p, q, h, w); return how many tiles the CPU solved."""
    height, width = tiles.shape[3:]
    solver = _solver(tiles)
    which = None
    if is_direct((height, width), margins, tiles):
        which = solver.solve_directly(tiles, masks, halves(margins.kept)).nonzero()[:, 0]
        if len(which) == 0:
            return 0
    if potentials is None:
        potentials = torch.empty(tiles.shape[:3].numel(), width, dtype=torch.float32, device=tiles.device)
        warm = False
    for stage in stages_for(height, width, margins):
        remaining = solver.solve_stage(tiles, masks, potentials, which, stage, warm)
        warm = True
        some = remaining.nonzero()[:, 0]
        which = some if which is None else which[some]
        if len(which) == 0:
            return 0
    assert which is not None
    _solve_on_cpu(tiles, masks, potentials, which, margins)
    return len(which)


def _solve_on_cpu(tiles: Tensor, masks: Tensor, potentials: Tensor, which: Tensor, margins: Margins) -> None:
    """Solve the tiles that `which` (k) counts on the CPU; only they are copied."""
    across = tiles.shape[2]
    in_matrix = tiles.shape[1] * across
    where = which // in_matrix, which % in_matrix // across, which % across
    weights = tiles[where]
    given = weights.double() if weights.dtype == torch.float64 else weights.float()
    solved = np.empty((1, *weights.shape), np.bool_)
    ends = potentials[which].nan_to_num().to(given.dtype).cpu().numpy()[np.newaxis]
    solve = load_method("exact", ())
    solve(given.cpu().numpy()[np.newaxis], solved, margins, threads=None, potentials=ends, warm=True)
    masks[where] = torch.from_numpy(solved[0]).to(tiles.device)
    largest = np.finfo(np.float32).max
    potentials[which] = torch.from_numpy(ends[0].clip(-largest, largest)).float().to(tiles.device)


def _tiles(matrix: Tensor, region: Region) -> Tensor:
    """Return the tiles (b, p, q, h, w) of a region of (..., R, C): a view unless the leading axes lie apart."""
    height, width = region.tile_shape
    part = matrix.reshape(-1, *matrix.shape[-2:])[:, region.rows, region.columns]
    count, rows, columns = part.shape
    return part.view(count, rows // height, height, columns // width, width).transpose(2, 3)


def _solver(tiles: Tensor) -> ModuleType:
    """Return the module that solves these tiles: both have `solve_directly` and `solve_stage`."""
    kernel = triton_module() if tiles.is_cuda else None
    if kernel is None or max(tiles.shape[3:]) > kernel.LARGEST_M or max(tiles.stride()[3:]) > kernel.LARGEST_STRIDE:
        return batched
    return kernel


@cache
def triton_module(name: str = "masksolve.torch._solver.kernels") -> ModuleType | None:
    """Return the module of a kernel, or None where there is no Triton that it runs on."""
    try:
        import triton
    except ImportError:
        return None
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST_TRITON:
        _logger.warning(
            "Triton %s is too old for the kernels that find masks on a GPU, which need %d.%d or newer (PyTorch 2.8): "
            "batched PyTorch operations find them, more slowly",
            triton.__version__,
            *_OLDEST_TRITON,
        )
        return None
    return importlib.import_module(name)


def _check(weights: Tensor, pattern: Pattern, potentials: Tensor | None) -> None:
    if weights.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"weights have dtype {weights.dtype}; allowed are {allowed}; convert them with .to() first")
    shape = tuple(weights.shape)
    if weights.ndim < 2:
        raise ValueError(f"weights have shape {shape}; a matrix (..., R, C) has at least two dimensions")
    if weights.numel() == 0:
        raise ValueError(f"weights have shape {shape}, which is empty; every dimension must be at least 1")
    if potentials is None:
        return
    wanted = potentials_shape(shape, pattern.m)
    if tuple(potentials.shape) != wanted or not potentials.is_floating_point():
        raise ValueError(
            f"potentials have shape {tuple(potentials.shape)} and dtype {potentials.dtype}; weights of shape {shape} "
            f"need floats of shape {wanted}, as an earlier call returns them for {pattern}"
        )


def _refuse_values(weights: Tensor) -> None:
    """Raise the ValueError that names the first weight that is not finite."""
    check_values((weights if weights.dtype == torch.float64 else weights.float()).cpu().numpy())
