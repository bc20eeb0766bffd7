"""Masks as every solver of tensors returns them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskSolution:
    """The masks of a tensor, and what their solver reports.

    Attributes
    ----------
    masks : Tensor of bool, shape (..., R, C)
        True = kept. On the device of the weights, and sharded as they are.
    potentials : Tensor of float, shape (..., R // m, C // m, m), or None
        Column potentials of the whole tiles, in units of the weights, to start the next solve from; on the device that
        found them. None where the solver has none, or another process holds them.
    solved_on_cpu : int
        Tiles that a device could not prove and left to the CPU; 0 for weights on the CPU.
    kept_importance : float or None
        The share of the importance that the masks keep; None as long as nobody has computed it.
    """

    masks: Tensor
    potentials: Tensor | None = None
    solved_on_cpu: int = 0
    kept_importance: float | None = None
