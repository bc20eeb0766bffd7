"""Several processes: one solve for each tensor under DDP, and shards solved where they lie under FSDP2 and DTensor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from masksolve.torch._dtensor import as_plain, like
from masksolve.torch._solver.solution import MaskSolution

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

    from masksolve.torch._layers import Layout


def unwrapped(model: nn.Module) -> tuple[nn.Module, ProcessGroup | None]:
    """Return the module inside DistributedDataParallel and its process group; for other models, the model and None."""
    if isinstance(model, DistributedDataParallel):
        return model.module, model.process_group
    return model, None


def check_not_fully_sharded(model: nn.Module) -> None:
    """Refuse a model on whose parameters `fully_shard` holds already: it would go on using the dense ones."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is not None and any(isinstance(each, module.FSDPModule) for each in model.modules()):
        raise ValueError("the model is sharded by fully_shard already; make the Sparsifier before, with real weights")


def share_solves(
    sizes: Mapping[str, int],
    solve: Callable[[str], MaskSolution],
    blank: Callable[[str], Tensor],
    group: ProcessGroup,
) -> dict[str, MaskSolution]:
    """Solve each tensor on one process and broadcast its mask to all.

    Parameters
    ----------
    sizes : mapping from name to number of weights
        The same on every process.
    solve : callable
        Solves the tensor of a name.
    blank : callable
        An uninitialised mask for a name, to receive into.
    group : ProcessGroup

    Raises
    ------
    RuntimeError
        On every process, if a solve fails on another one. The process where it fails raises its own error.
    """
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    owners = _owners(sizes, count)
    solved: dict[str, MaskSolution] = {}
    error: Exception | None = None
    try:
        for name, owner in owners.items():
            if owner == rank:
                solved[name] = solve(name)
    except Exception as caught:
        # The others wait for this process, and have to learn of it.
        error = caught
    gathered: list[Any] = [None] * count
    mine = {name: (solution.solved_on_cpu, solution.kept_importance) for name, solution in solved.items()}
    dist.all_gather_object(gathered, (None if error is None else str(error), mine), group=group)
    if error is not None:
        raise error
    for other, (message, _) in enumerate(gathered):
        if message is not None:
            raise RuntimeError(f"process {other} found no masks: {message}")
    found = {}
    for name, owner in owners.items():
        masks = solved[name].masks.contiguous() if owner == rank else blank(name)
        dist.broadcast(masks, dist.get_global_rank(group, owner), group=group)
        solved_on_cpu, kept_importance = gathered[owner][1][name]
        found[name] = MaskSolution(
            masks=masks,
            potentials=solved[name].potentials if owner == rank else None,
            solved_on_cpu=solved_on_cpu,
            kept_importance=kept_importance,
        )
    return found


def _owners(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Assign tensors to processes: the largest first, each to the process with the least to do."""
    load = [0] * count
    owners = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        owners[name] = load.index(min(load))
        load[owners[name]] += sizes[name]
    return owners


def solve_sharded(
    scores: DTensor,
    before: Tensor | None,
    layout: Layout,
    tile_shape: tuple[int, int],
    solve: Callable[[Tensor, Tensor | None], MaskSolution],
) -> MaskSolution:
    """Solve a DTensor: masks distributed as the scores are, the potentials and the count of this process.

    `solve` gets the same part of the scores and of `before`, the masks until now, which may be whole.

    A shard whose edges are multiples of the tile's holds whole tiles and is solved where it lies. Otherwise every
    process gathers the tensor and solves all of it.
    """
    from torch.distributed.tensor import DTensor, Partial, distribute_tensor

    mesh, placements = scores.device_mesh, scores.placements
    faults = (~torch.isfinite(scores.to_local())).sum()
    # Found together, so that no process waits for one that gave up. DTensor's `all` of PyTorch 2.8 is a shard's.
    if bool(DTensor.from_local(faults, mesh, [Partial()] * mesh.ndim).full_tensor()):
        raise ValueError("a shard of the weights holds NaN or infinities, which have no importance; replace them first")
    if not _holds_whole_tiles(scores, layout, tile_shape):
        found = solve(scores.full_tensor(), None if before is None else as_plain(before))
        return replace(found, masks=distribute_tensor(found.masks, mesh, placements))
    local = scores.to_local()
    # FSDP leaves buffers whole.
    mine = None if before is None else cast("DTensor", like(before, scores)).to_local()
    found = solve(local, mine) if local.numel() else MaskSolution(masks=torch.zeros_like(local, dtype=torch.bool))
    masks = DTensor.from_local(found.masks, mesh, placements, shape=scores.shape, stride=scores.stride())
    return replace(found, masks=masks)


def _holds_whole_tiles(scores: DTensor, layout: Layout, tile_shape: tuple[int, int]) -> bool:
    from torch.distributed.tensor import Shard

    sides = dict(zip(layout.matrix_axes(scores.ndim), tile_shape, strict=True))
    seen = set()
    for placement, size in zip(scores.placements, scores.device_mesh.shape, strict=True):
        if placement.is_replicate():
            continue
        if type(placement) is not Shard or placement.dim in seen or layout.groups > 1:
            return False
        seen.add(placement.dim)
        shard = -(-scores.shape[placement.dim] // size)
        if shard % sides.get(placement.dim, 1):
            return False
    return True
